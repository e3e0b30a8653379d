import torch

# What only a GPU can show. The tests beside this folder run there too: ``pytest --device cuda``.
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_ignore_collect(collection_path, config):
    if collection_path.name == "test_sanitizer.py" and not config.getoption("--sanitizer"):
        return True
    return None
