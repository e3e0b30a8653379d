"""INT8 matmuls with fused dequantization: which kernel computes one, and what runs instead if it cannot.

All kernels share the epilogue's arithmetic, and integer sums are exact, so their outputs are bit-identical.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import triton

from ..tuning import MatmulConfig, matmul_config, padded
from . import CannotCompile, int8_matmul_pointer, int8_matmul_tma
from ._matmul import K_CHUNK, Operands
from .device import architecture
from .launch import VECTOR, Plan

# The next plainer kernel, for a configuration that this Triton or this GPU cannot run.
_LAST_RESORT = MatmulConfig("pointer", 64, 64, 64, group_m=8, num_stages=3, num_warps=4)
_PLAINER = {
    "warp_specialized": MatmulConfig("tma", 128, 128, 128, 8, num_stages=3, num_warps=4, ctas_per_sm=2),
    "tma": _LAST_RESORT,
    "pointer": _LAST_RESORT,
}
_replaced: dict[MatmulConfig, tuple[MatmulConfig, str]] = {}


def plan_int8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    absmax_a: torch.Tensor,
    absmax_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
    *,
    absmax_per_col: bool,
    config: MatmulConfig | None = None,
) -> Plan:
    """Return the plan that fills out [M, N] with the dequantized matmul of a [M, K] with b [K, N].

    Args:
        config: the configuration to run; the tuned one if None. Warns (once per configuration) if the tuned one cannot
            run, and takes a plainer one.

    Raises:
        CannotCompile: the given configuration does not compile, or none does.
    """
    k = padded(a.shape[1])
    pads_a, pads_b = not _in_whole_vectors(a), not _in_whole_vectors(b.t())

    def prepare(a: Any, b: Any, absmax_a: Any, absmax_b: Any, bias: Any) -> tuple[Any, Any, Any, Any, Any]:
        if pads_a:
            a = _copy_padded(a, k)
        if pads_b:
            b = _copy_padded(b.t(), k).t()
        return a, b, absmax_a.contiguous(), absmax_b.contiguous(), None if bias is None else bias.contiguous()

    operands = Operands(*prepare(a, b, absmax_a, absmax_b, bias), out)
    multiply = _plan_kernel(operands, absmax_per_col, config)
    if all(one is other for one, other in zip(operands, (a, b, absmax_a, absmax_b, bias, out), strict=True)):
        return multiply

    def run(a: Any, b: Any, absmax_a: Any, absmax_b: Any, bias: Any, out_dtype: Any, out: Any) -> None:
        multiply(*prepare(a, b, absmax_a, absmax_b, bias), out_dtype, out)

    return run


plan_int8_matmul_mixed_dequantize = functools.partial(plan_int8_matmul, absmax_per_col=False)
plan_int8_matmul_rowwise_dequantize = functools.partial(plan_int8_matmul, absmax_per_col=True)


def _plan_kernel(operands: Operands, absmax_per_col: bool, config: MatmulConfig | None) -> Plan:
    """Return the plan of one kernel: of a configuration, or of the tuned one, or of the first plainer one that runs."""
    (m, k), n, out = operands.a.shape, operands.b.shape[1], operands.out
    fits_tma = k > 0 and out.numel() > 0 and n * out.element_size() % VECTOR == 0 and out.data_ptr() % VECTOR == 0
    if config is not None:
        return _planner(config, fits_tma, k)(operands, absmax_per_col, config)
    tuned = matmul_config(architecture(out.device), m, n, k, tma=fits_tma)
    while True:
        config, _ = _replaced.get(tuned, (tuned, ""))
        try:
            return _planner(config, fits_tma, k)(operands, absmax_per_col, config)
        except CannotCompile as error:
            plainer = _PLAINER[config.kernel]
            if config == plainer:
                raise
            _replaced[tuned] = plainer, str(error)
            warnings.warn(f"torch_switchback runs {plainer} instead of {tuned}: {error}", stacklevel=2)


def _planner(config: MatmulConfig, fits_tma: bool, k: int) -> Callable[..., Plan]:
    """Return what plans a configuration: another kernel than its own where the matmul does not allow that."""
    if config.kernel == "pointer" or not fits_tma:
        return int8_matmul_pointer.plan_pointer
    if config.kernel == "tma" or k > K_CHUNK:
        return int8_matmul_tma.plan_tma
    return _warp_specialized().plan_warp_specialized


def chosen(architecture: str, m: int, n: int, k: int, *, fits_tma: bool) -> tuple[MatmulConfig, str]:
    """Return the configuration of a matmul [m, k] × [k, n], and why it is not the tuned one; "" if it is."""
    tuned = matmul_config(architecture, m, n, k, tma=fits_tma)
    config, reason = _replaced.get(tuned, (tuned, ""))
    if config.kernel == "warp_specialized" and k > K_CHUNK:
        return replace(config, kernel="tma"), f"int32 sums are carried over at an inner dimension above {K_CHUNK}"
    return config, reason


@functools.cache
def _warp_specialized() -> ModuleType:
    """Return the module of the kernel written in Gluon, which is experimental and differs between Triton versions.

    Raises:
        CannotCompile: this Triton has none or another one, or interprets.
    """
    if triton.knobs.runtime.interpret:
        raise CannotCompile("the interpreter does not run Gluon")
    try:
        from . import int8_matmul_warp_specialized
    except (ImportError, AttributeError) as error:
        raise CannotCompile(f"Gluon cannot be used: {error}") from error
    return int8_matmul_warp_specialized


def _in_whole_vectors(x: torch.Tensor) -> bool:
    """Return whether the rows of x [rows, inner], int8, are whole vectors, aligned, and do not overlap."""
    inner, (pitch, step) = x.shape[1], x.stride()
    return inner % VECTOR == 0 and step == 1 and pitch >= inner and pitch % VECTOR == 0 and x.data_ptr() % VECTOR == 0


def _copy_padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return a copy of x [rows, inner], padded with zeros to the width.

    Zeros add nothing. Without them every byte is a load of its own: 16384 × 4095 → 4096 took 3.5 ms and takes 0.5
    (docs/performance-log.md).
    """
    rows, inner = x.shape
    copy = x.new_empty(rows, width)
    copy[:, inner:].zero_()
    copy[:, :inner].copy_(x)
    return copy
