"""With how many tokens, and in which dtype, a model calls its linear layers, and on which device."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..functional import autocast_input, has_few_tokens
from ..nn import SwitchBackLinear


class Call(NamedTuple):
    """One call of a layer."""

    tokens: int
    dtype: str  # that it computes in, as "bfloat16": the input's, or autocast's
    in_int8: bool


def layer_calls(
    model: nn.Module, sample_input: Any = None, tokens: int | None = None
) -> dict[str, tuple[nn.Linear, list[Call]]]:
    """Return every nn.Linear of a model, converted or not, by its first fully qualified name, with its calls.

    The arguments are those of :func:`explain`. With tokens every layer is taken to be called once, in its weight's
    dtype.
    """
    if not isinstance(sample_input, torch.Tensor | tuple | Mapping | None):
        kind = type(sample_input).__name__
        raise TypeError(f"sample_input must be a tensor, a tuple of arguments or a mapping of keywords, got {kind}")
    if (sample_input is None) == (tokens is None):
        raise ValueError("give either sample_input or tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ValueError(f"tokens must be a positive int, got {tokens!r}")
    found: dict[str, tuple[nn.Linear, list[Call]]] = {
        fqn.replace("_orig_mod.", ""): (module, [])
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if tokens is not None:
        for module, calls in found.values():
            dtype = getattr(module, "_weight_dtype", None)  # of a prepared layer, whose weight is int8
            dtype = dtype or next(iter(module.parameters()), torch.empty(0)).dtype
            with every_layer_called(module):  # or asking for a parametrized weight may change its buffers
                calls.append(Call(tokens, dtype_name(dtype), takes_int8(module, torch.empty(tokens, 0, device="meta"))))
        return found
    with contextlib.ExitStack() as hooks, every_layer_called(model), torch.no_grad():
        for module, calls in found.values():
            hooks.callback(module.register_forward_pre_hook(partial(_record, calls), with_kwargs=True).remove)
        run(model, sample_input)
    return found


def takes_int8(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Return whether a layer computes in int8 for an input (*, in_features), of which only the shape counts."""
    if not isinstance(layer, SwitchBackLinear):
        return False
    min_tokens = layer.config.min_tokens
    return not min_tokens or layer.is_prepared or not has_few_tokens(x, layer.weight, min_tokens)


def _record(calls: list[Call], layer: nn.Linear, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    x = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)), None)
    if x is None:  # a subclass of nn.Linear takes what it likes
        return
    dtype = autocast_input(torch.empty(0, dtype=x.dtype, device=x.device)).dtype
    calls.append(Call(x.shape[:-1].numel(), dtype_name(dtype), takes_int8(layer, x)))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(model: nn.Module, sample_input: Any) -> Any:
    """Call a model with a sample: a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(sample_input, Mapping):
        return model(**sample_input)
    return model(*sample_input) if isinstance(sample_input, tuple) else model(sample_input)


@contextlib.contextmanager
def every_layer_called(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, so that running it changes nothing, and close the ways round its layers.

    Those are compiled code, in which hooks do not run, and the fast path of nn.TransformerEncoderLayer, which reads its
    layers' weights itself. ``train`` is not called, as it may have effects that calling it again does not undo:
    loralib's merges LoRA into the weight and out of it, with rounding. Buffers get back what they had, for layers that
    count their tokens. Those of linear layers are left out: a model's int8 weights are too large to copy.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        if not isinstance(module, nn.Linear)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.layout is torch.strided
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for module in modes:
        module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return where a model lies, or of one on the meta device where it would run: device, else the GPU if any.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    own = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if own.type != "meta":
        return own
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def architecture_of(device: torch.device) -> str:
    """Return the name that a device has in the table of rates, such as ``"sm_90"`` or ``"cpu"``."""
    from ..kernels.device import architecture

    return "cpu" if device.type == "cpu" else architecture(device)


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
