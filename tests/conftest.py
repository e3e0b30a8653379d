import os
import tempfile

import pytest
import torch

# The tests mean the shipped tuning tables, not those of whoever runs them.
_tuned = tempfile.TemporaryDirectory(prefix="torch_switchback_test_")
os.environ["TORCH_SWITCHBACK_CACHE"] = _tuned.name

if torch.version.cuda and not torch.cuda.is_available():  # a CUDA build, whose own functions raise without a driver
    torch._C._cuda_getDevice = lambda: -1
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the tests' tensors live")
    parser.addoption("--sanitizer", action="store_true", help="run the kernels under compute-sanitizer, some minutes")


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session", autouse=True)
def int8_grad_weight_rule():
    """Take ``grad_weight="int8"`` at its word on the tests' small shapes too, and return the rule that would not."""
    from torch_switchback import _grad_weight

    rule = _grad_weight.int8_grad_weight_wins
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_grad_weight, "int8_grad_weight_wins", lambda tokens, in_features, out_features: True)
        yield rule


@pytest.fixture
def int8_grad_weight_where_it_wins(int8_grad_weight_rule, monkeypatch):
    """Leave it to the rule whether ``grad_weight="int8"`` computes in int8."""
    monkeypatch.setattr("torch_switchback._grad_weight.int8_grad_weight_wins", int8_grad_weight_rule)


@pytest.fixture(autouse=True)
def _same_randomness_every_run():
    torch.manual_seed(0)
    torch._dynamo.reset()
