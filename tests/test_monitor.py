"""The monitor: what it measures, when, where it writes, and that it leaves no trace."""

import copy
import csv
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torch_switchback as ts
from testing import convert_all, signal_to_noise
from torch_switchback import SwitchBackConfig
from torch_switchback.analysis.monitor import CsvWriter, Monitor, measure

QUANTITIES = {
    *(f"{product}_snr{rows}" for product in ("output", "grad_input", "grad_weight") for rows in ("", "_worst_rows")),
    *(f"{operand}_{kind}" for operand in ("x", "weight", "grad") for kind in ("crest", "zeros")),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))

    def forward(self, x):
        return self.mlp(self.attention(x)) + x


@pytest.fixture
def model(device):
    return convert_all(Model()).to(device)


def train(model, monitor, steps, device):
    for _ in range(steps):
        model(torch.randn(2, 40, 64, device=device)).square().mean().backward()
        monitor.step()


class Recorder:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_it_writes_every_quantity_of_every_layer_every_so_many_steps(model, device):
    writer = Recorder()
    monitor = Monitor(model, every=3, writer=writer)
    train(model, monitor, 8, device)
    names = ("attention", "mlp.0", "mlp.2")
    tags = {f"switchback/{name}/{quantity}" for name in names for quantity in {"in_int8", *QUANTITIES}}
    written = [(tag, step) for tag, _, step in writer.scalars]
    assert sorted(written) == sorted((tag, step) for tag in tags for step in (0, 3, 6))
    assert set(monitor.latest) == set(names)
    assert all(isinstance(value, float) for _, value, _ in writer.scalars)


@pytest.mark.parametrize(
    ("layers", "names"),
    [("*.2", {"mlp.2"}), (["attention", "mlp.*"], {"attention", "mlp.0", "mlp.2"}), ("mlp.?", {"mlp.0", "mlp.2"})],
)
def test_it_chooses_layers_by_name(layers, names, model, device):
    monitor = Monitor(model, layers=layers)
    train(model, monitor, 1, device)
    assert set(monitor.latest) == names


def test_what_it_refuses(model):
    with pytest.raises(ValueError, match="Monitor: every must be positive, got 0"):
        Monitor(model, every=0)
    with pytest.raises(ValueError, match=r"Monitor: layers matches no SwitchBackLinear of the model, got 'head\.\*'"):
        Monitor(model, layers="head.*")
    with pytest.raises(ValueError, match=r"matches no SwitchBackLinear .*; call convert_to_switchback first"):
        Monitor(nn.Linear(4, 4))
    model.mlp[0].prepare_for_eval()
    Monitor(model, layers="mlp.*").close()
    with pytest.raises(ValueError, match=r"Monitor: all layers that 'mlp\.0' matches are prepared"):
        Monitor(model, layers="mlp.0")


def test_no_trace_between_samples_nor_after_closing(model, device):
    def hooks():
        return sum(len(module._forward_hooks) for module in model.modules())

    with Monitor(model, every=2) as monitor:
        assert hooks() == 3
        train(model, monitor, 1, device)
        assert hooks() == 0
        train(model, monitor, 1, device)
        assert hooks() == 3
    assert hooks() == 0


def test_gradients_are_the_same_in_a_sampled_step(model, device):
    x = torch.randn(40, 64, device=device)

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with Monitor(model) as monitor:
        for actual, wanted in zip(gradients(), expected, strict=True):
            assert torch.equal(actual, wanted)
        monitor.step()
    assert set(monitor.latest) == {"attention", "mlp.0", "mlp.2"}


