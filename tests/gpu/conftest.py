import torch


def pytest_ignore_collect(collection_path, config):
    """Ignore what only a GPU can show, unless a run asks for one: ``pytest --device cuda``, for all tests."""
    if config.getoption("--device") == "cpu" or not torch.cuda.is_available():
        return True
    if collection_path.name == "test_sanitizer.py" and not config.getoption("--sanitizer"):
        return True
    return None
