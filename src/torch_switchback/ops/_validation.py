"""Checks of what a user passes. Each error names the operation, the argument and its value."""

import torch
from torch import Tensor

from ..config import ROTATIONS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICE_TYPES = ("cpu", "cuda", "meta")


def check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32, got {x.dtype}")


def check_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {x.dtype}")


def check_out_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32, got {dtype}")


def check_2d(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must be 2-D, got {tuple(x.shape)}")


def check_matrix(op: str, name: str, x: Tensor) -> None:
    check_float(op, name, x)
    check_2d(op, name, x)


def check_shape(op: str, name: str, x: Tensor, *shape: int) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(x.shape)}")


def check_rotation(op: str, name: str, block: int) -> None:
    if block not in ROTATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, ROTATIONS))}, got {block!r}")


def check_device(op: str, name: str, x: Tensor) -> None:
    if x.device.type not in DEVICE_TYPES:
        raise ValueError(f"{op}: {name} must be on one of {', '.join(DEVICE_TYPES)}, got {x.device}")


def check_same_device(op: str, reference: Tensor, **others: Tensor | None) -> None:
    device = reference.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{op}: {name} is on {other.device}, the input on {device}")
