"""install_as_bitsandbytes() and its runner, in fresh processes, with bitsandbytes installed or not; and its layer and
functions themselves."""

import copy
import importlib.util
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import torch_switchback as ts
from torch_switchback.integrations.bitsandbytes import conventions

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None

KERNEL_IMPORTS = """
from bitsandbytes.nn import StandardLinear, SwitchBackLinear, SwitchBackLinearGlobal, SwitchBackLinearVectorwise
from bitsandbytes.nn.triton_based_modules import (
    SwitchBackLinearGlobal, SwitchBackLinearGlobalMemEfficient, SwitchBackLinearVectorwise,
    StandardLinear, StandardLinearFunction, dequantize_rowwise, int8_matmul_mixed_dequanitze,
    int8_matmul_mixed_dequantize, int8_matmul_rowwise_dequantize, is_triton_available,
    quantize_columnwise_and_transpose, quantize_global, quantize_global_transpose, quantize_rowwise,
)
from bitsandbytes.triton.dequantize_rowwise import dequantize_rowwise
from bitsandbytes.triton.int8_matmul_mixed_dequanitze import int8_matmul_mixed_dequanitze
from bitsandbytes.triton.int8_matmul_mixed_dequantize import int8_matmul_mixed_dequantize
from bitsandbytes.triton.int8_matmul_rowwise_dequantize import int8_matmul_rowwise_dequantize
from bitsandbytes.triton.quantize_columnwise_and_transpose import quantize_columnwise_and_transpose
from bitsandbytes.triton.quantize_global import quantize_global, quantize_global_transpose
from bitsandbytes.triton.quantize_rowwise import quantize_rowwise
from bitsandbytes.triton.triton_utils import is_triton_available
import torch_switchback
assert quantize_rowwise is torch_switchback.ops.quantize_rowwise
import bitsandbytes as bnb
assert bnb.nn.triton_based_modules.SwitchBackLinearGlobal is SwitchBackLinearGlobal
"""


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def run(code, cwd=None):
    result = python("-c", textwrap.dedent(code), cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_name_that_was_there():
    run("import torch_switchback as ts; ts.install_as_bitsandbytes(); ts.install_as_bitsandbytes()\n" + KERNEL_IMPORTS)


def test_importing_torch_switchback_installs_nothing():
    run("""
        import sys, torch_switchback
        assert "bitsandbytes" not in sys.modules
        assert "triton" not in sys.modules
    """)


@pytest.mark.skipif(not INSTALLED, reason="needs bitsandbytes; the other half of make test has it")
def test_the_real_library_keeps_its_other_parts():
    run("""
        import bitsandbytes as bnb, torch, torch_switchback
        from torch_switchback.integrations.bitsandbytes import conventions
        before = {name: getattr(bnb.nn, name) for name in dir(bnb.nn) if name not in conventions.__all__}
        version = bnb.__version__
        torch_switchback.install_as_bitsandbytes()
        assert bnb.__version__ == version
        for name, value in before.items():
            assert getattr(bnb.nn, name) is value, name
        layer = bnb.nn.Linear8bitLt(8, 8)
        assert issubclass(bnb.nn.SwitchBackLinear, torch_switchback.SwitchBackLinear)
    """)


# Of bitsandbytes 0.41 to 0.49, what matters here. Up to 0.45 its kernels may import what Triton no longer has.
OLD = {
    "__init__.py": "from . import nn; KEPT = 1",
    "nn/__init__.py": "from .modules import KEPT; from .triton_based_modules import SwitchBackLinear, StandardLinear",
    "nn/modules.py": "KEPT = 1",
    "nn/triton_based_modules.py": "from bitsandbytes.triton.quantize_rowwise import quantize_rowwise\n"
    "SwitchBackLinear = StandardLinear = KEPT = 1",
    "triton/__init__.py": "",
    "triton/quantize_rowwise.py": "quantize_rowwise = KEPT = 1",
    "triton/matmul_perf_model.py": "KEPT = 1",
}


@pytest.fixture
def old_bitsandbytes(tmp_path):
    for name, text in OLD.items():
        path = tmp_path / "bitsandbytes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


KEPT = """
import bitsandbytes.triton.matmul_perf_model
assert bitsandbytes.KEPT == bitsandbytes.nn.KEPT == bitsandbytes.triton.matmul_perf_model.KEPT == 1
"""


def test_an_old_bitsandbytes_whose_kernels_no_longer_import(old_bitsandbytes):
    kernel = old_bitsandbytes / "bitsandbytes" / "triton" / "quantize_rowwise.py"
    kernel.write_text("raise ModuleNotFoundError('triton.ops')")
    code = "import torch_switchback as ts; ts.install_as_bitsandbytes(); ts.install_as_bitsandbytes()\n"
    run(code + KERNEL_IMPORTS + KEPT, cwd=old_bitsandbytes)


def test_what_an_old_bitsandbytes_had_when_it_was_imported_stays(old_bitsandbytes):
    code = "import bitsandbytes, torch_switchback as ts; ts.install_as_bitsandbytes()\n"
    modules = "assert bitsandbytes.nn.triton_based_modules.KEPT == bitsandbytes.triton.quantize_rowwise.KEPT == 1"
    run(code + KERNEL_IMPORTS + KEPT + modules, cwd=old_bitsandbytes)


@pytest.mark.skipif(INSTALLED, reason="needs an environment without bitsandbytes; the other half of make test is one")
def test_without_the_library_nothing_else_is_pretended():
    run("""
        import importlib.util, torch_switchback
        torch_switchback.install_as_bitsandbytes()
        import bitsandbytes
        assert importlib.util.find_spec("bitsandbytes") is not None  # does not raise on a module without a spec
        try:
            from bitsandbytes.optim import Adam8bit
        except ImportError:
            pass
        else:
            raise AssertionError
    """)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import sys, helper\nfrom bitsandbytes.nn import SwitchBackLinear\n"
        "if __name__ == '__main__':\n    print(SwitchBackLinear(4, 2), sys.argv[1:], helper.NAME)\n"
    )
    (tmp_path / "helper.py").write_text("NAME = 'beside it'\n")
    return path


