"""Every kernel, as its launcher calls it, compiles for every architecture and fits its shared memory."""

import re

import pytest
import torch

pytest.importorskip("triton")
from ahead_of_time import SHARED_MEMORY, TARGETS, record

from torch_switchback.kernels import (
    _absmax,
    _transpose,
    int8_matmul,
    int8_matmul_pointer,
    int8_matmul_tma,
    int8_matmul_warp_specialized,
    quantize_by_absmax,
    quantize_columnwise,
    quantize_folded_rowwise,
    quantize_global,
    quantize_rotated,
    quantize_rotated_rowwise,
    quantize_rowwise,
    transpose_int8,
)
from torch_switchback.tuning import MatmulConfig, matmul_config, matmul_table
from torch_switchback.tuning._tables import KERNELS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = list(TARGETS)


def compile_all(launches, architecture):
    compiled = [launch.compile(TARGETS[architecture]) for launch in launches]
    assert compiled
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[architecture]
    return compiled


# float32 takes most shared memory. Casts differ between the oldest NVIDIA architecture, which has none of bfloat16, and
# AMD's.
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((architecture, "fp32") for architecture in ARCHITECTURES),
        *((architecture, dtype) for architecture in ("sm_80", "gfx942") for dtype in ("fp16", "bf16")),
    ],
)
def test_quantizers(architecture, dtype):
    launches = []
    for cols in (128, 1280, 16_384, 20_000):
        launches += quantizer_launches(DTYPES[dtype], 2, cols)["quantize_rowwise"]
    for shape in ((256, 128), (512, 256)):  # which take one pass and two
        for each in quantizer_launches(DTYPES[dtype], *shape).values():
            launches += each
    compile_all(launches, architecture)


@pytest.mark.parametrize(
    ("architecture", "dtype", "block"),
    [
        *((architecture, "bf16", 64) for architecture in ARCHITECTURES),
        *((architecture, "fp32", 128) for architecture in ("sm_86", "gfx942")),
    ],
)
def test_rotating_quantizers(architecture, dtype, block):
    x, qdata = torch.empty(65, 256, dtype=DTYPES[dtype]), torch.empty(65, 256, dtype=torch.int8)
    outputs = qdata, torch.empty(65), torch.empty(256, 128, dtype=torch.int8), torch.empty(256)
    launches = record(quantize_rotated.plan_quantize_rowwise_and_rotated_columnwise, x, block, *outputs)
    launches += record(quantize_rotated.plan_requantize_rotated, qdata, torch.empty(65), block, *outputs[2:])
    for cols in (5120, 28_672):  # held in several tiles, and read twice
        launches += rotated_rowwise_launches(65, cols, DTYPES[dtype], block)
    compile_all(launches, architecture)


def rotated_rowwise_launches(rows, cols, dtype, block):
    x, qdata = torch.empty(rows, cols, dtype=dtype), torch.empty(rows, cols, dtype=torch.int8)
    return record(quantize_rotated_rowwise.plan_quantize_rotated_rowwise, x, block, qdata, torch.empty(rows))


@pytest.mark.parametrize("cols", [4096, 5120])
def test_rotation_of_the_features_is_a_product_of_tensor_cores(cols):
    """x is read once, 16 bytes a thread at a time, and so are int8 values stored."""
    (compiled,) = compile_all(rotated_rowwise_launches(65, cols, torch.bfloat16, 64), "sm_90")
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert set(re.findall(r"ld\.global\.\S+", ptx)) == {"ld.global.v4.b32"}
    assert set(re.findall(r"st\.global\.\S+", ptx)) == {
        "st.global.v4.b32",
        "st.global.b32",
    }  # the int8 values, the absmax


@pytest.mark.parametrize("block", [16, 128])
def test_rotation_is_a_product_of_tensor_cores(block):
    """The next tile is copied while the tensor cores work on one; int8 values are stored 16 at a time."""
    x, qdata = torch.empty(256, 256, dtype=torch.bfloat16), torch.empty(256, 256, dtype=torch.int8)
    launches = record(
        quantize_rotated.plan_quantize_rotated_columnwise_and_transpose, x, block, qdata, torch.empty(256)
    )
    for kernel in (compiled := compile_all(launches, "sm_90")):
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "cp.async.cg" in kernel.asm["ptx"]
    assert {store[-7:] for store in re.findall(r"st\.global\.\S+", compiled[1].asm["ptx"])} == {".v4.b32"}


