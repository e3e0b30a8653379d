"""torch.compile(fullgraph=True) and torch.export give what eager gives."""

import io

import pytest
import torch
from torch import nn

import torch_switchback as ts
from testing import ROTATED_FEATURES, STRATEGIES, convert_all, hostile, strategies
from torch_switchback.analysis.layer_steps import saved_bytes
from torch_switchback.functional import DYNAMO_KNOWS_EXPORTS

backends = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


def make_model(config, device):
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    return convert_all(model, config).to(device)


def step(model, compiled, x):
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = compiled(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("backend", "strategy"),
    [
        *(("aot_eager", strategy) for strategy in STRATEGIES | ROTATED_FEATURES),
        *(("inductor", strategy) for strategy in ("global mem_efficient", "rowwise int8 grad_weight")),
    ],
)
def test_small_model(backend, strategy, device):
    model = make_model((STRATEGIES | ROTATED_FEATURES)[strategy], device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(5, 7, 64, device=device)
    for actual, expected in zip(step(model, compiled, x), step(model, model, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@strategies
@backends
def test_one_layer_is_the_same_bit_for_bit(backend, config, device):
    layer = ts.convert_to_switchback(nn.Linear(64, 96), config=config).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(33, 64, device=device)
    for actual, expected in zip(step(layer, compiled, x)[:2], step(layer, layer, x)[:2], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("weight_scaling", ["global", "rowwise"])
@backends
def test_memory_efficient_gradients_of_hostile_data_are_those_of_eager(backend, weight_scaling, device):
    config = ts.SwitchBackConfig(weight_scaling, mem_efficient=True)
    layer = ts.convert_to_switchback(nn.Linear(64, 96), config=config).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for x in (torch.randn(33, 64, device=device), hostile(33, 64, torch.float32, device)):
        for actual, expected in zip(step(layer, compiled, x), step(layer, layer, x), strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-7)


# The first has the compiler's default partition and no code generation.
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("weight_scaling", ["global", "rowwise"])
def test_memory_efficient_layers_keep_no_int8_values_of_what_is_computed_again(weight_scaling, backend, device):
    tokens, width, hidden = 256, 64, 192
    layers = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
    model = convert_all(nn.Sequential(*layers), ts.SwitchBackConfig(weight_scaling, mem_efficient=True))
    model = model.to(device, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    inputs = 2 * (width + hidden)  # of LayerNorm and of GELU
    statistics = 4 * 4  # mean, deviation and two absmaxes
    assert saved_bytes(model, lambda: compiled(x)) <= tokens * (inputs + statistics) + 1024


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_memory_efficient_layers_keep_the_int8_values_of_what_nothing_else_keeps(backend, device):
    tokens, width, hidden = 256, 64, 192
    layers = nn.Linear(width, hidden), nn.Linear(hidden, width)
    model = convert_all(nn.Sequential(*layers), ts.SwitchBackConfig(mem_efficient=True)).to(device, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    qdata_and_absmaxes = tokens * (width + hidden + 2 * 4)
    assert saved_bytes(model, lambda: compiled(x)) <= qdata_and_absmaxes + 1024


@backends
def test_autocast(backend, device):
    model = make_model(ts.SwitchBackConfig(), device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(33, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        actual, expected = compiled(x), model(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@backends
def test_prepared(backend, device):
    model = make_model(ts.SwitchBackConfig("rowwise"), device)
    for module in (model[1], model[3]):
        module.prepare_for_eval()
    x = torch.randn(33, 64, device=device)
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grad_weight", ["high_precision", "int8"])
def test_a_changing_batch_recompiles_at_most_twice(grad_weight, device):
    model = make_model(ts.SwitchBackConfig(grad_weight=grad_weight), device)
    compiles = []

    def backend(graph, inputs):
        compiles.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in range(3, 23):
        compiled(torch.randn(batch, 64, device=device))
    assert len(compiles) <= 3


@pytest.mark.parametrize(
    ("autocast", "strategy"),
    [*((False, strategy) for strategy in STRATEGIES | ROTATED_FEATURES), (True, "global mem_efficient")],
)
def test_symbolic_shapes_from_the_first_call(autocast, strategy, device):
    """dynamic=True also makes symbols of a module's floats, which an autograd Function cannot take."""
    model = make_model((STRATEGIES | ROTATED_FEATURES)[strategy], device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        x = torch.randn(batch, 64, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            for actual, expected in zip(step(model, compiled, x), step(model, model, x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=2e-2 if autocast else 1e-3, atol=1e-3)


def test_export_with_a_dynamic_batch(device):
    model = make_model(ts.SwitchBackConfig(), device).eval()
    batch = torch.export.Dim("batch", min=2)
    x = torch.randn(8, 64, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for size in (2, 8, 31):
        x = torch.randn(size, 64, device=device)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-6)


@strategies
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_trains(config, strict, device):
    if strict and not DYNAMO_KNOWS_EXPORTS:
        pytest.skip("strict exports cannot be told from torch.compile")
    model, x = make_model(config, device), torch.randn(8, 64, device=device)
    program = torch.export.export(model, (x,), strict=strict)
    exported = program.module()
    model(x).square().sum().backward()
    for module in (exported, torch.compile(exported, backend="aot_eager")):
        exported.zero_grad()
        module(x).square().sum().backward()
        for parameter, expected in zip(exported.parameters(), model.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad)


@strategies
def test_a_decomposed_program_trains(config, device):
    model, x = make_model(config, device), torch.randn(8, 64, device=device)
    decomposed = torch.export.export(model, (x,)).run_decompositions().module()
    model(x).square().sum().backward()
    decomposed(x).square().sum().backward()
    for parameter, expected in zip(decomposed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_an_exported_program_runs_under_autocast(device):
    layer = convert_all(nn.Linear(64, 32)).to(device)
    x = torch.randn(8, 64, device=device)
    exported = torch.export.export(layer, (x,)).module()
    with torch.autocast(device, torch.bfloat16):
        assert exported(x).dtype == torch.bfloat16
        assert torch.equal(exported(x), layer(x))


def test_transforms_of_an_exported_program_are_refused_by_name(device):
    x = torch.randn(8, 64, device=device)
    exported = torch.export.export(convert_all(nn.Linear(64, 32)).to(device), (x,)).module()
    with pytest.raises(NotImplementedError, match="revert_switchback"):
        torch.func.grad(lambda x: exported(x).sum())(x)


@strategies
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_of_prepared_layers_is_saved_and_passes_gradients_on(config, strict, device):
    model = ts.prepare_for_eval(make_model(config, device)).eval()
    x = torch.randn(8, 64, device=device, requires_grad=True)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=strict), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    y, expected = exported(x), model(x)
    assert torch.equal(y, expected)
    if strict and not DYNAMO_KNOWS_EXPORTS:
        pytest.skip("strict exports cannot be told from torch.compile, and pass no gradients")
    assert torch.equal(*(torch.autograd.grad(each.square().mean(), x)[0] for each in (y, expected)))


@strategies
def test_an_exported_program_can_be_saved_and_decomposed(config, device):
    model, x = make_model(config, device), torch.randn(8, 64, device=device)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for other in (torch.export.load(file), program.run_decompositions({})):
        torch.testing.assert_close(other.module()(x), model(x), rtol=1e-3, atol=1e-6)


@strategies
def test_export_with_a_dynamic_batch_of_sequences(config, device):
    model = make_model(config, device)
    dynamic = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(model, (torch.randn(8, 5, 64, device=device),), dynamic_shapes=(dynamic,))
    for leading in ((2, 7), (9, 3)):
        x = torch.randn(*leading, 64, device=device)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-6)
