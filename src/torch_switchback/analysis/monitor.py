"""Measure how much noise quantizing adds to a model's layers while it trains.

with Monitor(model, every=100, layers="*.mlp.*", writer=CsvWriter("noise.csv")) as monitor:
    for batch in data:
        ...  # forward, backward, optimizer
        monitor.step()
"""

import contextlib
import csv
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..distributed.fsdp_weights import GatheredWeight
from ..functional import switchback_linear
from ..nn import SwitchBackLinear
from ..ops._hadamard import rotate_features
from ..scaling import scaling_for
from .layer_calls import takes_int8

Record = dict[str, float]


class Writer(Protocol):
    """Receives the records. torch.utils.tensorboard's SummaryWriter and :class:`CsvWriter` are writers."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any: ...


class CsvWriter:
    """Appends lines ``step,tag,value`` to a file, which gets a header if it is new.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a", newline="", encoding="utf-8", buffering=1)  # a line at a time
        self._rows = csv.writer(self._file)
        if self._file.tell() == 0:
            self._rows.writerow(("step", "tag", "value"))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._rows.writerow((step, tag, value))

    def close(self) -> None:
        self._file.close()


class Monitor:
    """Samples the noise of a model's SwitchBack layers every few training steps, and costs nothing in between.

    In a sampled step each layer's first forward and backward in int8 are computed twice more, in int8 and in the
    layer's own dtype, and compared (:func:`measure`). A layer whose calls all have fewer tokens than its ``min_tokens``
    computes as nn.Linear and adds no noise: its record is ``in_int8`` alone, which is 0. Code under torch.compile runs
    eagerly in such a step, through ``torch.compiler.set_stance("force_eager")``: nothing is compiled again, and other
    steps run as if there were no monitor. A captured CUDA graph runs no Python: its layers are not seen. Nor are layers
    that have been reverted or prepared since, and copies of the model.

    Args:
        model: its SwitchBackLinear layers are monitored; torch.compile's wrapper is seen through.
        every: steps from one sample to the next; the first step is sampled.
        layers: glob patterns (fnmatch) of the layers' fully qualified names; one of them must match.
        writer: gets ``add_scalar(f"switchback/{name}/{quantity}", value, step)``.

    Attributes:
        latest: the last sample by the layer's name: ``in_int8``, which is 1 or 0, and the quantities of
            :func:`measure` if it is 1.

    Raises:
        ValueError: every is not positive, no layer matches, or all that do are prepared.
        NotImplementedError: in a sampled forward, a layer is tensor-parallel.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, layers: str | Sequence[str] = "*", writer: Writer | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"Monitor: every must be positive, got {every}")
        patterns = (layers,) if isinstance(layers, str) else tuple(layers)
        named = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
        linears = {name: module for name, module in named if isinstance(module, SwitchBackLinear)}
        self._layers = {name: linears[name] for name in linears if any(fnmatchcase(name, each) for each in patterns)}
        if not self._layers:
            hint = "" if linears else "; call convert_to_switchback first"
            raise ValueError(f"Monitor: layers matches no SwitchBackLinear of the model, got {layers!r}{hint}")
        if all(layer.is_prepared for layer in self._layers.values()):
            raise ValueError(
                f"Monitor: all layers that {layers!r} matches are prepared, and have no weight to compare with; use it "
                "before the model is prepared or frozen"
            )
        self._every, self._writer = every, writer
        self._step, self._closed = 0, False
        self._sample: dict[str, Record] = {}
        self.latest: dict[str, Record] = {}
        self._start_sampling()

    def step(self) -> None:
        """Write the sample, if this step was one, and count on. To be called after each training step."""
        if self._stop_sampling.alive:
            self._stop_sampling()
            self.latest = self._sample
            if self._writer is not None:
                for name, record in self._sample.items():
                    for quantity, value in record.items():
                        self._writer.add_scalar(f"switchback/{name}/{quantity}", value, self._step)
        self._step += 1
        if self._step % self._every == 0 and not self._closed:
            self._start_sampling()

    def close(self) -> None:
        """Leave the model alone for good. The writer stays open."""
        self._closed = True
        self._stop_sampling()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_sampling(self) -> None:
        self._sample = {}
        sampling = contextlib.ExitStack()
        sampling.enter_context(_eager())
        for name, layer in self._layers.items():
            hook = _Hook(name, self._sample)
            sampling.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        self._stop_sampling = weakref.finalize(self, sampling.close)  # also when nobody holds the monitor any more


_samplers = 0  # monitors that sample this step
_stance = contextlib.ExitStack()


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code eagerly until the last monitor is out, whichever that is: a stance belongs to the process."""
    global _samplers
    if _samplers == 0:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _samplers += 1
    try:
        yield
    finally:
        _samplers -= 1
        if _samplers == 0:
            _stance.close()


