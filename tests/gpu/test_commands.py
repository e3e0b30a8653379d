"""explain, recommend, doctor and bench on a GPU."""

import json

import pytest
import torch
from torch import nn

import torch_switchback as ts
from torch_switchback.analysis.recommendation import LINEAR
from torch_switchback.kernels import int8_matmul, int8_matmul_tma, launch
from torch_switchback.kernels.device import architecture
from torch_switchback.tuning import matmul_config


def large():
    return nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 64)).to("cuda", torch.bfloat16)


def test_explain_knows_the_tuned_tiles():
    model = ts.convert_to_switchback(large(), config={"0": "switchback"})
    x = torch.randn(2, 1024, 4096, device="cuda", dtype=torch.bfloat16)
    first, last = ts.explain(model, x, strict=True).layers
    config = matmul_config(architecture(x.device), 2048, 4096, 4096)
    assert [matmul.tile for matmul in first.matmuls[:2]] == [config, config]
    assert (first.tokens, first.dtype, last.strategy) == (2048, "bfloat16", "Linear")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explain_finds_a_kernel_that_does_not_run(monkeypatch):
    def broken(*arguments):
        raise int8_matmul.CannotCompile("not today")

    monkeypatch.setattr(int8_matmul, "_replaced", {})
    monkeypatch.setattr(launch, "plans", {})
    tuned = matmul_config(architecture(torch.device("cuda", 0)), 4096, 4096, 4096)
    if not tuned.tma:
        pytest.skip("the plainest kernel has no fall-back")
    monkeypatch.setattr(int8_matmul, "_warp_specialized", broken)
    monkeypatch.setattr(int8_matmul_tma, "plan_tma", broken)
    layer = ts.SwitchBackLinear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="runs .* instead of"):
        (row,) = ts.explain(layer, tokens=4096).layers
    assert {matmul.kernel for matmul in row.matmuls[:2]} == {"pointer"}
    assert "output: not today" in row.fallback


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_recommend_measures_every_recipe(cuda_graph):
    """Any recipe may win: that depends on the GPU, and on who else uses it."""
    model = large()
    x = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    found = ts.recommend(model, x, cuda_graph=cuda_graph)
    assert set(found.config) == {"0", "2"}
    for layer in found.layers:
        assert set(layer.milliseconds) == {LINEAR, "switchback", "switchback_memory_efficient"}
        assert min(layer.milliseconds.values()) > 0
        assert layer.recipe in (None, min(set(layer.milliseconds) - {LINEAR}, key=layer.milliseconds.__getitem__))
        assert layer.saved_bytes[LINEAR] == x.nbytes
        assert layer.saved_bytes["switchback_memory_efficient"] < 0.51 * x.nbytes
    assert (found.model is None) == cuda_graph
    assert cuda_graph or min(found.model.milliseconds.values()) > 0
    assert all(type(module) is not ts.SwitchBackLinear for module in model)


def test_doctor_and_bench(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from torch_switchback.cli.app import app

    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "GPU layer" in result.output and "kernel pointer" in result.output
    arguments = ["--shape", "4096,1024,2048", "--recipe", "switchback", "--seconds", "0.2", "--json"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--cuda-graph"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert [row["name"] for row in json.loads(result.stdout)["results"]] == [LINEAR, "switchback"]
