"""The benchmarks run on toy shapes and say where their numbers come from. Nothing here looks at a time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")
pytest.importorskip("typer", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import typer
from typer.testing import CliRunner

import bench_inference
import bench_linear
import bench_matmul
import bench_model
import bench_quantize
import draw
import measure
import peers
import summary
from blocks import LlamaBlock, Stack, ViTBlock
from collect import collect
from torch_switchback import SwitchBackLinear
from torch_switchback.advice.saved_bytes import saved_bytes

pytestmark = pytest.mark.filterwarnings("ignore:grad_weight='int8' stays at high precision")  # toys are too small

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
SCRIPTS = {
    script.__name__: script.app for script in (bench_quantize, bench_matmul, bench_linear, bench_inference, bench_model)
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what every script wrote about toy shapes."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take longer than one
    for name, app in SCRIPTS.items():
        flags = ["--device", "cpu", "--tiny", "--output", str(folder / f"{name}.json")]
        flags += ["--only", "GPT"] if name == "bench_model" else []
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


def test_products_are_interleaved_and_sustained(results):
    paces = {record["pace"] for record in load(results, "bench_matmul")["results"] if record["name"] == summary.PEER}
    assert paces == {"interleaved", "sustained"}


def test_limit_is_linear_over_the_sum_of_a_strategys_parts(results):
    document = load(results, "bench_linear")
    times = {(record["name"], record["mode"]): record["median_ms"] for record in document["results"]}
    limits = {limit["name"]: limit for limit in document["limits"]}
    assert limits.keys() == bench_linear.STRATEGIES.keys()
    for name, config in bench_linear.STRATEGIES.items():
        parts = sum(times[bench_linear.PART + part, "graph"] for part in bench_linear.parts_of(config))
        assert limits[name]["sum_of_parts_ms"] == pytest.approx(parts)
        assert limits[name]["limit"] == pytest.approx(times["linear", "graph"] / parts)
        assert limits[name]["share_reached"] == pytest.approx(parts / times[name, "eager"])


def test_every_strategy_of_the_demo_is_measured(results):
    measured = {(record["name"], record["mode"]) for record in load(results, "bench_linear")["results"]}
    assert measured >= {(name, "eager") for name in peers.RECIPES}


def test_memory_efficient_keeps_half(results):
    linear, efficient = (
        measure.find(load(results, "bench_linear")["results"], name=name, mode="eager")
        for name in ("linear", "switchback-mem-efficient")
    )
    assert efficient["saved_over_linear"] == efficient["saved_bytes"] / linear["saved_bytes"] < 0.6


def test_runs_of_bench_overhead_share_a_file(tmp_path):
    output = tmp_path / "out.json"
    for label in ("before", "after", "after"):
        command = [sys.executable, BENCHMARKS / "bench_overhead.py", "--tiny", "--label", label, "--output", output]
        subprocess.run(command, check=True, capture_output=True)
    document = json.loads(output.read_text())
    assert list(document["runs"]) == ["before", "after"]
    assert [row["label"] for row in document["results"]] == ["before"] * 5 + ["after"] * 5
    assert all("seconds" in row or len(row["ratio"]) == 3 for row in document["results"])


def test_pictures_are_drawn_and_missing_files_named(results, tmp_path):
    finished = CliRunner().invoke(draw.app, [str(results), "--out", str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    for name in ("products", "layers", "models", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    finished = CliRunner().invoke(draw.app, [str(tmp_path)])
    assert finished.exit_code == 0
    assert "has no bench_model.json, bench_linear.json" in finished.output


def test_pictures_show_whichever_results_exist(results, tmp_path):
    (tmp_path / "bench_linear.json").write_text((results / "bench_linear.json").read_text())
    finished = CliRunner().invoke(draw.app, [str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"layers.png", "memory.png"}


def test_summary_reads_every_script_of_its_goals(results):
    finished = CliRunner().invoke(summary.app, [str(results)])
    assert finished.exit_code == 0, finished.output
    assert finished.output.count("\n| ") == len(summary.GOALS) + 1
    for goal in summary.GOALS:
        list(goal.cases(load(results, goal.script)))


@pytest.mark.parametrize(
    ("values", "at_most", "expected"),
    [
        ([1.5, 1.2], False, ("1.20", "yes")),
        ([1.5, 0.9], False, ("0.90", "no (1 of 2)")),
        ([1.5, None], False, ("1.50", "no (1 of 2)")),
        ([0.5, 0.9], True, ("0.90", "yes")),
        ([0.5, 1.2], True, ("1.20", "no (1 of 2)")),
        ([None], False, ("–", "not measured")),
    ],
)
def test_a_goal_is_reached_by_its_worst_case(values, at_most, expected):
    goal = summary.Goal("speed", 1.0, "bench", lambda document: (("a case", value) for value in values), at_most)
    assert summary.row(goal, {})[2:4] == expected


def test_goals_pick_their_shapes():
    shapes = [*bench_linear.LAYERS, (1, 2, 3)]
    records = [{"shape": shape, "name": "switchback", "mode": "eager", "speed_up": 2.0} for shape in shapes]
    llama = next(goal for goal in summary.GOALS if goal.what == "layer step, Llama shapes")
    assert [name for name, _ in llama.cases({"results": records})] == [str(shape) for shape in bench_linear.LAYERS[2:5]]


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


def write_run(file: Path, date: str, *results: dict) -> None:
    provenance = {"script": "benchmarks/bench_x.py", "date": date}
    limits = [{"shape": result["shape"], "limit": result["median_ms"]} for result in results]
    file.write_text(json.dumps({"provenance": provenance, "results": results, "limits": limits, "kept": date}))


def test_of_each_shape_the_newest_run_counts(tmp_path):
    def record(tokens: int, time: float | None) -> dict:
        return {"shape": [tokens, 8, 8], "median_ms": time}

    write_run(tmp_path / "bench_x.json", "2026-01-02", record(1, 1.0), record(2, 2.0), record(3, 3.0))
    write_run(tmp_path / "bench_x_again.json", "2026-01-03", record(2, 2.5), record(2, None), record(3, None))
    write_run(tmp_path / "bench_x_before.json", "2026-01-01", record(1, 0.5))
    document = collect(tmp_path)["bench_x"]
    assert document["results"] == [record(1, 1.0), record(2, 2.5), record(2, None), record(3, 3.0)]
    assert [limit["limit"] for limit in document["limits"]] == [1.0, 2.5, None, 3.0]
    assert document["kept"] == "2026-01-03"
    assert document["runs"].keys() == {"bench_x.json", "bench_x_again.json"}


def new_bench(output: Path) -> measure.Bench:
    return measure.Bench("bench", device="cpu", seconds=0, tiny=True, output=output)


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
    written = [{key: value for key, value in one.items() if key != "samples_ms"} for one in (working, failed)]
    assert json.loads((tmp_path / "out.json").read_text())["results"] == written


def test_our_own_failure_fails_the_script_after_writing(tmp_path):
    bench = new_bench(tmp_path / "out.json")
    bench.compare([measure.Contestant("ours", fail)])
    with pytest.raises(typer.Exit) as raised:
        bench.finish()
    assert raised.value.exit_code == 1
    assert (tmp_path / "out.json").is_file()


def test_a_report_writes_what_there_is_so_far(tmp_path):
    bench = new_bench(tmp_path / "out.json")
    for number in (1, 2):
        bench.compare([measure.Contestant("ours", lambda: [lambda: None])], number=number)
        bench.report(last=number)
        document = json.loads((tmp_path / "out.json").read_text())
        assert [record["number"] for record in document["results"]] == list(range(1, number + 1))
        assert document["last"] == number


def test_without_time_left_competitors_are_skipped_and_nothing_fails(tmp_path):
    bench = measure.Bench("bench", device="cpu", seconds=0, tiny=True, output=tmp_path / "out.json", budget=0.0)
    for _ in bench.cases([1], [1]):
        (record,) = bench.compare([measure.Contestant("ours", fail)])
    assert record["reason"] == measure.SKIPPED
    bench.finish()


def test_cases_share_the_time_that_is_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bench = measure.Bench("bench", device="cpu", seconds=0, tiny=True, output=None, budget=90.0)
    deadlines = []
    for _ in bench.cases([], [1, 2, 3]):
        deadlines.append(bench._deadline)
        now += 50.0 if len(deadlines) == 1 else 0.0
    assert deadlines == [30.0, 70.0, 90.0]


def test_a_speed_up_is_the_median_of_the_ratios_in_each_round():
    ours = {"median_ms": 2.0, "samples_ms": [1.0, 2.0, 4.0]}
    theirs = {"median_ms": 2.0, "samples_ms": [2.0, 2.0, 2.0]}
    assert measure.speed_up(ours, theirs)["speed_up"] == 1.0
    theirs["samples_ms"] = [3.0, 6.0, 2.0]
    assert measure.speed_up(ours, theirs)["speed_up"] == 3.0
    assert measure.speed_up(ours, None)["speed_up"] is None


def test_competitors_take_turns_and_cycle_through_their_inputs():
    calls: list[str] = []
    contestants = [
        measure.Contestant(name, lambda name=name: [lambda: calls.append(name + "1"), lambda: calls.append(name + "2")])
        for name in "abc"
    ]
    measure.compare(contestants, seconds=0, device=CPU)
    turns = [call[0] for call in calls[-3 * measure.MIN_ROUNDS :]]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1  # no one always follows the same
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
        (SwitchBackLinear(32, 48), 64 * 32 * 4 + 4),  # and the absmax of the weight
        (SwitchBackLinear(32, 48, mem_efficient=True), 64 * 32 + 64 * 4 + 4),
    ],
)
def test_saved_bytes_leaves_out_parameters(layer, expected):
    x = torch.randn(2, 32, 32, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == expected


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
