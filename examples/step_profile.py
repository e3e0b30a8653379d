"""Measure how much of a training step the linear layers take."""

import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

# A linear layer runs under one of these names: eager forward, eager backward, or the bare operations that a compiled
# model calls. Attention has its own operation and nothing else in the model multiplies matrices.
_BACKWARD = "autograd::engine::evaluate_function: "
LINEAR_EVENTS = frozenset(
    {
        "aten::linear",
        "aten::addmm",
        "aten::mm",
        _BACKWARD + "AddmmBackward0",
        _BACKWARD + "MmBackward0",
        "SwitchBackFunction",
        _BACKWARD + "SwitchBackFunctionBackward",
    }
)
OPERATION_PREFIX = "torch_switchback::"


def linear_share(train_step: Callable[[], object], device: torch.device, steps: int = 5) -> float:
    """Fraction of a step's time that its linear layers take, forward and backward, from a profile of a few steps.

    On CUDA it is time on the device, on the CPU wall time. A compiled model fuses casts and biases into its other
    kernels, where they count as those; operations of the layers themselves are never fused.
    """
    # Otherwise the profiler of torch 2.13 reports its own start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function("train_step"):
                train_step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    events = list(profiler.events() or ())
    linear = [event for event in events if _is_linear(event) and not _is_inside_linear(event)]
    if device.type == "cuda":
        # An annotation, such as train_step, also appears as a span on the device, over the kernels that it launched.
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        return sum(event.device_time_total for event in linear) / sum(event.device_time_total for event in kernels)
    steps_taken = [event for event in events if event.name == "train_step"]
    return sum(event.cpu_time_total for event in linear) / sum(event.cpu_time_total for event in steps_taken)


def _is_linear(event: FunctionEvent) -> bool:
    return event.name in LINEAR_EVENTS or event.name.startswith(OPERATION_PREFIX)


def _is_inside_linear(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    return parent is not None and (_is_linear(parent) or _is_inside_linear(parent))
