"""Count how often Triton compiles: nothing is tried out at a first call, and a changing token count changes little."""

import importlib
import pkgutil

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from testing import STRATEGIES, gradients, make_layer
from torch_switchback import kernels
from torch_switchback.kernels import launch

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
]
strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of the kernels that Triton has compiled since, starting with nothing compiled in this process."""
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
    launch.plans.clear()
    names: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: names.append(fn.name))
    return names


def step(layer, tokens):
    x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
    gradients(layer, x, torch.randn(tokens, layer.out_features, device="cuda", dtype=torch.bfloat16))


@strategies
def test_a_changing_token_count_compiles_at_most_once_a_power_of_two(config, compiled):
    layer = make_layer(config, 512, 768, "cuda", torch.bfloat16)
    for octave in (16, 256, 512, 1024, 4096):
        step(layer, 2 * octave)
        before = list(compiled)
        for tokens in (octave + 1, octave + 16, octave + octave // 2, 2 * octave - 1):
            step(layer, tokens)
        assert compiled == before
    assert compiled


@strategies
@pytest.mark.parametrize("shape", [(2048, 512, 768), (333, 1000, 1000), (77, 257, 131)], ids=str)
def test_a_second_step_compiles_nothing(config, shape, compiled):
    tokens, in_features, out_features = shape
    layer = make_layer(config, in_features, out_features, "cuda", torch.bfloat16)
    step(layer, tokens)
    assert compiled
    compiled.clear()
    step(layer, tokens)
    assert not compiled
