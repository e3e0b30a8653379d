import functools
import os
import tempfile

import pytest
import torch

from promises import PROMISES

# The tests mean the shipped tuning tables, not those of whoever runs them.
_tuned = tempfile.TemporaryDirectory(prefix="torch_switchback_test_")
os.environ["TORCH_SWITCHBACK_CACHE"] = _tuned.name


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the tests' tensors live")
    parser.addoption("--sanitizer", action="store_true", help="run the kernels under compute-sanitizer, some minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Each test's report says which promises it shows. On a GPU, a test that does not use it shows none."""
    known = {promise.name for promises in PROMISES.values() for promise in promises}
    for item in items:
        names = [name for mark in item.iter_markers("promise") for name in mark.args]
        if not known.issuperset(names):
            raise pytest.UsageError(f"{item.nodeid}: promises.py has no {set(names) - known}")
        if config.getoption("--device") == "cpu" or "device" in item.fixturenames or "gpu" in item.path.parts:
            item.user_properties += [("promise", name) for name in names]
            item.add_marker("takes_device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A property's report says on how many examples it ran."""
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None:
        return (yield)
    inner_test, examples = handle.inner_test, 0

    def counted(*args, **kwargs):
        nonlocal examples
        examples += 1
        return inner_test(*args, **kwargs)

    handle.inner_test = functools.wraps(inner_test)(counted)
    try:
        return (yield)
    finally:
        handle.inner_test = inner_test
        item.user_properties.append(("examples", examples))


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def unrehearsed(monkeypatch):
    """Functions are not called to compile their kernels: a test counts calls."""
    from torch_switchback.kernels import _replay

    monkeypatch.setattr(_replay, "rehearse", lambda function, args: None)


@pytest.fixture(autouse=True)
def _same_randomness_every_run():
    torch.manual_seed(0)
    torch._dynamo.reset()
