import os
import tempfile

import pytest
import torch

# The tests mean the shipped tuning tables, not those of whoever runs them.
_tuned = tempfile.TemporaryDirectory(prefix="torch_switchback_test_")
os.environ["TORCH_SWITCHBACK_CACHE"] = _tuned.name

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Threads of workers that share the cores wait for each other, and take several times as long as fewer.
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the tests' tensors live")
    parser.addoption("--sanitizer", action="store_true", help="run the kernels under compute-sanitizer, some minutes")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":  # hide GPUs, which FSDP2 would take, and gloo does not serve
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if torch.version.cuda and not torch.cuda.is_available():  # a CUDA build, whose own functions then raise
        torch._C._cuda_getDevice = lambda: -1
        torch._C._cuda_getCurrentRawStream = lambda device: 0


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session", autouse=True)
def break_even_rule():
    """Convert the tests' small layers too, always int8, and return the rule that would not."""
    from testing import always_int8
    from torch_switchback import convert

    rule = convert.with_min_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "with_min_tokens", always_int8)
        yield rule


@pytest.fixture
def only_where_it_wins(break_even_rule, monkeypatch):
    """Convert by the rule for an H200: which layers, and from how many tokens on they take int8."""
    monkeypatch.setattr("torch_switchback.convert.with_min_tokens", break_even_rule)
    monkeypatch.setattr("torch_switchback.filters._where", lambda device: "sm_90")


@pytest.fixture(autouse=True)
def _same_randomness_every_run():
    torch.manual_seed(0)
    torch._dynamo.reset()
