"""``torch-switchback export``: checkpoints of prepared, int8 layers from those of training, and back."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from typer import Argument, BadParameter, Option

from ..config import config_of
from ..filters import look_up
from ..ops._validation import FLOAT_DTYPES
from ..prepared import INT8_STATE, float_weight, int8_state
from .common import ConfigFlag, JsonFlag, check_output, needs, read_json, to_json

NOTE = "torch_switchback"  # the entry of the file's metadata: which layers are prepared, and from what weight
SOURCE = (
    "A .safetensors file, one of torch.save, the index.json of a checkpoint in several files, or a folder with such an "
    "index or a single .safetensors file."
)
State = dict[str, torch.Tensor]


def export(
    source: Annotated[Path, Argument(exists=True, help=SOURCE)],
    target: Annotated[
        Path, Argument(dir_okay=False, callback=check_output, help="The one .safetensors file to write.")
    ],
    layers: Annotated[list[str] | None, Option(metavar="PATTERN", help="Layers to quantize; repeatable.")] = None,
    config: ConfigFlag = "switchback",
    back: Annotated[bool, Option("--back", help="Dequantize a prepared checkpoint instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Quantize the linear layers of a checkpoint for good, as prepare_for_eval does: half of bfloat16's bytes.

    A model that was converted with the same --config loads the result with load_state_dict, and gives the same outputs
    as before, bit for bit. Which matrices belong to linear layers a checkpoint does not say. Name them with --layers or
    in a JSON file for --config: not the embeddings, not the LM head. --back gives a checkpoint that nn.Linear loads, in
    the dtype that there was; what was rounded away stays away. Files of torch.save are read with weights_only=True. If
    the state_dict is under a key in one, as in {"model": …}, the output names the key; the rest is not taken over.

    Examples:

    \b
      torch-switchback export model.safetensors int8.safetensors --layers 'model.layers.*'
      torch-switchback export model.safetensors.index.json int8.safetensors --layers 'model.layers.*'
      torch-switchback export checkpoint.pt int8.safetensors --config switchback.json
      torch-switchback export int8.safetensors model.safetensors --back
    """
    for module in ("safetensors", "numpy"):  # the first imports the second and does not require it
        needs(module)
    if target.suffix != ".safetensors":
        raise BadParameter(f"the target must end in .safetensors, got {target}")
    if not back and isinstance(config, str) and not layers:
        raise BadParameter("say which layers: --layers 'model.layers.*', or --config with a JSON file")
    state, metadata, notes, key = read(source)
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
    of = "" if key is None else f" of the state_dict under {key!r}"
    summary = f"{target}: {len(names)} layers{of}, {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB"
    typer.echo(to_json({"target": str(target), "key": key, "layers": names, **sizes}) if json else summary)


def prepared(state: Mapping[str, torch.Tensor], patterns: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    """Return a training state with int8 values in place of weights, and by layer its config, and its weight's dtype.

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
        result |= {f"{layer}{dot}{entry}": value for entry, value in int8_state(tensor, config_of(recipe)).items()}
        dtype = str(tensor.dtype).removeprefix("torch.")
        notes[layer] = {"recipe": recipe, "dtype": dtype, "in_features": tensor.shape[1]}
    return result, notes


def restored(state: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> tuple[State, list[str]]:
    """Return a training state from a prepared one, and the layers' names. Without a note a weight becomes bfloat16.

    Raises:
        ValueError: int8 values have no absmax, or are rotated and have no note, which says how many features there are;
            or the note is of no dtype that a weight can have.
    """
    result = dict(state)
    layers = [name.removesuffix("weight_int8") for name in state if name.rpartition(".")[2] == "weight_int8"]
    for prefix in layers:
        int8 = {name: result.pop(f"{prefix}{name}") for name in INT8_STATE if f"{prefix}{name}" in result}
        if "weight_absmax" not in int8:
            raise ValueError(f"{prefix}weight_int8 has no {prefix}weight_absmax beside it")
        note = {"dtype": "bfloat16"} | notes.get(prefix.removesuffix("."), {})
        if "weight_rotation" in int8 and "in_features" not in note:
            raise ValueError(
                f"{prefix}weight_int8 is rotated, and no note says how many features it has without padding; load it "
                "into a converted model, and call prepare_for_training(model)"
            )
        dtype = next((dtype for dtype in FLOAT_DTYPES if str(dtype) == f"torch.{note['dtype']}"), None)
        if dtype is None:
            raise ValueError(f"{prefix}weight_int8 is noted as of {note['dtype']!r}, which is no dtype of a weight")
        in_features = note.get("in_features", int8["weight_int8"].shape[1])
        block = int(int8["weight_rotation"]) if "weight_rotation" in int8 else None
        result[f"{prefix}weight"] = float_weight(int8["weight_int8"], int8["weight_absmax"], block, in_features, dtype)
    return result, [prefix.removesuffix(".") for prefix in layers]


class Checkpoint(NamedTuple):
    """Hold what the files of a checkpoint do."""

    state: State
    metadata: dict[str, str]
    notes: dict[str, Any]
    """By layer, as :func:`prepared` returns them."""
    key: str | None = None
    """The key that the state_dict is under in a file of torch.save, or None if the file has nothing else."""


def read(path: Path) -> Checkpoint:
    """Read a file of safetensors or torch.save, the files that an index.json names, or what a folder has of these.

    Raises:
        ValueError: a folder has several checkpoints or none; a .json file is no index, or names a tensor that is not
            where it should be; or a file of torch.save has no state_dict, or several.
    """
    if path.is_dir():
        path = _checkpoint_in(path)
    if path.suffix == ".json":
        return _read_shards(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            notes = json_module.loads(metadata.pop(NOTE, "{}"))
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, metadata, notes)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if _is_state_dict(content):
        return Checkpoint(content, {}, {})
    parts = content if isinstance(content, dict) else {}
    keys = [key for key, value in parts.items() if _is_state_dict(value)]
    if len(keys) == 1 and not any(isinstance(value, torch.Tensor) for value in parts.values()):
        return Checkpoint(parts[keys[0]], {}, {}, str(keys[0]))
    several = f", but tensors under {', '.join(map(repr, keys))}" if keys else ""
    raise ValueError(f"{path} holds no state_dict, a dict of tensors, on its own or under one key{several}")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, torch.Tensor) for v in content.values())


def _checkpoint_in(folder: Path) -> Path:
    """Return the index in a folder, of safetensors if there are two kinds, else the single file of safetensors."""
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} holds several checkpoints: {', '.join(path.name for path in found)}")
    raise ValueError(f"{folder} holds no index.json and no .safetensors file")


def _read_shards(index: Path) -> Checkpoint:
    """Read the files that an index names, as Transformers, Accelerate and huggingface_hub write it."""
    content = read_json(str(index))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict):
        raise ValueError(f"{index} is no index of a checkpoint: it has no weight_map")
    state: State = {}
    metadata: dict[str, str] = {}
    notes: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        shard = read(index.parent / file)
        for name in (name for name, place in places.items() if place == file):
            if name not in shard.state:
                raise ValueError(f"{index} says that {file} holds {name}, which it does not")
            state[name] = shard.state[name]
        metadata |= shard.metadata
        notes |= shard.notes
    return Checkpoint(state, metadata, notes)


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
