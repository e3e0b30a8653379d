"""Column-wise quantization: the absmax of each column; then quantize and store transposed."""

import torch

from . import _absmax
from ._absmax import plan_columnwise_absmax
from ._transpose import plan_quantize_transpose
from .launch import Plan


def plan_quantize_columnwise_and_transpose(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> Plan:
    if x.numel() <= _absmax.MAX_SMALL:
        transpose = plan_quantize_transpose(x, x, qdata, absmax, None, columnwise=True)

        def run_once(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
            transpose(x, x, qdata, absmax, None)

        return run_once

    find_absmax = plan_columnwise_absmax(x, absmax)
    transpose = plan_quantize_transpose(x, absmax[None], qdata, None, None, columnwise=True)

    def run(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        find_absmax(x, absmax)
        transpose(x, absmax[None], qdata, None, None)

    return run
