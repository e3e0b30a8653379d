import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

SITE = Path(__file__).parent / "site"

# A script's directory is on sys.path when it runs, so the examples import each other by bare names.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported; no test may depend on a download
_spec = importlib.util.spec_from_file_location("torchvision_beside_cpu_torch", SITE / "sitecustomize.py")
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


@pytest.fixture(autouse=True)
def _own_environment():
    """Undo what a library sets: PEFT's BOFT leaves CXX=gcc, by which Inductor's libraries miss libstdc++."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _small_processes(monkeypatch):
    """Tensors this small lose more to a second thread than it computes; and what tests start is as this process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
