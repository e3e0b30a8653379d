"""The one place that launches kernels."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run ``kernel[grid](*args, **options)`` with the arithmetic of _numerics.py; an empty grid runs nothing."""
    if 0 not in grid:
        kernel[tuple(grid)](*args, enable_fp_fusion=False, **options)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share a kernel's programs; 1 for the CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """The tuning table's name for a device: ``"sm_90"``, ``"gfx942"``, …"""
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))
