import torch


def pytest_ignore_collect(collection_path, config):
    """Collect what only a GPU can show. The tests beside this folder run there too: ``pytest --device cuda``."""
    if config.getoption("--device") == "cpu" or not torch.cuda.is_available():
        return True
    if collection_path.name == "test_sanitizer.py" and not config.getoption("--sanitizer"):
        return True
    return None
