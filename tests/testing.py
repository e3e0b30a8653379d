"""Inputs and comparisons that the tests of every device share."""

import torch

import torch_switchback as ts
from torch_switchback import scaling

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

# Ones, primes, a ragged tail on each side of a block, no rows, no columns, a row longer than any block.
SHAPES = [(1, 1), (3, 5), (17, 83), (131, 257), (0, 4), (4, 0), (2, 20_011)]


def contiguous(rows, cols, dtype, device="cpu"):
    return torch.randn(rows, cols, device=device).to(dtype)


def transposed(rows, cols, dtype, device="cpu"):
    return contiguous(cols, rows, dtype, device).t()


def sliced(rows, cols, dtype, device="cpu"):
    """Every other column of the middle of a larger tensor: an offset and no unit stride."""
    return contiguous(rows + 2, 2 * cols + 3, dtype, device)[1 : rows + 1, 3 : 2 * cols + 3 : 2]


def expanded(rows, cols, dtype, device="cpu"):
    """Strides 0, as y.sum().backward() sends them."""
    return contiguous(1, 1, dtype, device).expand(rows, cols)


def hostile(rows, cols, dtype, device="cpu"):
    """A row of zeros, a NaN, an Inf, a row too small to quantize, a row near the top of the range."""
    x = contiguous(rows, cols, dtype, device)
    for row, value in ((0, 0.0), (-1, torch.finfo(dtype).tiny), (1, torch.finfo(dtype).max)):
        if -rows <= row < rows:
            x[row] = value
    if rows > 4 and cols:
        x[2, cols // 2] = float("nan")
        x[3, 0] = -float("inf")
    return x


LAYOUTS = [contiguous, transposed, sliced, expanded, hostile]


def assert_same(actual, expected):
    """Equal bit for bit, save that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(0.0), expected.nan_to_num(0.0)
    assert torch.equal(actual, expected)


def assert_same_within_one_step(actual, expected):
    """Int8 values and absmax of quantized sums in another order: of 10,000 int8 values, ten may be one apart."""
    (qdata, absmax), (expected_qdata, expected_absmax) = ([each.cpu() for each in pair] for pair in (actual, expected))
    assert qdata.is_contiguous()
    assert torch.equal(absmax.isfinite(), expected_absmax.isfinite())
    # Below 2**-121 int8 values are 0 whatever the absmax, and halves of float32's smallest are flushed.
    absmaxes = (each.nan_to_num(0.0, 0.0) for each in (absmax, expected_absmax))
    torch.testing.assert_close(*absmaxes, rtol=1e-5, atol=2.0**-121)
    apart = (qdata.int() - expected_qdata.int()).abs()
    assert apart.amax() <= 1 if apart.numel() else True
    assert apart.sum() <= max(1, 1e-3 * apart.numel())


def assert_same_int8_grad_weight(actual, expected, x, grad, config):
    """As another device computes it: bit for bit, or of rotated operands that assert_same_to_a_code would accept."""
    if config.rotate_tokens is None:
        assert_same(actual, expected)
        return
    assert actual.dtype == expected.dtype
    actual, limits = actual.detach().cpu().double(), torch.finfo(expected.dtype)
    absmax, x_absmax = (
        ts.ops.quantize_columnwise_and_transpose(each.cpu(), rotate_tokens=config.rotate_tokens)[1]
        for each in (grad, x)
    )
    qdata_apart = 2 + 2e-3 * len(x)  # each of them with a code of at most 127
    bound = qdata_apart / 127 * absmax.double()[:, None] * x_absmax.double()
    bound += (4e-5 + 2 * limits.eps) * expected.double().abs() + 2 * limits.smallest_normal
    assert not actual[~expected.isfinite()].isfinite().any()
    in_range = expected.isfinite() & (expected.double().abs() + bound < limits.max)
    assert ((actual - expected.double()).abs() <= bound)[in_range].all()


def convert_all(model, config=None):
    """Toy layers too, which the default filter leaves alone."""
    return ts.convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: True)


def random_int8(rows, cols, device="cpu"):
    return torch.randint(-127, 128, (rows, cols), device=device, dtype=torch.int8)


def signal_to_noise(actual, reference):
    """In dB over the whole tensor."""
    reference = reference.double()
    noise = (actual.double() - reference).norm()
    return (20 * torch.log10(reference.norm() / noise)).item()


def patch_scheme(monkeypatch, config, **functions):
    """Give the scheme that a config asks for other functions, whether or not it skips PyTorch's dispatcher.

    functions: by name of an attribute, what takes the attribute and returns its replacement.
    """
    for schemes in (scaling._DIRECT, scaling._DISPATCHED):
        scheme = schemes[config.weight_scaling, config.rotate_features]
        for name, replace in functions.items():
            monkeypatch.setattr(scheme, name, replace(getattr(scheme, name)))


def planned(make, **options):
    """Return a function that plans an operation for its arguments and outputs, and runs it."""

    def run(*args):
        make(*args, **options)(*args)

    return run