RUNNER = "torch_switchback.integrations.bitsandbytes"
EXPECTED = "SwitchBackLinear(in_features=4, out_features=2, bias=True, strategy=global) ['--flag', '-m'] beside it\n"


def test_runs_an_unmodified_script(program):
    result = python("-m", RUNNER, str(program), "--flag", "-m")
    assert result.stdout == EXPECTED, result.stderr


def test_runs_an_unmodified_module(program):
    result = python("-m", RUNNER, "-m", "program", "--flag", "-m", cwd=program.parent)
    assert result.stdout == EXPECTED, result.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"]], ids=str)
def test_says_how_to_call_it(arguments):
    result = python("-m", RUNNER, *arguments)
    assert result.returncode == 1
    assert "usage:" in result.stderr
    assert "-m some.module args" in result.stderr


# bitsandbytes' calling conventions.

GENERATOR = torch.Generator().manual_seed(0)
X, W = (torch.randn(rows, 16, generator=GENERATOR) for rows in (6, 8))
X_INT8, X_ABSMAX = ts.ops.quantize_rowwise(X)
W_INT8, W_ABSMAX = ts.ops.quantize_global(W)
_, W_ABSMAXES = ts.ops.quantize_rowwise(W)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape_x", [(6,), (6, 1)])
@pytest.mark.parametrize("shape_w", [(), (1,), (1, 1)])
def test_states_of_any_dtype_and_shape(dtype, shape_x, shape_w):
    state_x, state_w = X_ABSMAX.to(dtype), W_ABSMAX.to(dtype)
    for product in (conventions.int8_matmul_mixed_dequantize, conventions.int8_matmul_mixed_dequanitze):
        actual = product(X_INT8, W_INT8.t(), state_x.reshape(shape_x), state_w.reshape(shape_w), None)
        expected = ts.ops.int8_matmul_mixed_dequantize(X_INT8, W_INT8.t(), state_x.float(), state_w.float())
        assert torch.equal(actual, expected)
    states_w = W_ABSMAXES.to(dtype)
    actual = conventions.int8_matmul_rowwise_dequantize(
        X_INT8, W_INT8.t(), state_x.reshape(shape_x), states_w.reshape(*states_w.shape, *shape_w), None
    )
    expected = ts.ops.int8_matmul_rowwise_dequantize(X_INT8, W_INT8.t(), state_x.float(), states_w.float())
    assert torch.equal(actual, expected)
    actual = conventions.dequantize_rowwise(X_INT8, state_x=state_x.reshape(shape_x))
    assert torch.equal(actual, ts.ops.dequantize_rowwise(X_INT8, state_x.float()))


def test_the_mixed_matmul_reads_the_first_state_of_the_weight():
    actual = conventions.int8_matmul_mixed_dequantize(X_INT8, W_INT8.t(), X_ABSMAX, W_ABSMAXES, None)
    expected = ts.ops.int8_matmul_mixed_dequantize(X_INT8, W_INT8.t(), X_ABSMAX, W_ABSMAXES[:1])
    assert torch.equal(actual, expected)


def test_too_short_a_state_warns_and_gives_nan_for_what_it_lacks():
    """bitsandbytes' benchmark (benchmarking/switchback) passes a state per column of w where the kernel wants rows."""
    with pytest.warns(UserWarning, match="int8_matmul_rowwise_dequantize: state_w has 5 values for 8"):
        actual = conventions.int8_matmul_rowwise_dequantize(X_INT8, W_INT8.t(), X_ABSMAX, W_ABSMAXES[:5], None)
    expected = ts.ops.int8_matmul_rowwise_dequantize(X_INT8, W_INT8.t(), X_ABSMAX, W_ABSMAXES)
    assert torch.equal(actual[:, :5], expected[:, :5])
    assert actual[:, 5:].isnan().all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_layer_takes_x_and_says_how_it_was_made(rowwise):
    layer = conventions.SwitchBackLinear(16, 8, vector_wise_quantization=rowwise)
    assert layer.vector_wise_quantization is rowwise
    expected = ts.switchback_linear(X, layer.weight, layer.bias, config=layer.config)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.compile(layer, backend="eager")):
        assert torch.equal(each(x=X), expected)
        assert torch.equal(each(X), expected)
    assert type(ts.revert_switchback(layer)) is torch.nn.Linear


def test_standard_linear():
    layer = conventions.StandardLinear(16, 8)
    expected = torch.nn.functional.linear(X, layer.weight, layer.bias)
    assert torch.equal(layer(x=X), expected)
    assert torch.equal(conventions.StandardLinearFunction.apply(X, layer.weight, layer.bias), expected)
