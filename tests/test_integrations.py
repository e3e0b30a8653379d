"""Without their libraries: what the bridges say, and that importing the package wants none of them."""

import importlib
import subprocess
import sys

import pytest

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


def test_importing_the_package_imports_no_library():
    done = python(
        f"import sys, torch_switchback; print([name for name in {[*PEERS, 'open_clip']} if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
