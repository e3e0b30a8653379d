"""benchmarks/bench_lora.py runs with --tiny, with the real Transformers and PEFT."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_lora
import pages
import results_file
from bench_lora import TINY_MODELS, base_layers, calls_of, compiled_parts, with_adapters
from measure import find
from shapes import Shape

CPU = torch.device("cpu")


@pytest.mark.parametrize(("model", "mode"), [("Llama", "eager"), ("DiT", "compiled"), ("Llama", "reduce-overhead")])
def test_frozen_bases_take_a_byte_and_train_as_nn_linear_does(model, mode, tmp_path):
    output = tmp_path / "out.json"
    variants = ["switchback", "rowwise", "rowwise, cached"]
    case = next(str(case) for case in bench_lora.cases(TINY_MODELS) if case.mode == mode and model in str(case))
    bench_lora.main(["--tiny", "--only", case, "--variants", *variants, "--output", str(output)])
    document = results_file.load(output)
    assert document["runs"][0].keys() >= {"cases", "commit", "torch", "transformers", "peft"}
    assert [record["name"] for record in document["results"]] == ["linear", *variants]
    linear = find(document["results"], name="linear")
    assert linear["loss"] < linear["first_loss"] - 0.02
    for record in document["results"]:
        assert (record["label"], record["mode"]) == (case, mode)
        assert record["first_loss"] == pytest.approx(linear["first_loss"], rel=0.002)
        fallen = linear["first_loss"] - linear["loss"]
        assert record["first_loss"] - record["loss"] == pytest.approx(fallen, rel=0.1)
        expected = 2 if record is linear else 1  # on the CPU parameters and buffers alone: a kept transpose is neither
        assert expected <= record["weight_bytes"] <= expected + 4 / 64  # a float32 per row of 64 elements or more
        assert 0 < record["speed_up_p10"] <= record["speed_up"] <= record["speed_up_p90"]
    assert linear["bound"] > 1
    header, _, row = pages.lora(document).splitlines()
    recipes = "switchback", "rowwise", "cached", "rowwise_rotated_features", "cached", bench_lora.FLOAT8
    assert header == f"| eager/compiled/CUDA graphs | nn.Linear, ms | bound | {' | '.join(recipes)} |"
    place = ("eager", "compiled", "reduce-overhead").index(mode)
    for column, value in {1: f"{linear['median_ms']:.1f}", 2: f"{linear['bound']:.2f}", 8: "–"}.items():
        cells = row.strip("| ").split(" | ")[column].split("/")
        assert cells[place] == value and cells.count("–") >= 2
    assert row.startswith(f"| {linear['model']} | ")


def test_matmuls_are_those_of_the_base_and_have_a_gradient_behind_an_adapter():
    model = TINY_MODELS[0]
    module = with_adapters(model, "linear", CPU, "float32")
    layers = base_layers(model, module)
    inputs, labels = model.new_batch(CPU)
    calls = calls_of(list(layers.values()), lambda: model.loss(module, inputs, labels))
    block = [
        Shape(32, 64, 64),
        *[Shape(32, 64, 32)] * 2,
        Shape(32, 64, 64),
        *[Shape(32, 64, 96)] * 2,
        Shape(32, 96, 64),
    ]
    assert [call.shape for call in calls] == 2 * block
    assert [call.has_grad_input for call in calls] == [False] * 3 + [True] * 11


def test_blocks_are_compiled_one_by_one_but_for_cuda_graphs():
    for model in TINY_MODELS:
        module = with_adapters(model, "linear", CPU, "float32")
        blocks = compiled_parts(model, module, "compiled")
        assert len(blocks) == 2 and {type(block).__name__ for block in blocks} == {*model.block_classes}
        assert compiled_parts(model, module, "reduce-overhead") == [module]


def test_the_bound_halves_the_matmuls_alone():
    assert bench_lora.bound(step_ms=100.0, matmuls_ms=0.0) == 1
    assert bench_lora.bound(step_ms=100.0, matmuls_ms=100.0) == 2
    assert bench_lora.bound(step_ms=100.0, matmuls_ms=40.0) == 100 / 80


def test_the_models_have_the_sizes_of_the_table():
    llama, _, dit = bench_lora.MODELS
    sizes = {}
    for model in (llama, dit):
        with torch.device("meta"):
            sizes[model] = [
                (layer.in_features, layer.out_features) for layer in base_layers(model, model.new()).values()
            ]
    block = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    assert sizes[llama] == 4 * block
    stream = [(3072, 18432), (3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072)]
    assert sizes[dit] == 6 * stream