def quantizer_launches(dtype, rows, cols):
    """Return what each quantizer launches."""
    x = torch.empty(rows, cols, dtype=dtype)
    qdata, qdata_t = torch.empty(rows, cols, dtype=torch.int8), torch.empty(cols, rows, dtype=torch.int8)
    absmax_row, absmax_col, absmax = torch.empty(rows), torch.empty(cols), torch.empty(1)
    calls = [
        (quantize_rowwise.plan_quantize_rowwise, x, qdata, absmax_row),
        (quantize_rowwise.plan_dequantize_rowwise, qdata, absmax_row, dtype, x),
        (quantize_global.plan_quantize_global, x, qdata, absmax),
        (quantize_global.plan_quantize_global_transpose, x, qdata_t, absmax),
        (quantize_global.plan_quantize_transpose_by_absmax, x, absmax, qdata_t),
        (quantize_global.plan_quantize_global_with_transpose, x, qdata, qdata_t, absmax),
        (quantize_columnwise.plan_quantize_columnwise_and_transpose, x, qdata_t, absmax_col),
        (quantize_by_absmax.plan_quantize_by_absmax, x, absmax_row, qdata),
        (quantize_folded_rowwise.plan_quantize_folded_rowwise, x, absmax_col, qdata, absmax_row, absmax),
        (transpose_int8.plan_transpose_int8, qdata, qdata_t),
    ]
    return {make.__name__.removeprefix("plan_"): record(make, *args) for make, *args in calls}


