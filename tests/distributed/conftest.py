import pytest
import torch.distributed as dist
from dist_utils import World

collect_ignore_glob = [] if dist.is_available() and dist.is_gloo_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def world():
    """From a number of processes to the World that has them."""
    worlds = {}

    def of(size):
        if size not in worlds or not worlds[size].is_alive:
            worlds[size] = World(size)
        return worlds[size]

    yield of
    for each in worlds.values():
        each.stop()