@pytest.mark.parametrize(
    "config",
    [SwitchBackConfig(), SwitchBackConfig("rowwise"), SwitchBackConfig(grad_weight="int8", rotate_tokens=None)],
    ids=lambda config: config.strategy,
)
def test_the_noise_is_that_of_the_layer(config, device):
    layer = ts.convert_to_switchback(nn.Linear(96, 64), config=config).to(device)
    x = torch.randn(300, 96, device=device, requires_grad=True)
    grad = torch.randn(300, 64, device=device) * torch.randn(300, 1, device=device).exp()
    record = measure(layer, x, grad)
    y = layer(x)
    grad_input, grad_weight = torch.autograd.grad(y, (x, layer.weight), grad)
    weight = layer.weight.detach()
    for product, actual, exact in (
        ("output", y, nn.functional.linear(x, weight, layer.bias)),
        ("grad_input", grad_input, grad @ weight),
        ("grad_weight", grad_weight, grad.t() @ x),
    ):
        exact = exact.detach()
        if product == "grad_weight" and config.grad_weight == "high_precision":
            assert record["grad_weight_snr"] > 120
            continue
        assert record[f"{product}_snr"] == pytest.approx(signal_to_noise(actual, exact), abs=0.01)
        rows = sorted(signal_to_noise(*row) for row in zip(actual.detach(), exact, strict=True))
        worst = rows[max(1, len(rows) // 100) - 1]
        assert record[f"{product}_snr_worst_rows"] == pytest.approx(worst, abs=0.01)


def test_a_layer_that_computes_as_nn_linear_is_recorded_but_not_measured(model, device):
    model.mlp[0].config = SwitchBackConfig(min_tokens=81)
    with Monitor(model) as monitor:
        train(model, monitor, 1, device)
        assert monitor.latest["mlp.0"] == {"in_int8": 0.0}
        assert monitor.latest["mlp.2"].keys() == {"in_int8", *QUANTITIES} and monitor.latest["mlp.2"]["in_int8"] == 1


def test_the_first_call_in_int8_is_measured(model, device):
    model.mlp[0].config = SwitchBackConfig(min_tokens=50)
    inputs = [torch.randn(tokens, 64, device=device) for tokens in (30, 60, 40)]
    with Monitor(model, layers="mlp.0") as monitor:
        for x in inputs:
            model.mlp[0](x).square().sum().backward()
        monitor.step()
    expected = measure(model.mlp[0], inputs[1], 2 * model.mlp[0](inputs[1]).detach())
    assert monitor.latest == {"mlp.0": {"in_int8": 1.0} | expected}


def test_measure_is_in_int8_however_few_the_tokens(device):
    layer, x = ts.SwitchBackLinear(64, 48, device=device), torch.randn(5, 64, device=device)
    grad = torch.randn(5, 48, device=device)
    expected = measure(layer, x, grad)
    layer.config = SwitchBackConfig(min_tokens=6)
    assert measure(layer, x, grad) == expected and expected["output_snr"] < 60


def test_crest_and_zeros(device):
    layer = ts.SwitchBackLinear(64, 8, device=device)
    x = torch.zeros(200, 64, device=device)
    x[:, 0] = 1.0
    record = measure(layer, x, torch.ones(200, 8, device=device))
    assert record["x_crest"] == pytest.approx(8.0)
    assert record["x_zeros"] == pytest.approx(63 / 64)
    assert record["grad_crest"] == pytest.approx(1.0)
    assert record["grad_zeros"] == 0.0
    weight = layer.weight.detach()
    assert record["weight_crest"] == pytest.approx((weight.abs().max() / weight.square().mean().sqrt()).item())


def test_without_noise_it_is_inf(device):
    layer = ts.SwitchBackLinear(64, 8, bias=False, device=device)
    record = measure(layer, torch.zeros(200, 64, device=device), torch.zeros(200, 8, device=device))
    for product in ("output", "grad_input", "grad_weight"):
        assert record[f"{product}_snr"] == record[f"{product}_snr_worst_rows"] == float("inf")


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel, through_a_file])
def test_copies_are_not_monitored(make, model, device, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "torch_switchback.analysis.monitor.measure", lambda layer, x, grad: measured.append(layer) or {}
    )
    with Monitor(model) as monitor:
        for other in (make(model), through_a_file(make(model))):
            other(torch.randn(5, 64, device=device)).sum().backward()
        assert measured == []
        train(model, monitor, 1, device)
    assert len(measured) == 3


def prepare_for_eval(model):
    for name in ("attention", "mlp.0", "mlp.2"):
        model.get_submodule(name).prepare_for_eval()