def test_launches():
    """Small tensors take one. With a first pass for the absmax it is two, even for both of W and Wᵀ."""
    small, large = (quantizer_launches(torch.bfloat16, rows, 128) for rows in (128, 129))
    assert {len(launches) for launches in small.values()} == {1}
    passes = {name: len(launches) for name, launches in large.items()}
    assert passes == {
        "quantize_rowwise": 1,
        "dequantize_rowwise": 1,
        "quantize_global": 2,
        "quantize_global_transpose": 2,
        "quantize_transpose_by_absmax": 1,
        "quantize_global_with_transpose": 2,
        "quantize_columnwise_and_transpose": 2,
        "quantize_by_absmax": 1,
        "quantize_folded_rowwise": 1,
        "transpose_int8": 1,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_store_whole_vectors(dtype):
    """16 bytes a thread of the int8 values, plain and transposed, which leave a tile along different axes."""
    *_, second_pass = quantizer_launches(DTYPES[dtype], 1024, 1024)["quantize_global_with_transpose"]
    (compiled,) = compile_all([second_pass], "sm_90")
    stores = re.findall(r"st\.global\.\S+", compiled.asm["ptx"])
    stores.remove("st.global.b32")  # the absmax
    assert {store[-7:] for store in stores} == {".v4.b32"}
    assert len(stores) == 2 * 64 * 128 // (16 * 32 * 4)


HOPPER = {
    "pointer": MatmulConfig("pointer", 128, 128, 64, group_m=8, num_stages=3, num_warps=8),
    "tma": MatmulConfig("tma", 128, 128, 128, group_m=8, num_stages=3, num_warps=4, ctas_per_sm=2),
    "warp_specialized": MatmulConfig("warp_specialized", 128, 256, 128, group_m=8, num_stages=4, num_warps=8),
}


def matmul_launches(config, m, n, k, *, bias, out_dtype, per_col=False):
    a, b = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
    return record(
        int8_matmul.plan_int8_matmul,
        a,
        b.t(),
        torch.empty(m),
        torch.empty(n if per_col else 1),
        torch.empty(n, dtype=out_dtype) if bias else None,
        out_dtype,
        torch.empty(m, n, dtype=out_dtype),
        absmax_per_col=per_col,
        config=config,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matmuls_of_the_tuning_table(architecture):
    configs = [config for _, config in matmul_table(architecture)]
    for config in configs:  # float32 takes most shared memory
        compile_all(matmul_launches(config, 256, 256, 256, bias=True, out_dtype=torch.float32), architecture)
    for config in {config.kernel: config for config in configs}.values():
        compile_all(matmul_launches(config, 256, 256, 256, bias=True, out_dtype=torch.bfloat16), architecture)
        # Odd sizes, of which TMA cannot store the output, and an inner dimension that int32 cannot hold.
        compile_all(matmul_launches(config, 17, 83, 257, bias=False, out_dtype=torch.float16), architecture)
        compile_all(matmul_launches(config, 16, 16, 133_152, bias=False, out_dtype=torch.float16), architecture)


@pytest.mark.parametrize("per_col", [False, True], ids=["global", "rowwise"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_products_run_on_int8_wgmma(kernel, per_col):
    config = HOPPER[kernel]
    launches = matmul_launches(config, 256, 256, 256, bias=True, out_dtype=torch.bfloat16, per_col=per_col)
    (compiled,) = compile_all(launches, "sm_90")
    assert ("cp.async.bulk.tensor" in compiled.asm["ptx"]) == config.tma
    assert ("setmaxnreg" in compiled.asm["ptx"]) == (kernel == "warp_specialized")
    assert compiled.metadata.global_scratch_size == 0
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert ".s32.s8.s8" in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", ["pointer", "tma"])
def test_matmuls_that_begin_early_wait_before_they_read(kernel, monkeypatch):
    for module in (int8_matmul_pointer, int8_matmul_tma, quantize_rowwise):
        monkeypatch.setattr(module, "supports_pdl", lambda device: True)
    (product,) = matmul_launches(HOPPER[kernel], 256, 256, 256, bias=True, out_dtype=torch.bfloat16)
    assert product.options["launch_pdl"]
    before, wait, _ = product.compile(TARGETS["sm_90"]).asm["ptx"].partition("griddepcontrol.wait")
    assert wait
    assert not re.search(r"ld\.global|cp\.async", before)
    (quantizer, *_) = quantizer_launches(torch.bfloat16, 64, 1024)["quantize_rowwise"]
    assert "griddepcontrol.launch_dependents" in quantizer.compile(TARGETS["sm_90"]).asm["ptx"]


def test_hopper_sums_that_int32_cannot_hold_run_on_tma_and_do_not_spill():
    for config in (HOPPER["tma"], HOPPER["warp_specialized"]):
        launches = matmul_launches(config, 256, 256, 262_144, bias=True, out_dtype=torch.float32)
        (compiled,) = compile_all(launches, "sm_90")
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
        assert ".s32.s8.s8" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("tokens", "inner", "cols", "kernel"),
    [
        (16384, 4096, 4096, "int8_matmul_warp_specialized_kernel"),
        (16384, 4095, 4096, "int8_matmul_warp_specialized_kernel"),
        (4000, 1000, 4096, "int8_matmul_tma_kernel"),
        (333, 1000, 999, "int8_matmul_kernel"),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
def test_matmuls_read_whole_vectors(layout, tokens, inner, cols, kernel):
    """Operands of another layout or width are copied, and zeros stand behind them."""
    operands = {
        "contiguous": lambda rows: torch.ones(rows, inner, dtype=torch.int8),
        "transposed": lambda rows: torch.ones(inner, rows, dtype=torch.int8).t(),
        "slice": lambda rows: torch.ones(rows, inner + 1, dtype=torch.int8)[:, 1:],
    }[layout]
    a, b, out = operands(tokens), operands(cols), torch.empty(tokens, cols, dtype=torch.bfloat16)
    absmax = torch.empty(tokens)
    (launch,) = record(
        int8_matmul.plan_int8_matmul_mixed_dequantize, a, b.t(), absmax, absmax[:1], None, torch.bfloat16, out
    )
    assert launch.kernel.__name__ == kernel
    padded = -(-inner // 16) * 16
    for given, arg in zip((a, b), launch.args, strict=False):
        read = getattr(arg, "base", arg)
        read = read if given is a else read.t()
        assert read.shape == (given.shape[0], padded) and read.stride() == (padded, 1)
        assert read.data_ptr() % 16 == 0
        assert (read.data_ptr() == given.data_ptr()) == (layout == "contiguous" and inner == padded)
        assert read[:, :inner].min() == 1 and read[:, inner:].count_nonzero() == 0


def odd_step_launches(tokens, in_features, out_features):
    """The launches of a step that take longest to compile: the quantizer that transposes and the two matmuls."""
    weight, qdata_t = torch.empty(out_features, in_features, dtype=torch.bfloat16), (in_features, out_features)
    launches = record(
        quantize_global.plan_quantize_transpose_by_absmax,
        weight,
        torch.empty(1),
        torch.empty(qdata_t, dtype=torch.int8),
    )
    for n, k, bias in ((out_features, in_features, True), (in_features, out_features, False)):
        a, b = torch.empty(tokens, k, dtype=torch.int8), torch.empty(k, n, dtype=torch.int8)
        bias = torch.empty(n, dtype=torch.bfloat16) if bias else None
        out = torch.empty(tokens, n, dtype=torch.bfloat16)
        launches += record(
            int8_matmul.plan_int8_matmul_mixed_dequantize,
            a,
            b,
            torch.empty(tokens),
            torch.empty(1),
            bias,
            out.dtype,
            out,
        )
    return launches


def test_odd_layers_share_their_kernels_and_so_do_forward_and_backward():
    layers = [(333, 1001, 1001), (300, 257, 131), (500, 250, 999)]
    launches = [launch for layer in layers for launch in odd_step_launches(*layer)]
    compiled = {launch.kernel.__name__: (launch.specialization(), launch.options) for launch in launches}
    assert set(compiled) == {"quantize_transpose_kernel", "int8_matmul_kernel"}
    for launch in launches:
        assert (launch.specialization(), launch.options) == compiled[launch.kernel.__name__]


def test_the_global_quantizer_of_an_odd_number_of_elements_is_that_of_others():
    """Whole vectors are read as such whatever is behind them, and nothing is compiled anew."""
    launches = [quantizer_launches(torch.bfloat16, *shape)["quantize_global"] for shape in ((256, 256), (131, 257))]
    for even, odd in zip(*launches, strict=True):
        assert (even.specialization(), even.options) == (odd.specialization(), odd.options)
    pass_1, pass_2 = (kernel.asm["ptx"] for kernel in compile_all(launches[1], "sm_90"))
    assert "ld.global.v4.b32" in pass_1
    assert "ld.global.v4.b32" in pass_2 and "st.global.v4.b32" in pass_2


KERNEL_MODULES = (
    _absmax,
    _transpose,
    int8_matmul_pointer,
    int8_matmul_tma,
    int8_matmul_warp_specialized,
    quantize_by_absmax,
    quantize_columnwise,
    quantize_folded_rowwise,
    quantize_global,
    quantize_rotated,
    quantize_rotated_rowwise,
    quantize_rowwise,
    transpose_int8,
)


def test_constants_come_last():
    """The launcher passes a compiled kernel its arguments and then its constants."""
    kernels = [value for module in KERNEL_MODULES for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) >= 10
    for kernel in kernels:
        is_constant = [parameter.is_constexpr for parameter in kernel.params]
        assert is_constant == sorted(is_constant)


@pytest.mark.parametrize("allowed", [False, True])
def test_no_sum_is_contracted_with_a_product(allowed):
    """A fused multiply-add rounds once where the CPU meaning rounds twice; only the option keeps it away."""
    config = matmul_table("sm_80")[0][1]
    (product,) = matmul_launches(config, 256, 256, 256, bias=True, out_dtype=torch.float32)
    assert product.kwargs["enable_fp_fusion"] is False
    product.kwargs["enable_fp_fusion"] = allowed
    assert ("fma.rn" in product.compile(TARGETS["sm_80"]).asm["ptx"]) == allowed


def step_launches(tokens, in_features=256, out_features=384):
    """The launches of a step that depend on the token count, in bfloat16."""
    x, grad = (torch.empty(tokens, width, dtype=torch.bfloat16) for width in (in_features, out_features))
    x_int8, absmax = torch.empty(tokens, in_features, dtype=torch.int8), torch.empty(tokens)
    config = matmul_config("sm_90", tokens, out_features, in_features)
    return [
        *record(quantize_rowwise.plan_quantize_rowwise, x, x_int8, absmax),
        *record(quantize_rowwise.plan_quantize_rowwise, grad, grad.to(torch.int8), absmax),
        *record(quantize_rowwise.plan_dequantize_rowwise, x_int8, absmax, x.dtype, x),
        *record(
            quantize_folded_rowwise.plan_quantize_folded_rowwise,
            *(grad, torch.empty(out_features), grad.to(torch.int8), absmax, torch.empty(1)),
        ),
        *matmul_launches(config, tokens, out_features, in_features, bias=True, out_dtype=x.dtype),
        *matmul_launches(config, tokens, in_features, out_features, bias=False, out_dtype=x.dtype),
    ]


@pytest.mark.parametrize("octave", [16, 128, 2048])
def test_a_changing_token_count_compiles_once_a_power_of_two(octave):
    counts = [octave + 1, octave + 16, octave + octave // 2, 2 * octave - 1, 2 * octave]
    first, *others = (
        [(launch.kernel, launch.specialization(), launch.options) for launch in step_launches(count)]
        for count in counts
    )
    for other in others:
        assert other == first
