"""install_as_bitsandbytes() and its runner, in fresh processes: with bitsandbytes installed, or not."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None

KERNEL_IMPORTS = """
from bitsandbytes.nn import SwitchBackLinear, SwitchBackLinearVectorwise
from bitsandbytes.nn.triton_based_modules import SwitchBackLinearGlobal
from bitsandbytes.triton.dequantize_rowwise import dequantize_rowwise
from bitsandbytes.triton.int8_matmul_mixed_dequantize import int8_matmul_mixed_dequantize
from bitsandbytes.triton.int8_matmul_rowwise_dequantize import int8_matmul_rowwise_dequantize
from bitsandbytes.triton.quantize_columnwise_and_transpose import quantize_columnwise_and_transpose
from bitsandbytes.triton.quantize_global import quantize_global, quantize_global_transpose
from bitsandbytes.triton.quantize_rowwise import quantize_rowwise
import torch_switchback
assert quantize_rowwise is torch_switchback.ops.quantize_rowwise
import bitsandbytes as bnb
assert bnb.nn.triton_based_modules.SwitchBackLinearGlobal is SwitchBackLinearGlobal
"""


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def run(code):
    result = python("-c", textwrap.dedent(code))
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
        before = {name: getattr(bnb.nn, name) for name in dir(bnb.nn)}
        version = bnb.__version__
        torch_switchback.install_as_bitsandbytes()
        assert bnb.__version__ == version
        for name, value in before.items():
            assert getattr(bnb.nn, name) is value, name
        layer = bnb.nn.Linear8bitLt(8, 8)
        assert bnb.nn.SwitchBackLinear is torch_switchback.SwitchBackLinear
    """)


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