class _Hook:
    """A forward hook: the layer's first forward in int8 that has a backward leaves its record in the sample."""

    def __init__(self, name: str, sample: dict[str, Record]) -> None:
        self.name, self.sample = name, sample

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not self._wants(layer) or not output.requires_grad or output.numel() == 0:
            return
        x = args[0] if args else kwargs["input"]
        if hasattr(x, "device_mesh"):  # a DTensor, as parallelize_module makes it; under fully_shard it is plain
            raise NotImplementedError(f"Monitor: layer {self.name!r} is tensor-parallel; choose others with layers=")
        x = x.detach().to(output.dtype)  # as autocast did

        def after_backward(grad: Tensor) -> None:
            if not self._wants(layer):
                return
            if takes_int8(layer, x):
                self.sample[self.name] = {"in_int8": 1.0} | measure(layer, x, grad)
            else:
                self.sample[self.name] = {"in_int8": 0.0}

        output.register_hook(after_backward)

    def _wants(self, layer: nn.Module) -> TypeGuard[SwitchBackLinear]:
        """Return whether a record is missing and the layer can give one: it may have been reverted or prepared."""
        missing = not self.sample.get(self.name, {}).get("in_int8")
        return isinstance(layer, SwitchBackLinear) and not layer.is_prepared and missing

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave a hook that does nothing to a copy of the layer, or to a pickled one: they are not monitored."""
        return _HookOfACopy, ()


class _HookOfACopy:
    def __call__(self, *_: object) -> None:
        pass


def measure(layer: SwitchBackLinear, x: Tensor, grad_output: Tensor) -> Record:
    """Return one layer's noise and what drives it, for an input and the gradient of its output.

    Args:
        layer: not prepared for evaluation. It is measured in int8, however few tokens x has. Of a weight that FSDP2 has
            gathered as int8 a rank knows only int8 values: outputs are compared with theirs, so the noise of
            quantizing the weight itself is not counted.
        x: (*, in_features), in the dtype that the layer computes in.
        grad_output: (*, out_features).

    Returns:
        For each matmul P of ``output``, ``grad_input`` and ``grad_weight``, against nn.Linear in x's dtype:

        - ``P_snr``: signal to noise in dB over the whole tensor;
        - ``P_snr_worst_rows``: what 99 % of its rows are above.

        For each operand T of ``x``, ``weight`` and ``grad``:

        - ``T_crest``: absmax over root mean square of what one absmax covers, a row or a globally scaled weight; what
          99 % of the rows are below. INT8 is more accurate than float8 (e4m3) below 11.7;
        - ``T_zeros``: share of its int8 values that are 0.
    """
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    known = weight.dequantize() if isinstance(weight, GatheredWeight) else weight

    def quantized(x: Tensor, weight: Tensor) -> Tensor:
        return switchback_linear(x, weight, bias, replace(layer.config, min_tokens=0))

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    ours, theirs = _matmuls(quantized, x, weight, grad_output), _matmuls(exact, x, known, grad_output)
    quantities = {}
    for matmul, actual, reference in zip(("output", "grad_input", "grad_weight"), ours, theirs, strict=True):
        quantities[f"{matmul}_snr"], quantities[f"{matmul}_snr_worst_rows"] = _signal_to_noise(actual, reference)
    x, grad = x.detach().reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
    covered = known.reshape(1, -1) if layer.config.weight_scaling == "global" else known
    scaling = scaling_for(layer.config, x, weight, grad)
    for operand, rows, qdata in (
        ("x", x, scaling.quantize_input(x)[0]),
        ("weight", covered, scaling.quantize_weight(weight)[0]),
        ("grad", grad, scaling.quantize_grad(grad)[0]),
    ):
        quantities[f"{operand}_crest"] = _crest(rows, layer.config.rotate_features)
        quantities[f"{operand}_zeros"] = 1 - qdata.count_nonzero() / qdata.numel()
    values = torch.stack([value.float() for value in quantities.values()]).tolist()  # one wait for the GPU
    return dict(zip(quantities, values, strict=True))


def _matmuls(
    forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad_output: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = forward(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad_output))


def _signal_to_noise(actual: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return decibels: of the whole tensor, and what 99 % of its rows are above. Inf without noise."""
    actual, reference = actual.reshape(-1, actual.shape[-1]), reference.reshape(-1, actual.shape[-1])
    energies = [
        torch.stack((wanted.float().square().sum(1), (got.float() - wanted.float()).square().sum(1)))
        for got, wanted in zip(_in_blocks(actual), _in_blocks(reference), strict=True)
    ]
    signal, noise = torch.cat(energies, dim=1)
    rows = _decibels(signal, noise)
    return _decibels(signal.sum(), noise.sum()), rows.kthvalue(max(1, len(rows) // 100)).values


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(noise == 0, float("inf"), 10 * torch.log10(signal / noise))


def _crest(x: Tensor, rotation: int | None) -> Tensor:
    """Return what 99 % of the rows' absmax over root mean square are below; 1 for a row of zeros."""
    crests = []
    for block in _in_blocks(x):
        block = block if rotation is None else rotate_features(block, rotation)
        absmax = block.abs().amax(1, keepdim=True).float()
        crests.append((block.float() / absmax).square().mean(1).rsqrt().masked_fill(absmax[:, 0] == 0, 1.0))
    rows = torch.cat(crests)
    return rows.kthvalue(len(rows) - len(rows) // 100).values


def _in_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Split rows into blocks of about 2**24 elements: float32 copies of a whole activation may not fit."""
    return x.split(max(1, 2**24 // x.shape[1]))
