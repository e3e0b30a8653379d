"""The benchmarks run on toy shapes and say where their numbers come from. Nothing here looks at a time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")
pytest.importorskip("typer", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import typer
from typer.testing import CliRunner

import bench_linear
import bench_matmul
import bench_model
import bench_quantize
import draw
import measure
from blocks import LlamaBlock, Stack, ViTBlock
from torch_switchback import SwitchBackLinear

CPU = torch.device("cpu")
SCRIPTS = {script.__name__: script.app for script in (bench_quantize, bench_matmul, bench_linear, bench_model)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what every script wrote about toy shapes."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take longer than one
    for name, app in SCRIPTS.items():
        flags = ("--device", "cpu", "--tiny", "--quick", "--output", str(folder / f"{name}.json"))
        finished = CliRunner().invoke(app, flags)
        assert finished.exit_code == 0, finished.output
    torch.set_num_threads(threads)
    return folder


def load(results: Path, script: str) -> dict:
    return json.loads((results / f"{script}.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_say_where_they_come_from(results, script):
    provenance = load(results, script)["provenance"]
    assert provenance["script"] == f"benchmarks/{script}.py"
    assert provenance["arguments"]["tiny"] is True
    assert provenance["torch"] == torch.__version__
    assert provenance.keys() >= {"date", "device", "driver", "python", "triton", "torchao", "git_commit"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_competitor_has_a_time_with_its_spread_or_a_reason(results, script):
    records = load(results, script)["results"]
    assert records
    for record in records:
        if record["median_ms"] is None:
            assert record["reason"] and measure.is_peer(record["name"]), record
        else:
            assert 0 < record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
            assert record["rounds"] >= measure.MIN_ROUNDS


def test_peers_are_never_dropped(results):
    names = {record["name"] for record in load(results, "bench_linear")["results"]}
    assert names >= {
        "linear",
        "switchback",
        "rowwise-mem-efficient",
        "torchao int8",
        "torchao float8 tensorwise",
        "torchao float8 rowwise",
        "torchao float8 rowwise_with_gw_hp",
    }
    products = {record["name"] for record in load(results, "bench_matmul")["results"]}
    assert products >= {"bf16", "torch._int_mm", "torch._scaled_mm tensorwise", "torch._scaled_mm rowwise"}


def test_limit_is_linear_over_the_sum_of_parts(results):
    document = load(results, "bench_linear")
    times = {
        record["name"]: record["median_ms"]
        for record in document["results"]
        if record["what"] == "step" and record["mode"] != "compiled" and record["reason"] is None
    }
    (limit,) = document["limits"]
    parts = sum(time for name, time in times.items() if name.startswith(bench_linear.PART))
    assert limit["sum_of_parts_ms"] == pytest.approx(parts)
    assert limit["limit"] == pytest.approx(
        measure.median_ms([r for r in document["results"] if r["what"] == "step"], "linear") / parts
    )


def test_pictures_are_drawn_and_missing_files_named(results, tmp_path):
    finished = CliRunner().invoke(draw.app, [str(results), "--out", str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    for name in ("products", "layers", "models", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    finished = CliRunner().invoke(draw.app, [str(tmp_path)])
    assert finished.exit_code == 0
    assert "has no bench_model.json, bench_linear.json" in finished.output


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_script_says_so(script):
    finished = CliRunner().invoke(SCRIPTS[script], [])
    assert finished.exit_code == 2
    assert "there is no CUDA device" in finished.output


def test_cpu_takes_toys_only():
    finished = CliRunner().invoke(bench_matmul.app, ["--device", "cpu"])
    assert finished.exit_code == 2
    assert "add --tiny" in finished.output


def new_bench(output: Path) -> measure.Bench:
    return measure.Bench("bench", device="cpu", seconds=0, quick=False, tiny=True, output=output)


def fail() -> measure.Cycle:
    raise RuntimeError("no such product\nand much more")


def test_a_failing_peer_is_a_result(tmp_path):
    bench = new_bench(tmp_path / "out.json")
    working, failed = bench.compare(
        [measure.Contestant("ours", lambda: [lambda: None]), measure.Contestant("torch peer", fail)], shape=1
    )
    bench.finish()
    assert working["median_ms"] is not None and working["reason"] is None
    assert failed["median_ms"] is None and failed["reason"] == "RuntimeError: no such product"
    assert json.loads((tmp_path / "out.json").read_text())["results"] == [working, failed]


def test_our_own_failure_fails_the_script_after_writing(tmp_path):
    bench = new_bench(tmp_path / "out.json")
    bench.compare([measure.Contestant("ours", fail)])
    with pytest.raises(typer.Exit) as raised:
        bench.finish()
    assert raised.value.exit_code == 1
    assert (tmp_path / "out.json").is_file()


def test_competitors_take_turns_and_cycle_through_their_inputs():
    calls: list[str] = []
    contestants = [
        measure.Contestant(name, lambda name=name: [lambda: calls.append(name + "1"), lambda: calls.append(name + "2")])
        for name in "ab"
    ]
    measure.compare(contestants, seconds=0, device=CPU)
    turns = [call[0] for call in calls[-2 * measure.MIN_ROUNDS :]]
    assert turns == ["a", "b"] * measure.MIN_ROUNDS
    of_a = [call for call in calls if call[0] == "a"]
    assert of_a[2:] == (["a1", "a2"] * len(of_a))[: len(of_a) - 2]


def test_copies_overflow_twice_the_cache(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for set_bytes in (1, 30, 100, 101, 1000):
        count = measure.copies(set_bytes, torch.device("cuda"))
        assert count * set_bytes > 100 >= (count - 1) * set_bytes


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(32, 48), 64 * 32 * 4),
        (SwitchBackLinear(32, 48), 64 * 32 * 4 + 32 * 48 + 4),  # and of the weight its transposed codes and absmax
        (SwitchBackLinear(32, 48, mem_efficient=True), 64 * 32 + 64 * 4 + 4),
    ],
)
def test_saved_bytes_leaves_out_parameters(layer, expected):
    assert measure.saved_bytes(layer, torch.randn(2, 32, 32, requires_grad=True)) == expected


def test_blocks_keep_the_shape_and_use_every_parameter():
    x = torch.randn(2, 16, 64)
    for new_block in (
        lambda: LlamaBlock(context=16, width=64, hidden=96, heads=4, kv_heads=2),
        lambda: ViTBlock(width=64, hidden=96, heads=4),
    ):
        stack = Stack(2, new_block)
        y = stack(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in stack.parameters())


def test_blocks_have_the_sizes_of_their_models():
    with torch.device("meta"):
        llama, vit = LlamaBlock(context=4096), ViTBlock()
    assert sum(p.numel() for p in llama.parameters()) == 218_112_000
    assert sum(p.numel() for p in vit.parameters()) == 19_677_440
