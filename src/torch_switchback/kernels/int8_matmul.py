"""INT8 products with fused dequantisation: which kernel computes one, and what instead if it cannot run.

All kernels share the epilogue's arithmetic, and integer sums are exact: their outputs are the same bit for bit.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from ..tuning import MatmulConfig, matmul_config, padded
from ._launch import CannotCompile, architecture
from ._product import FOLD
from ._replay import widened
from .int8_matmul_pointer import launch_pointer
from .int8_matmul_tma import launch_tma

# What runs instead of a configuration that this Triton or this GPU cannot: of the next plainer kernel.
_LAST_RESORT = MatmulConfig("pointer", 64, 64, 64, group_m=8, num_stages=3, num_warps=4)
_PLAINER = {
    "warp_specialized": MatmulConfig("tma", 128, 128, 128, 8, num_stages=3, num_warps=4, programs_per_multiprocessor=2),
    "tma": _LAST_RESORT,
    "pointer": _LAST_RESORT,
}
_replaced: dict[MatmulConfig, tuple[MatmulConfig, str]] = {}


def int8_matmul_mixed_dequantize(
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    dequantized_product(a, b, state_x, state_w, bias, out, absmax_per_col=False)


def int8_matmul_rowwise_dequantize(
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    dequantized_product(a, b, state_x, state_w, bias, out, absmax_per_col=True)


def dequantized_product(
    a: torch.Tensor,
    b: torch.Tensor,
    absmax_a: torch.Tensor,
    absmax_b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    absmax_per_col: bool,
    config: MatmulConfig | None = None,
) -> None:
    """Fill out [M, N] with the product of a [M, K] and b [K, N], by the tuned configuration or a given one.

    Warns (once a configuration) if the tuned one does not compile or does not fit the GPU, and runs a plainer one.

    Raises:
        CannotCompile: the given configuration does not, or none does.
    """
    a, b = _in_whole_vectors(a), _in_whole_vectors(b.t())
    operands = (a, b, absmax_a.contiguous(), absmax_b.contiguous(), None if bias is None else bias.contiguous(), out)
    (M, K), N = a.shape, b.shape[0]
    fits_tma = K > 0 and out.numel() > 0 and _fits_tma(out)
    if config is not None:
        _launcher(config, fits_tma, K)(*operands, absmax_per_col, config)
        return
    tuned = matmul_config(architecture(a.device), M, N, K, tma=fits_tma)
    while True:
        config, _ = _replaced.get(tuned, (tuned, ""))
        try:
            return _launcher(config, fits_tma, K)(*operands, absmax_per_col, config)
        except CannotCompile as error:
            plainer = _PLAINER[config.kernel]
            if config == plainer:
                raise
            _replaced[tuned] = plainer, str(error)
            warnings.warn(f"torch_switchback runs {plainer} instead of {tuned}: {error}", stacklevel=2)


def chosen(architecture: str, m: int, n: int, k: int, *, fits_tma: bool) -> tuple[MatmulConfig, str]:
    """What a product [m, k] × [k, n] runs with as far as is known, and why it is not what was tuned; "" if it is."""
    tuned = matmul_config(architecture, m, n, k, tma=fits_tma)
    config, reason = _replaced.get(tuned, (tuned, ""))
    if config.kernel == "warp_specialized" and k > FOLD:
        return replace(config, kernel="tma"), f"its sums are folded, at an inner dimension above {FOLD}"
    return config, reason


def _launcher(config: MatmulConfig, fits_tma: bool, inner: int) -> Callable[..., None]:
    if config.kernel == "pointer" or not fits_tma:
        return launch_pointer
    return launch_tma if config.kernel == "tma" or inner > FOLD else _warp_specialized()


@functools.cache
def _warp_specialized() -> Callable[..., None]:
    """The launcher written in Gluon, which is experimental: a Triton may come without it or with another one.

    Raises:
        CannotCompile: this one does, or interprets.
    """
    if triton.knobs.runtime.interpret:
        raise CannotCompile("the interpreter does not run Gluon")
    try:
        from .int8_matmul_warp_specialized import launch_warp_specialized
    except (ImportError, AttributeError) as error:
        raise CannotCompile(f"Gluon cannot be used: {error}") from error
    return launch_warp_specialized


def _in_whole_vectors(x: torch.Tensor) -> torch.Tensor:
    """x [rows, inner] in rows of whole vectors that do not overlap: itself, or a copy with zeros behind each row.

    Zeros add nothing. Without them each byte is a load of its own: 16384 × 4095 → 4096 took 3.5 ms and takes 0.5
    (docs/performance.md).
    """
    inner = padded(x.shape[1])
    return x if x.shape[1] == inner and _fits_tma(x) else widened(x, inner)


def _fits_tma(x: torch.Tensor) -> bool:
    """Whether x [rows, cols] can stand behind a TMA descriptor: 16-byte aligned rows that do not overlap."""
    pitch = x.stride(0)
    return x.stride(1) == 1 and pitch >= x.shape[1] and (pitch * x.element_size()) % 16 == 0 and x.data_ptr() % 16 == 0
