"""``torch-switchback export``: checkpoints of prepared, int8 layers from those of training, and back."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Argument, BadParameter, Option

from ..config import config_of
from ..filters import look_up
from ..functional import quantize_weight
from ..ops import dequantize_rowwise
from ..ops._validation import FLOAT_DTYPES
from .common import ConfigFlag, JsonFlag, check_output, needs, to_json

NOTE = "torch_switchback"  # the entry of the file's metadata: which layers are prepared, and from which dtype
State = dict[str, torch.Tensor]


def export(
    source: Annotated[Path, Argument(exists=True, dir_okay=False, help="A .safetensors file, or one of torch.save.")],
    target: Annotated[Path, Argument(dir_okay=False, callback=check_output, help="The .safetensors file to write.")],
    layers: Annotated[list[str] | None, Option(metavar="PATTERN", help="Layers to quantize; repeatable.")] = None,
    config: ConfigFlag = "switchback",
    back: Annotated[bool, Option("--back", help="Dequantize a prepared checkpoint instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Quantize the linear layers of a checkpoint for good, as prepare_for_eval does: half of bfloat16's bytes.

    A model that was converted with the same --config loads the result with load_state_dict, and gives the same outputs
    as before, bit for bit. Which matrices belong to linear layers a checkpoint does not say. Name them with --layers or
    in a JSON file for --config: not the embeddings, not the LM head. --back gives a checkpoint that nn.Linear loads, in
    the dtype that there was; what was rounded away stays away. Files of torch.save are read with weights_only=True.

    Examples:

    \b
      torch-switchback export model.safetensors int8.safetensors --layers 'model.layers.*'
      torch-switchback export checkpoint.pt int8.safetensors --config switchback.json
      torch-switchback export int8.safetensors model.safetensors --back
    """
    for module in ("safetensors", "numpy"):  # the first imports the second and does not require it
        needs(module)
    if target.suffix != ".safetensors":
        raise BadParameter(f"the target must end in .safetensors, got {target}")
    if not back and isinstance(config, str) and not layers:
        raise BadParameter("say which layers: --layers 'model.layers.*', or --config with a JSON file")
    state, metadata, notes = read(source)
    if back:
        result, names = restored(state, notes)
        notes = {}
    else:
        patterns = config if isinstance(config, dict) else dict.fromkeys(layers or (), config)
        result, notes = prepared(state, patterns)
        names = list(notes)
    if not names:
        raise ValueError(f"{source} holds no {'prepared layer' if back else 'matrix under these names'}")
    write(target, result, metadata, notes)
    before, after = (sum(tensor.nbytes for tensor in tensors.values()) for tensors in (state, result))
    sizes = {"bytes_before": before, "bytes_after": after}
    summary = f"{target}: {len(names)} layers, {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB"
    typer.echo(to_json({"target": str(target), "layers": names, **sizes}) if json else summary)


def prepared(state: Mapping[str, torch.Tensor], patterns: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    """Return a training state with int8 values in place of weights, and by layer its config and the weight's dtype.

    Args:
        state: tensors by name.
        patterns: configurations by layers' names, as :func:`look_up` finds them; None leaves a layer as it is.
    """
    result: State = {}
    notes: dict[str, Any] = {}
    for name, tensor in state.items():
        layer, dot, kind = name.rpartition(".")  # a model that is one layer has neither
        recipe = look_up(patterns, layer)
        if kind != "weight" or tensor.dim() != 2 or tensor.dtype not in FLOAT_DTYPES or recipe is None:
            result[name] = tensor
            continue
        int8, absmax = quantize_weight(tensor, config_of(recipe))
        result |= {f"{layer}{dot}weight_int8": int8, f"{layer}{dot}weight_absmax": absmax}
        notes[layer] = {"recipe": recipe, "dtype": str(tensor.dtype).removeprefix("torch.")}
    return result, notes


def restored(state: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> tuple[State, list[str]]:
    """Return a training state from a prepared one, and the layers' names. Without a note a weight becomes bfloat16.

    Raises:
        ValueError: int8 values have no absmax, or the note is of no dtype that a weight can have.
    """
    result = dict(state)
    layers = [name.removesuffix("weight_int8") for name in state if name.rpartition(".")[2] == "weight_int8"]
    for prefix in layers:
        weight, absmax = result.pop(f"{prefix}weight_int8"), result.pop(f"{prefix}weight_absmax", None)
        if absmax is None:
            raise ValueError(f"{prefix}weight_int8 has no {prefix}weight_absmax beside it")
        noted = notes.get(prefix.removesuffix("."), {"dtype": "bfloat16"})["dtype"]
        dtype = next((dtype for dtype in FLOAT_DTYPES if str(dtype) == f"torch.{noted}"), None)
        if dtype is None:
            raise ValueError(f"{prefix}weight_int8 is noted as of {noted!r}, which is no dtype of a weight")
        rows = absmax.expand(weight.shape[0]).contiguous()
        result[f"{prefix}weight"] = dequantize_rowwise(weight, rows, torch.float32).to(dtype)
    return result, [prefix.removesuffix(".") for prefix in layers]


def read(path: Path) -> tuple[State, dict[str, str], dict[str, Any]]:
    """Return the tensors of a file of safetensors or torch.save, its metadata, and the notes of :func:`prepared`."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            notes = json_module.loads(metadata.pop(NOTE, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata, notes
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict, a dict of tensors")
    return state, {}, {}


def write(path: Path, state: State, metadata: Mapping[str, str], notes: Mapping[str, Any]) -> None:
    """Write a .safetensors file. Tensors that share memory, such as tied weights, become copies."""
    from safetensors.torch import save_file

    apart: State = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    own = {NOTE: json_module.dumps(notes)} if notes else {}
    save_file(apart, path, metadata={"format": "pt", **metadata, **own})
