"""Without their libraries: what the bridges say, and that importing the package wants none of them."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

import torch_switchback as ts
from testing import convert_all

PEERS = {
    "accelerate": "pip install 'accelerate>=1.10,<2'",
    "lightning": "pip install 'lightning>=2.6,<3'",
    "peft": "pip install 'peft>=0.18,<1'",
    "torchtitan": "pip install 'torchtitan>=0.3,<0.4'",
    "transformers": "pip install 'transformers>=5,<6'",
}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("peer", PEERS)
def test_a_missing_library_is_named_with_its_pip_line(peer, monkeypatch):
    bridge = f"torch_switchback.integrations.{peer}"
    monkeypatch.setitem(sys.modules, peer, None)  # a package that is not there
    monkeypatch.delitem(sys.modules, bridge, raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(bridge)
    first, last = str(raised.value).splitlines()
    assert first.startswith(f"{bridge} needs {peer}>=")
    assert last.strip() == PEERS[peer]


def test_a_failure_inside_the_library_is_not_renamed():
    code = """
import sys, types
peer = types.ModuleType("accelerate")
peer.__getattr__ = lambda name: __import__("nowhere")
sys.modules["accelerate"] = peer
import torch_switchback.integrations.accelerate
"""
    assert python(code).stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'nowhere'"


def test_preparing_a_model_of_another_version_says_that_saving_it_loses_the_int8_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", SimpleNamespace(PreTrainedModel=nn.Sequential))
    monkeypatch.delitem(sys.modules, "torch_switchback.integrations.transformers", raising=False)
    model = convert_all(nn.Sequential(nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match="save_pretrained loses the int8 values .* needs transformers>=5"):
        ts.prepare_for_eval(model)


def test_importing_the_package_imports_no_library():
    done = python(
        f"import sys, torch_switchback; print([name for name in {[*PEERS, 'open_clip']} if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