@pytest.mark.parametrize("change", [ts.revert_switchback, prepare_for_eval])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_layers_that_are_reverted_or_prepared_meanwhile_leave_no_record(change, when, model, device):
    with Monitor(model) as monitor:
        if when == "before the forward":
            change(model)
        loss = model(torch.randn(5, 64, device=device, requires_grad=True)).sum()
        if when == "before the backward":
            change(model)
        loss.backward()
        monitor.step()
    assert monitor.latest == {}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_layer_without_signal_or_with_nan_is_survived(value, model, device):
    with Monitor(model) as monitor:
        model(torch.full((3, 64), value, device=device)).sum().backward()
        monitor.step()
    assert set(monitor.latest["mlp.0"]) == {"in_int8", *QUANTITIES}


def test_autocast_is_measured_in_its_dtype(model, device, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        "torch_switchback.analysis.monitor.measure", lambda layer, x, grad: dtypes.append((x.dtype, grad.dtype)) or {}
    )
    with Monitor(model) as monitor:
        with torch.autocast(device, torch.bfloat16):
            loss = model(torch.randn(5, 64, device=device)).float().sum()
        loss.backward()
        monitor.step()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_accumulation_give_one_record_a_layer(use_reentrant, model, device, monkeypatch):
    calls = []
    monkeypatch.setattr("torch_switchback.analysis.monitor.measure", lambda layer, x, grad: calls.append(layer) or {})
    with Monitor(model) as monitor:
        for _ in range(2):
            x = torch.randn(5, 64, device=device, requires_grad=True)
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        monitor.step()
    assert len(calls) == len(set(calls)) == 3


def test_prepared_layers_and_evaluation_leave_no_record(model, device):
    model.attention.prepare_for_eval()
    with Monitor(model) as monitor:
        with torch.no_grad():
            model(torch.randn(5, 64, device=device))
        train(model, monitor, 1, device)
    assert set(monitor.latest) == {"mlp.0", "mlp.2"}


def test_no_tokens_leave_no_record_and_keywords_leave_one(device):
    layer = ts.SwitchBackLinear(8, 4, device=device)
    with Monitor(layer) as monitor:
        layer(torch.randn(0, 8, device=device)).sum().backward()
        monitor.step()
        assert monitor.latest == {}
    with Monitor(layer) as monitor:
        layer(input=torch.randn(3, 8, device=device)).sum().backward()
        monitor.step()
    assert set(monitor.latest) == {""}


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_models_are_sampled_without_compiling_again(how, model, device):
    compiles = []

    def counting(graph, inputs):
        compiles.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if how == "wrapped":
        compiled = torch.compile(model, fullgraph=True, backend=counting)
    else:
        model.compile(fullgraph=True, backend=counting)
        compiled = model
    with Monitor(compiled, every=2) as monitor:
        for step in range(5):
            monitor.latest = {}
            train(compiled, monitor, 1, device)
            assert set(monitor.latest) == (set() if step % 2 else {"attention", "mlp.0", "mlp.2"})
    train(compiled, monitor, 1, device)
    assert compiles == [1]


def test_overlapping_monitors_leave_the_compiler_as_they_found_it(device):
    compiles = []

    def counting(graph, inputs):
        compiles.append(1)
        return graph

    models = [ts.SwitchBackLinear(16, 8, device=device) for _ in range(2)]
    compiled = torch.compile(models[0], backend=counting)
    first, second = (Monitor(model, every=100) for model in models)
    compiled(torch.randn(2, 16, device=device))
    first.step()
    compiled(torch.randn(2, 16, device=device))
    assert compiles == []  # the second still samples
    second.step()
    compiled(torch.randn(2, 16, device=device))
    assert compiles == [1]
    first.close()
    second.close()


def test_a_monitor_that_nobody_closes_leaves_no_trace_either(model, device):
    monitor = Monitor(model, every=1)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del monitor
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not any(module._forward_hooks for module in model.modules())


def test_csv(model, device, tmp_path):
    path = tmp_path / "noise.csv"
    for _ in range(2):  # the second appends
        writer = CsvWriter(path)
        with Monitor(model, layers="attention", writer=writer) as monitor:
            train(model, monitor, 1, device)
        writer.close()
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["step", "tag", "value"]
    assert len(rows) == 2 * (1 + len(QUANTITIES))
    assert {row[1] for row in rows} == {f"switchback/attention/{quantity}" for quantity in {"in_int8", *QUANTITIES}}
    assert all(float(row[2]) == float(row[2]) for row in rows)
