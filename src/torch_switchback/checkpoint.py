"""Checkpoints of prepared, int8 layers from those of training, and back, as tensors by name and in files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .config import config_of
from .filters import look_up
from .functional import quantize_weight
from .ops import dequantize_rowwise
from .ops._validation import FLOAT_DTYPES

NOTE = "torch_switchback"  # the entry of the file's metadata: which layers are prepared, and from which dtype
State = dict[str, torch.Tensor]


def prepared(state: Mapping[str, torch.Tensor], patterns: Mapping[str, str | None]) -> tuple[State, dict[str, Any]]:
    """Return a training state with int8 values in place of weights, and by layer its recipe and the weight's dtype.

    Args:
        state: tensors by name.
        patterns: recipes by layers' names, as :func:`look_up` finds them; None leaves a layer as it is.
    """
    result: State = {}
    notes: dict[str, Any] = {}
    for name, tensor in state.items():
        layer, dot, kind = name.rpartition(".")  # a model that is one layer has neither
        asked = look_up(patterns, layer)
        if kind != "weight" or tensor.dim() != 2 or tensor.dtype not in FLOAT_DTYPES or asked is None:
            result[name] = tensor
            continue
        result[f"{layer}{dot}weight_int8"], result[f"{layer}{dot}weight_absmax"] = quantize_weight(
            tensor, config_of(asked)
        )
        notes[layer] = {"recipe": asked, "dtype": str(tensor.dtype).removeprefix("torch.")}
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
    """Return the tensors of a file of safetensors or torch.save, its metadata, and the notes of :func:`prepared`.

    Raises:
        ValueError: the file holds anything but tensors by name.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata, json.loads(metadata.pop(NOTE, "{}"))
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
    save_file(apart, path, metadata={"format": "pt"} | dict(metadata) | ({NOTE: json.dumps(notes)} if notes else {}))
