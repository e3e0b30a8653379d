"""Inputs and comparisons that the tests of every device share."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

import torch_switchback as ts
from torch_switchback import SwitchBackConfig, SwitchBackLinear, scaling

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


def always_int8(config, layer):
    """Take the place of convert.with_min_tokens: convert small layers too, and for any number of tokens."""
    return config


def pairwise(**axes):
    """Parametrize a test: any two values of two arguments meet in a case, where their product would have many more."""
    axes = {name: list(values) for name, values in axes.items()}
    cases = [tuple(enumerate(case)) for case in itertools.product(*(range(len(axis)) for axis in axes.values()))]
    pairs = {case: set(itertools.combinations(case, 2)) for case in cases}
    chosen, left = [], set().union(*pairs.values())
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & left)))
        left -= pairs[chosen[-1]]
    values = [tuple(axis[index] for axis, (_, index) in zip(axes.values(), case, strict=True)) for case in chosen]
    return pytest.mark.parametrize(tuple(axes), values, ids=_name)


def _name(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None) or str(value)


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
    """Compare with another device's: bit for bit, or of rotated operands that assert_same_within_one_step accepts."""
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
    """Return the ratio in dB over the whole tensor."""
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


def patch_operations(monkeypatch, config, replace):
    """Replace every operation of the scheme that a config asks for."""
    key = config.weight_scaling, config.rotate_features
    for schemes in (scaling._DIRECT, scaling._DISPATCHED):
        operations = {name: replace(operation) for name, operation in vars(schemes[key].ops).items()}
        monkeypatch.setitem(schemes, key, scaling._schemes(SimpleNamespace(**operations))[key])


def planned(make, **options):
    """Return a function that plans an operation for its arguments and outputs, and runs it."""

    def run(*args):
        make(*args, **options)(*args)

    return run


# Layers

STRATEGIES = {
    "global": SwitchBackConfig(),
    "global mem_efficient": SwitchBackConfig(mem_efficient=True),
    "rowwise": SwitchBackConfig("rowwise"),
    "rowwise mem_efficient": SwitchBackConfig("rowwise", mem_efficient=True),
    "int8 grad_weight": SwitchBackConfig(grad_weight="int8"),
    "rowwise int8 grad_weight": SwitchBackConfig("rowwise", grad_weight="int8", rotate_tokens=16),
}
ROTATED_FEATURES = {"rowwise rotated features": SwitchBackConfig("rowwise", rotate_features=16)}
strategies = pytest.mark.parametrize(
    "config", (STRATEGIES | ROTATED_FEATURES).values(), ids=STRATEGIES | ROTATED_FEATURES
)
unrotated = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)  # exact sums
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def make_layer(config, in_features=64, out_features=48, device="cpu", dtype=None, bias=True):
    layer = SwitchBackLinear(in_features, out_features, bias, device, dtype)
    layer.config = config
    return layer


def gradients(layer, x, grad):
    x = x.detach().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad))


def count_weight_quantizations(monkeypatch, config, counts=lambda weight: True):
    """The list to which each way of quantizing a weight adds its name from now on, once per call from outside."""
    calls, inside = [], []

    def counted(name):
        def replace(function):
            def quantize(weight, *rest):
                if counts(weight) and not inside:
                    calls.append(name)
                inside.append(name)
                try:
                    return function(weight, *rest)
                finally:
                    inside.pop()

            return quantize

        return replace

    names = ("quantize_weight", "quantize_weight_with_transpose", "quantize_weight_transpose")
    patch_scheme(monkeypatch, config, **{name: counted(name) for name in names})
    return calls


def revert_copy(layer):
    return ts.revert_switchback(copy.deepcopy(layer))
