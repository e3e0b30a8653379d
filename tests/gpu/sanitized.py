"""Run under compute-sanitizer: every kernel on odd shapes, each operand and output an allocation of its own.

    compute-sanitizer python tests/gpu/sanitized.py --part 0 --of 4
    compute-sanitizer python tests/gpu/sanitized.py --plant out_of_bounds    # must be reported

With PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that what lies behind a tensor is no other tensor.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))

import guard_bands
from testing import DTYPES
from torch_switchback.kernels import _absmax
from torch_switchback.kernels.device import architecture
from torch_switchback.tuning import matmul_table

MATRICES = [
    *((1, 1), (1, 2), (2, 1), (3, 5), (5, 3), (7, 129), (129, 7), (15, 16), (16, 15), (17, 83), (31, 33), (64, 64)),
    *((65, 127), (70, 257), (127, 65), (1, 1100), (3, 1281), (2, 4097), (1, 16_385), (130, 131), (257, 66), (300, 20)),
]
MATMULS = [
    *((1, 1, 1), (1, 16, 16), (3, 5, 7), (17, 83, 31), (33, 48, 80), (64, 130, 64), (65, 129, 257), (129, 8, 144)),
    *((128, 264, 272), (150, 64, 112), (200, 136, 528), (2, 8, 131_104)),
]


class Alone:
    """Operands and outputs as guard_bands wants them, without bands: the allocation ends where the tensor does."""

    def operand(self, tensor):
        return tensor.t().cuda().t() if not tensor.is_contiguous() else tensor.cuda()

    def output(self, like):
        return torch.empty_like(like, device="cuda", memory_format=torch.contiguous_format)

    def assert_intact(self):
        pass


class Written(Alone):
    """Outputs that were written before: initcheck does not see what TMA writes, and calls it uninitialized."""

    def output(self, like):
        return torch.full_like(like, torch.nan, device="cuda", memory_format=torch.contiguous_format)


def cases():
    """Calls, each of one kernel or two: quantizers in one pass and forced to two, matmuls tuned and by force."""
    forced = itertools.cycle(
        {config.kernel: config for _, config in matmul_table(architecture(torch.device("cuda", 0)))}.values()
    )
    for shape, dtype, max_small in zip(
        MATRICES, itertools.cycle(DTYPES), itertools.cycle([_absmax.MAX_SMALL, 0]), strict=False
    ):
        for name in guard_bands.QUANTIZERS:
            yield lambda s=shape, d=dtype, n=name, m=max_small: quantize(n, s, d, m)
        yield lambda s=shape, d=dtype: guard_bands.check_by_absmax(s, d, Alone())
        yield lambda s=shape, d=dtype: guard_bands.check_dequantizer(s, d, Alone())
        yield lambda s=shape, d=dtype: guard_bands.check_prepared_weight(s, d, Alone())
    for shape, dtype in zip(MATMULS, itertools.cycle(DTYPES), strict=False):
        for config in (None, next(forced)):
            yield lambda s=shape, d=dtype, c=config: guard_bands.check_matmul(c, s, d, Written())


def quantize(name, shape, dtype, max_small):
    _absmax.MAX_SMALL = max_small
    guard_bands.check_quantizer(name, shape, dtype, Alone())


# Planted faults


@triton.jit
def copy_kernel(x_ptr, out_ptr, count: tl.constexpr):
    offset = tl.arange(0, count)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset) + 1)


RACE = """
extern "C" __global__ void race(int* out) {
    __shared__ int shared[2];
    shared[threadIdx.x & 1] = threadIdx.x;
    out[threadIdx.x] = shared[1 - (threadIdx.x & 1)];
}"""


def out_of_bounds():
    copy_kernel[(1,)](torch.zeros(1024, device="cuda"), torch.empty(1000, device="cuda"), 1024)


def uninitialized():
    copy_kernel[(1,)](torch.empty(1024, device="cuda"), torch.empty(1024, device="cuda"), 1024)


def race():
    kernel = torch.cuda._compile_kernel(RACE, "race")
    kernel(grid=(1, 1, 1), block=(128, 1, 1), args=(torch.zeros(128, dtype=torch.int32, device="cuda"),))


PLANTED = {"out_of_bounds": out_of_bounds, "uninitialized": uninitialized, "race": race}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--plant", choices=PLANTED)
    flags = parser.parse_args()
    torch.manual_seed(0)
    if flags.plant:
        PLANTED[flags.plant]()
    else:
        calls = list(cases())[flags.part :: flags.of]
        for call in calls:
            call()
        print(f"{len(calls)} calls are right")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
