"""Column-wise quantization of what was rotated along the rows: its meaning, its padding, its hostile inputs."""

import pytest
import torch

import torch_switchback as ts
from testing import DTYPES, LAYOUTS, SHAPES, assert_same, assert_same_within_one_step, contiguous
from torch_switchback import ops
from torch_switchback.ops._hadamard import rotate, signs

BLOCKS = [16, 32, 64, 128]
blocks = pytest.mark.parametrize("block", BLOCKS)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def hadamard_matrix(block):
    """Sylvester's, orthogonal, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / block**0.5


def rotation_matrix(block):
    return hadamard_matrix(block) * signs(block, torch.empty(0, dtype=torch.float64))


def padded(x, block):
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % block))


@blocks
def test_rotation_is_signs_and_sylvesters_matrix(block):
    x = torch.randn(3, 2 * block, 5, dtype=torch.float64)
    expected = torch.einsum("ij,abjc->abic", rotation_matrix(block), x.unflatten(1, (2, block))).flatten(1, 2)
    torch.testing.assert_close(rotate(x, block, dim=1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(x.movedim(1, 2), block, dim=2), expected.movedim(1, 2), rtol=0, atol=1e-14)


@blocks
def test_its_transpose_undoes_the_rotation(block):
    integers = torch.randint(-1000, 1000, (4 * block, 7)).double()
    rotated = rotate(integers, block).unflatten(0, (4, block))
    back = (rotation_matrix(block).t() @ rotated).flatten(0, 1)
    torch.testing.assert_close(back, integers, rtol=0, atol=1e-12)
    if block in (16, 64):  # whose square root is a power of two
        assert torch.equal(back, integers)


@blocks
def test_what_a_block_has_in_common_is_spread_over_its_sums(block):
    """Sylvester's matrix alone would gather it in one, sqrt(block) times as large."""
    ones = torch.ones(block, 1, dtype=torch.float64)
    most = 1.0 if block in (16, 64) else 2**0.5
    assert rotate(ones, block).abs().max().item() == pytest.approx(most, rel=1e-12)


@blocks
def test_rotation_leaves_the_product_of_two(block):
    g, x = torch.randn(2 * block, 7, dtype=torch.float64), torch.randn(2 * block, 5, dtype=torch.float64)
    torch.testing.assert_close(rotate(g, block).t() @ rotate(x, block), g.t() @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("block", "shape"), [*((32, shape) for shape in SHAPES[:-1]), (16, (37, 20)), (64, (131, 20)), (128, (131, 20))]
)
@layouts
@dtypes
def test_int8_values_are_those_of_the_rotated_rows(dtype, layout, shape, block, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block)
    expected = rotate(padded(x.float(), block), block)
    expected_qdata, expected_absmax = ts.ops.quantize_rowwise(expected.t())
    assert qdata.shape == (shape[1], -(-shape[0] // block) * block)
    assert_same_within_one_step((qdata, absmax), (expected_qdata, expected_absmax))
    if device == "cpu":
        assert_same(absmax, expected_absmax)
        assert_same(qdata, expected_qdata)


@layouts
@dtypes
def test_together_with_the_row_wise_int8_values(dtype, layout, device, block=64):
    x = layout(131, 257, dtype, device)
    expected = (*ts.ops.quantize_rowwise(x), *ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block))
    for actual, wanted in zip(ops.quantize_rowwise_and_rotated_columnwise(x, block), expected, strict=True):
        assert_same(actual, wanted)


@blocks
@dtypes
def test_a_step_of_the_rotated_absmax_bounds_the_error(dtype, block, device):
    x = contiguous(3 * block - 5, 40, dtype, device)
    qdata, absmax = ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block)
    exact = rotate(padded(x.double(), block), block)
    step = absmax.double() / 127
    assert ((qdata.t().double() * step - exact).abs() <= step / 2 + 1e-5 * exact.abs().amax(0)).all()


@blocks
@pytest.mark.parametrize("values", [[float("nan")], [float("inf")], [float("inf"), float("inf")], [-float("inf")]])
def test_what_is_not_finite_marks_its_column_and_no_other(values, block, device):
    x = torch.randn(2 * block, 5, device=device)
    for row, value in enumerate(values):
        x[row, 3] = value
    for qdata, absmax in (
        ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block),
        ops.quantize_rowwise_and_rotated_columnwise(x, block)[2:],
    ):
        assert absmax.isfinite().tolist() == [True, True, True, False, True]
        assert not qdata[3].any()


@pytest.mark.parametrize("block", [0, 1, 8, 48, 256, -16])
def test_only_blocks_that_there_are(block, device):
    x = torch.randn(64, 4, device=device)
    with pytest.raises(ValueError, match=f"rotate_tokens must be one of 16, 32, 64, 128, got {block}"):
        ts.ops.quantize_columnwise_and_transpose(x, block)


def test_only_float_matrices(device):
    quantizer = ts.ops.quantize_columnwise_and_transpose
    with pytest.raises(ValueError, match=r"x must be 2-D, got \(3, 4, 5\)"):
        quantizer(torch.randn(3, 4, 5, device=device), 64)
    with pytest.raises(TypeError, match=r"x must be float16, bfloat16 or float32, got torch\.float64"):
        quantizer(torch.zeros(3, 4, device=device, dtype=torch.float64), 64)


@pytest.mark.parametrize("block", [16, 128])
@dtypes
def test_opcheck(dtype, block, device):
    for layout in LAYOUTS[:-1]:
        x = layout(17, 83, dtype, device)
        for name in ("quantize_rotated_columnwise_and_transpose", "quantize_rowwise_and_rotated_columnwise"):
            torch.library.opcheck(getattr(torch.ops.torch_switchback, name).default, (x, block))
