"""INT8 matmuls with fused dequantization: which kernel computes one, and what runs instead if it cannot.

All kernels share the epilogue's arithmetic, and integer sums are exact, so their outputs are bit-identical.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton

from ..tuning import MatmulConfig, matmul_config, octave, padded
from . import CannotCompile, int8_matmul_pointer, int8_matmul_tma
from ._matmul import K_CHUNK
from .device import architecture

# The next plainer kernel, for a configuration that this Triton or this GPU cannot run.
_LAST_RESORT = MatmulConfig("pointer", 64, 64, 64, group_m=8, num_stages=3, num_warps=4)
_PLAINER = {
    "warp_specialized": MatmulConfig("tma", 128, 128, 128, 8, num_stages=3, num_warps=4, programs_per_multiprocessor=2),
    "tma": _LAST_RESORT,
    "pointer": _LAST_RESORT,
}
_replaced: dict[MatmulConfig, tuple[MatmulConfig, str]] = {}


class Plan(NamedTuple):
    """How one class of matmuls is launched: everything but the tensors and the number of rows."""

    launch: Callable[..., None]
    constants: Any  # of the kernel
    max_programs: int | None  # that share the tiles of a persistent kernel


def int8_matmul(
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
) -> None:
    """Fill out [M, N] with the dequantized product of a [M, K] and b [K, N].

    Args:
        config: the configuration to run; the tuned one if None. Warns (once per configuration) if the tuned one cannot
            run, and runs a plainer one.

    Raises:
        CannotCompile: the given configuration does not compile, or none does.
    """
    a, b = _in_whole_vectors(a), _in_whole_vectors(b.t())
    (m, k), n = a.shape, b.shape[0]
    kind = (a.device, n, k, k > 0 and out.numel() > 0 and _fits_tma(out), absmax_per_col, bias is not None, out_dtype)
    if bias is not None:
        bias = bias.contiguous()
    operands = a, b, absmax_a.contiguous(), absmax_b.contiguous(), bias, out
    try:
        plan = plan_tuned(octave(m), *kind) if config is None else make_plan(config, *kind)
        plan.launch(*operands, plan.constants, plan.max_programs)
    except CannotCompile as error:
        if config is not None:
            raise
        _fall_back(octave(m), kind, error)
        int8_matmul(a, b.t(), absmax_a, absmax_b, bias, out_dtype, out, absmax_per_col=absmax_per_col)


int8_matmul_mixed_dequantize = functools.partial(int8_matmul, absmax_per_col=False)
int8_matmul_rowwise_dequantize = functools.partial(int8_matmul, absmax_per_col=True)


@functools.lru_cache(4096)
def plan_tuned(rows_octave: int, device: torch.device, n: int, k: int, fits_tma: bool, *epilogue: Any) -> Plan:
    """Return the plan for any number of rows in one octave. At most one kernel is compiled per plan."""
    config, _ = chosen(architecture(device), 1 << rows_octave, n, k, fits_tma=fits_tma)
    return make_plan(config, device, n, k, fits_tma, *epilogue)


def make_plan(config: MatmulConfig, device: torch.device, n: int, k: int, fits_tma: bool, *epilogue: Any) -> Plan:
    """Return the plan for a configuration. It takes another kernel where the matmul does not allow the configured one.

    Raises:
        CannotCompile: the kernel is written in Gluon, and this Triton has another Gluon, or interprets.
    """
    if config.kernel == "pointer" or not fits_tma:
        return Plan(int8_matmul_pointer.launch_pointer, *int8_matmul_pointer.plan(config, device, k, *epilogue))
    if config.kernel == "tma" or k > K_CHUNK:
        return Plan(int8_matmul_tma.launch_tma, *int8_matmul_tma.plan(config, device, k, *epilogue))
    module = _warp_specialized()
    return Plan(module.launch_warp_specialized, *module.plan(config, device, k, *epilogue))


def chosen(architecture: str, m: int, n: int, k: int, *, fits_tma: bool) -> tuple[MatmulConfig, str]:
    """Return the configuration of a matmul [m, k] × [k, n], and why it is not the tuned one; "" if it is."""
    tuned = matmul_config(architecture, m, n, k, tma=fits_tma)
    config, reason = _replaced.get(tuned, (tuned, ""))
    if config.kernel == "warp_specialized" and k > K_CHUNK:
        return replace(config, kernel="tma"), f"int32 sums are carried over at an inner dimension above {K_CHUNK}"
    return config, reason


def _fall_back(rows_octave: int, kind: tuple[Any, ...], error: CannotCompile) -> None:
    """Replace the tuned configuration by a plainer one from now on.

    Raises:
        CannotCompile: there is no plainer one.
    """
    device, n, k, fits_tma, *_ = kind
    tuned = matmul_config(architecture(device), 1 << rows_octave, n, k, tma=fits_tma)
    config, _ = _replaced.get(tuned, (tuned, ""))
    plainer = _PLAINER[config.kernel]
    if config == plainer:
        raise error
    _replaced[tuned] = plainer, str(error)
    plan_tuned.cache_clear()
    warnings.warn(f"torch_switchback runs {plainer} instead of {tuned}: {error}", stacklevel=3)


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


def _in_whole_vectors(x: torch.Tensor) -> torch.Tensor:
    """Return x [rows, inner] if its rows are whole vectors that do not overlap, else a copy padded with zeros.

    Zeros add nothing. Without them every byte is a load of its own: 16384 × 4095 → 4096 took 3.5 ms and takes 0.5
    (docs/performance.md).
    """
    rows, inner = x.shape
    width = padded(inner)
    if inner == width and _fits_tma(x):
        return x
    copy = x.new_empty(rows, width)
    copy[:, inner:].zero_()
    copy[:, :inner].copy_(x)
    return copy


def _fits_tma(x: torch.Tensor) -> bool:
    """Return whether a TMA descriptor can describe x [rows, cols]: 16-byte aligned rows that do not overlap."""
    pitch, step = x.stride()
    return step == 1 and pitch >= x.shape[1] and pitch * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
