"""``torch-switchback export``: checkpoints of prepared, int8 layers from those of training, and back."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
import typer

from ..config import config_of
from ..filters import look_up
from ..functional import quantize_weight
from ..ops import dequantize_rowwise
from ..ops._validation import FLOAT_DTYPES
from .common import JsonFlag, needs, parse_config, stop

NOTE = "torch_switchback"  # the entry of the file's metadata: which layers are prepared, and from which dtype
State = dict[str, torch.Tensor]


def export(
    source: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A .safetensors file, or one that torch.save wrote.")
    ],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="The .safetensors file to write.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Names of layers to quantise, as in a shell: 'model.layers.*'. Repeatable.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            help="The recipe that the model is converted with; or a JSON file of layers' names and recipes, such as "
            "`recommend --output` writes, and then stands for --layers, too."
        ),
    ] = "switchback",
    back: Annotated[bool, typer.Option("--back", help="Dequantise a prepared checkpoint instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Quantise the linear layers of a checkpoint for good, as prepare_for_eval does: half of bfloat16's bytes.

    A model that was converted with the same recipe loads the result with load_state_dict, and gives the same outputs as
    before, bit for bit. Which matrices belong to linear layers a checkpoint does not say, so name them: not the
    embeddings, not the LM head. --back gives a checkpoint that nn.Linear loads, in the dtype that there was; what was
    rounded away stays away. Files that torch.save wrote are read with weights_only=True.

    Examples:

    \b
      torch-switchback export model.safetensors int8.safetensors --layers 'model.layers.*'
      torch-switchback export checkpoint.pt int8.safetensors --config switchback.json
      torch-switchback export int8.safetensors model.safetensors --back
    """
    safetensors = needs("export", "safetensors.torch", "cli")
    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"the target must end in .safetensors, got {target}")
    asked = parse_config(config)
    if not back and isinstance(asked, str) and not layers:
        raise typer.BadParameter("say which layers: --layers 'model.layers.*', or --config with a JSON file")
    try:
        state, metadata = _read(source)
        if back:
            result, names = restored(state, json_module.loads(metadata.pop(NOTE, "{}")))
        else:
            patterns = asked if isinstance(asked, dict) else {pattern: asked for pattern in layers or ()}
            result, notes = prepared(state, patterns)
            names = list(notes)
            metadata = metadata | {NOTE: json_module.dumps(notes)}
        if not names:
            what = "holds no prepared layer" if back else "holds no matrix under these names"
            raise ValueError(f"{source} {what}")
        safetensors.save_file(_apart(result), target, metadata={"format": "pt"} | metadata)
    except (OSError, RuntimeError, TypeError, ValueError, UnpicklingError, _safetensor_error()) as error:
        stop("export", error)
    before, after = (sum(tensor.nbytes for tensor in tensors.values()) for tensors in (state, result))
    if json:
        content = {"target": str(target), "layers": names, "bytes_before": before, "bytes_after": after}
        typer.echo(json_module.dumps(content, indent=1))
    else:
        typer.echo(f"{target}: {len(names)} layers, {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB")


def prepared(state: Mapping[str, torch.Tensor], patterns: Mapping[str, str | None]) -> tuple[State, dict[str, Any]]:
    """A training state with int8 codes in place of layers' weights, and by layer the recipe and the weight's dtype.

    Args:
        state: tensors by name.
        patterns: recipes by layers' names, as :func:`look_up` finds them; None leaves a layer as it is.
    """
    result: State = {}
    notes: dict[str, Any] = {}
    for name, tensor in state.items():
        layer, dot, kind = name.rpartition(".")  # a model that is one layer has neither
        prefix = layer + dot
        asked = look_up(patterns, layer)
        if kind != "weight" or tensor.dim() != 2 or tensor.dtype not in FLOAT_DTYPES or asked is None:
            result[name] = tensor
            continue
        codes, absmax = quantize_weight(tensor, config_of(asked))
        result[f"{prefix}weight_int8"], result[f"{prefix}weight_absmax"] = codes, absmax
        notes[layer] = {"recipe": asked, "dtype": str(tensor.dtype).removeprefix("torch.")}
    return result, notes


def restored(state: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> tuple[State, list[str]]:
    """A training state from a prepared one, and the layers' names. Without a note a weight becomes bfloat16.

    Raises:
        ValueError: codes have no absmax, or the note is of no dtype that a weight can have.
    """
    result: State = {}
    layers = []
    for name, tensor in state.items():
        layer, dot, kind = name.rpartition(".")
        prefix = layer + dot
        if kind == "weight_absmax" and f"{prefix}weight_int8" in state:
            continue
        if kind != "weight_int8":
            result[name] = tensor
            continue
        absmax = state.get(f"{prefix}weight_absmax")
        if absmax is None:
            raise ValueError(f"{name} has no {prefix}weight_absmax beside it")
        noted = notes.get(layer, {"dtype": "bfloat16"})["dtype"]
        dtype = next((dtype for dtype in FLOAT_DTYPES if str(dtype) == f"torch.{noted}"), None)
        if dtype is None:
            raise ValueError(f"{name} is noted as of {noted!r}, which is no dtype of a weight")
        rows = absmax.expand(tensor.shape[0]).contiguous()
        result[f"{prefix}weight"] = dequantize_rowwise(tensor, rows, torch.float32).to(dtype)
        layers.append(layer)
    return result, layers


def _read(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors of a file, and its metadata."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict, a dict of tensors")
    return state, {}


def _apart(state: State) -> State:
    """Contiguous tensors that share no memory, as safetensors wants them; tied weights become copies."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return result


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
