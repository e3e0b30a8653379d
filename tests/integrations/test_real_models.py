"""benchmarks/bench_real_models.py runs with --tiny, with the real Transformers and timm."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_real_models
import draw
import measure
import pages
import results_file
from bench_real_models import MODELS, NAMES, RECOMMENDED, TINY_MODELS, count_int8_layers
from torch_switchback import SwitchBackConfig, SwitchBackLinear


def blocks(model, module):
    return [part for part in module.modules() if type(part).__name__ in model.block_classes]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_models_exist_and_most_linear_layers_are_in_blocks(model):
    with torch.device("meta"):
        module = model.new()
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    in_blocks = {part for block in blocks(model, module) for part in block.modules()}
    assert {type(block).__name__ for block in blocks(model, module)} == {*model.block_classes}
    assert len(linears) - sum(part in in_blocks for part in linears) <= 3  # the head and what stands before it


def test_names_are_distinct():
    assert len({model.name for model in MODELS}) == len(MODELS)
    assert len({model.name for model in TINY_MODELS}) == len(TINY_MODELS)


@pytest.mark.parametrize("name", ["Llama 64", "BERT", "Whisper", "ViT-H"])
def test_variants_start_from_the_same_model(name, tmp_path):
    output = tmp_path / "out.json"
    bench_real_models.main(["--tiny", "--only", name, "--output", str(output)])
    document = results_file.load(output)
    assert document["runs"][0].keys() >= {"cases", "date", "device", "torch", "transformers", "timm"}
    expected = [(mode, variant) for mode, variants in NAMES.items() for variant in variants]
    assert [(record["mode"], record["name"]) for record in document["results"]] == expected
    for record in document["results"]:
        if "reason" in record:
            assert measure.is_other_library(record["name"]), record
            continue
        linear = measure.find(document["results"], name="linear", mode=record["mode"])
        assert record["loss"] == pytest.approx(linear["loss"], rel=0.01)
        assert 0 < record["speed_up_p10"] <= record["speed_up"] <= record["speed_up_p90"]


def test_runs_of_single_modes_share_a_file_a_table_and_a_picture(tmp_path):
    output = tmp_path / "cpu" / "bench_real_models.json"
    for mode in NAMES:
        flags = ["--tiny", "--recommended", "--only", "ViT-S", "--modes", mode]
        bench_real_models.main([*flags, "--output", str(output)])
    document = results_file.load(output)
    model = next(str(model) for model in TINY_MODELS if "ViT-S" in str(model))
    assert [run["cases"] for run in document["runs"]] == [[f"{model}, eager"], [f"{model}, compiled"]]
    names = {record["name"] for record in document["results"] if "reason" not in record}
    assert names >= {"linear", "switchback", RECOMMENDED}
    header, _, row = pages.real_models(document).splitlines()
    assert "| switchback | switchback_int8_grad_weight | recommended |" in header
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert row.startswith(f"| {model} | ")
    assert not any("–" in cell for name, cell in cells.items() if not name.startswith("torchao"))
    draw.main(["--results", str(tmp_path)])
    assert output.with_name("real_models.png").read_bytes().startswith(b"\x89PNG")


def test_layers_below_their_min_tokens_or_without_a_call_do_not_count_as_int8():
    class FirstFour(nn.ModuleList):
        def forward(self, x):
            return [layer(x) for layer in self[:4]]

    configs = [SwitchBackConfig(min_tokens=min_tokens) for min_tokens in (None, 0, 6, 7, 0)]
    model = FirstFour(SwitchBackLinear(8, 8, config=config) for config in configs)
    assert count_int8_layers(model, {"x": torch.randn(2, 3, 8)}) == 3
    assert not any(layer._forward_pre_hooks for layer in model)
