"""Kernels on operands between bands of NaN and outputs between canaries: who reads or writes beyond one is seen."""

import importlib
import pkgutil

import torch

from testing import assert_same, assert_same_within_one_step, planned, random_int8
from torch_switchback import kernels, ops
from torch_switchback.kernels import int8_matmul

BAND = 4096  # bytes, as whole blocks of a kernel's columns
NAN = 0xFF  # a byte: of NaN in every float, -1 as a code
SHAPES = [(1, 1), (3, 5), (17, 83), (33, 48), (64, 130), (2, 1100)]
QUANTIZERS = {
    "quantize_rowwise": (),
    "quantize_global": (),
    "quantize_global_transpose": (),
    "quantize_global_with_transpose": (),
    "quantize_columnwise_and_transpose": (),
    "quantize_rowwise_and_rotated_columnwise": (16,),
    "quantize_rotated_columnwise_and_transpose": (32,),
    "quantize_rotated_rowwise": (16,),
}
MATMULS = [(1, 1, 1), (17, 83, 5), (33, 48, 80), (33, 48, 83), (70, 65, 129), (150, 64, 112)]


class Band:
    """Tensors in a device's memory, each by itself between two bands of bytes."""

    def __init__(self, device, shift):
        self.device, self.shift = device, shift  # shift: elements off an alignment of 16 bytes
        self.outputs = []

    def _between(self, shape, dtype, byte):
        size = torch.Size(shape).numel() * dtype.itemsize
        start = BAND + self.shift * dtype.itemsize
        buffer = torch.full((start + size + BAND,), byte, dtype=torch.uint8, device=self.device)
        return buffer, start, buffer[start : start + size].view(dtype).view(shape)

    def operand(self, tensor):
        """A copy of a tensor, contiguous in the bands, with its strides' order."""
        is_transposed = tensor.dim() == 2 and not tensor.is_contiguous()
        tensor = tensor.t() if is_transposed else tensor
        _, _, view = self._between(tensor.shape, tensor.dtype, NAN)
        view.copy_(tensor)
        return view.t() if is_transposed else view

    def output(self, like):
        buffer, start, view = self._between(like.shape, like.dtype, 99)
        self.outputs.append((buffer, start, view.nbytes))
        return view

    def assert_intact(self):
        for buffer, start, size in self.outputs:
            assert (buffer[:start] == 99).all()
            assert (buffer[start + size :] == 99).all()


def launcher_of(name):
    modules = (module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.name.startswith("_"))
    for module in modules:
        if module != "int8_matmul_warp_specialized":
            make = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), f"plan_{name}", None)
            if make is not None:
                return planned(make)
    raise LookupError(name)


def check(launcher, args, expected, band, *, rotates=False):
    """Check that a launcher, given args and then its outputs, writes what is expected there and nothing elsewhere.

    rotates: the last two outputs are int8 values and absmax of rotated columns or rows.
    """
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [band.output(each) for each in expected]
    launcher(*(band.operand(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), *outputs)
    exact = len(outputs) - 2 if rotates else len(outputs)
    for actual, wanted in zip(outputs[:exact], expected[:exact], strict=True):
        assert_same(actual, wanted)
    if rotates:
        assert_same_within_one_step(outputs[exact:], expected[exact:])
    band.assert_intact()


def check_quantizer(name, shape, dtype, band):
    x = torch.randn(shape).to(dtype)
    for operand in (x, x.t().contiguous().t()):
        meaning = getattr(torch.ops.torch_switchback, name)
        args = (operand, *QUANTIZERS[name])
        check(launcher_of(name), args, meaning(*args), band, rotates="rotated" in name)


def check_by_absmax(shape, dtype, band):
    x = torch.randn(shape).to(dtype)
    for absmax in (ops.quantize_rowwise(x)[1], ops.quantize_global(x)[1]):
        check(launcher_of("quantize_by_absmax"), (x, absmax), ops.quantize_by_absmax(x, absmax), band)
    check(launcher_of("quantize_transpose_by_absmax"), (x, absmax), ops.quantize_transpose_by_absmax(x, absmax), band)


def check_dequantizer(shape, dtype, band):
    x, absmax = random_int8(*shape), torch.rand(shape[0])
    expected = ops.dequantize_rowwise(x, absmax, dtype)
    check(launcher_of("dequantize_rowwise"), (x, absmax, dtype), expected, band)


def check_prepared_weight(shape, dtype, band):
    rows, cols = shape[0], -(-shape[1] // 16) * 16
    x, grad, absmax = random_int8(rows, cols), torch.randn(shape[1], rows).to(dtype), torch.rand(rows)
    calls = {"transpose_int8": (x,), "quantize_folded_rowwise": (grad, absmax)}
    # Exact in bfloat16, to which the interpreter does not round as GPUs do.
    calls["requantize_rotated"] = x.remainder(3), torch.full((rows,), 127.0), 16
    for name, args in calls.items():
        expected = getattr(torch.ops.torch_switchback, name)(*args)
        check(launcher_of(name), args, expected, band, rotates="rotated" in name)


def check_matmul(config, shape, dtype, band):
    m, n, k = shape
    for absmaxes, op in ((1, ops.int8_matmul_mixed_dequantize), (n, ops.int8_matmul_rowwise_dequantize)):
        for bias in (None, torch.randn(n)):
            args = random_int8(m, k), random_int8(n, k).t(), torch.rand(m), torch.rand(absmaxes), bias, dtype
            launcher = planned(int8_matmul.plan_int8_matmul, absmax_per_col=absmaxes > 1 or n == 1, config=config)
            check(launcher, args, op(*args), band)
