"""The benchmarks run with --tiny. Their timing, statistics and results files are right."""

import gc
import json
import math
import random
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_break_even
import bench_cpu
import bench_inference
import bench_linear
import bench_matmul
import bench_model
import bench_quantize
import bench_training
import draw
import measure
import pages
import results_file
import signal_to_noise
from blocks import LlamaBlock, Stack, ViTBlock
from torch_switchback import SwitchBackLinear
from torch_switchback.analysis.layer_steps import saved_bytes
from torch_switchback.tuning.break_even import rates_of, work
from training_statistics import AGAIN, effects

pytestmark = pytest.mark.filterwarnings("ignore:grad_weight='int8' stays at high precision")  # toys are too small

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
TIMED = {
    script.__name__: script
    for script in (bench_cpu, bench_inference, bench_linear, bench_matmul, bench_model, bench_quantize)
}


# The scripts


@pytest.mark.parametrize("script", TIMED)
def test_every_candidate_has_a_time_with_its_spread_or_a_reason(script, tmp_path):
    output = tmp_path / f"{script}.json"
    flags = ["--only", "GPT"] if script == "bench_model" else []
    with torch.compiler.set_stance("force_eager"):
        TIMED[script].main(["--tiny", "--output", str(output), *flags])
    document = results_file.load(output)
    assert document["runs"][0].keys() >= {"cases", "date", "device", "torch", "triton", "python", "commit"}
    for record in document["results"]:
        if "reason" in record:
            assert measure.is_other_library(record["name"]), record
        else:
            assert 0 < record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
            assert record["rounds"] >= measure.MIN_ROUNDS
            assert "turns" not in record


def test_runs_of_bench_overhead_share_a_file(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "bench_overhead.py", "--tiny", "--label", "before", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    records = results_file.load(output)["results"]
    results_file.save(output, results_file.provenance(CPU), [record | {"label": "after"} for record in records])
    document = results_file.load(output)
    assert [run["cases"] for run in document["runs"]] == [["before"], ["after"]]
    assert [record["label"] for record in document["results"]] == ["before"] * 5 + ["after"] * 5
    assert "| before | after |" in pages.overhead(document)


def test_break_even_measures_every_step(tmp_path):
    output = tmp_path / "out.json"
    bench_break_even.main(["--tiny", "--output", str(output)])
    (row,) = results_file.load(output)["results"]
    assert row["label"] == "32 → 48" and row["tokens"] == 64
    steps = [*bench_break_even.TRAINED, *(f"frozen {name}" for name in bench_break_even.FROZEN)]
    assert all(row[f"{name}_ms"] > 0 for name in steps)
    assert row["speed_up"] > 0


def test_break_even_fits_the_rates_that_made_the_times(tmp_path, capsys):
    rates = rates_of("sm_90")
    rows = []
    for tokens in (4096, 65536):
        for features in ((1024, 4096), (4096, 4096), (2048, 512)):
            row = {"label": str(bench_break_even.Features(*features)), "tokens": tokens, "name": "switchback"}
            for prefix, names in (("", bench_break_even.TRAINED), ("frozen ", bench_break_even.FROZEN)):
                for name in names:
                    step = work(tokens, *features, bench_break_even.RECIPES[name], trains=not prefix)
                    row[f"{prefix}{name}_ms"] = step.microseconds(rates) / 1e3
            rows.append(row)
    fitted = bench_break_even.fit(rows)
    for name in ("high_precision_tflops", "int8_tops", "gb_per_s", "kernel_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(rates, name), rel=1e-6)
    results_file.write(tmp_path / "rows.json", {"runs": [], "results": rows})
    bench_break_even.main(["--fit", str(tmp_path / "rows.json")])
    choices = [line for line in capsys.readouterr().out.splitlines() if "lose more than 2 %" in line]
    assert len(choices) == 6 and all(": 0 of 6 lose" in line for line in choices)


def test_training_is_paired_and_drawn(tmp_path):
    output = tmp_path / "cpu" / "bench_training.json"
    recipes = ("linear", AGAIN, "all int8")
    flags = ["--tiny", "--steps", "10", "--seeds", "2", "--output", str(output)]
    with torch.compiler.set_stance("force_eager"):
        for recipe in recipes:  # one after the other, as on several GPUs
            bench_training.main([*flags, "--recipe", recipe])
    document = results_file.load(output)
    assert results_file.cases_of(document["results"]) == list(recipes)
    runs = {(run["recipe"], run["seed"]): run for run in document["results"]}
    for seed in (0, 1):  # the first loss is that of the initial weights on the first batch
        first = [runs[recipe, seed]["first_loss"] for recipe in recipes]
        assert max(first) - min(first) < 0.01
        again = runs[AGAIN, seed]["final_validation_loss"] - runs["linear", seed]["final_validation_loss"]
        assert abs(again) < 1e-3
    snr = runs["linear", 0]["gradient_snr"]
    assert {record["step"] for record in snr} == {0, 5, 10}
    for record in snr:
        if "reason" not in record:
            low, high = (
                (44, 60) if record["recipe"] == "linear" else (20, 52)
            )  # bf16 keeps 8 bits of a value, int8 fewer
            assert low < record["snr"] < high
    assert "| all int8 | 2 |" in pages.gpt(document) and "after 5 steps" in pages.gradient_snr(document)

    with pytest.raises(SystemExit):
        bench_training.main([*flags, "--steps", "11"])  # another protocol
    draw.main(["--results", str(tmp_path)])
    assert output.with_name("training.png").read_bytes().startswith(b"\x89PNG")


def test_signal_to_noise_runs(tmp_path):
    signal_to_noise.main(["--tiny", "--output", str(tmp_path / "out.json")])
    document = results_file.load(tmp_path / "out.json")
    assert "| Gaussian | output |" in pages.noise(document)
    assert "| Gaussian | Gaussian | 256 |" in pages.grad_weight(document)
    header, _, *rows = pages.frozen_noise(document).splitlines()
    assert header.endswith("| switchback | rowwise | rowwise_rotated_features |") and len(rows) == 3


@pytest.mark.parametrize("grad", signal_to_noise.GRADIENTS)
@pytest.mark.parametrize("x", signal_to_noise.INPUTS)
def test_rotated_int8_grad_weight_is_above_33_db_and_above_float8(x, grad):
    snr = signal_to_noise.grad_weight_snr(x, grad, tokens=2048, in_features=256)["snr"]
    for block in (64, 128):
        assert snr[f"int8, {block} tokens rotated"] > max(33, snr["float8 tensorwise"], snr["float8 columnwise"])
    assert 26 < snr["float8 tensorwise"] < 32 and snr["bf16"] > 50


@pytest.mark.parametrize("script", [script for script in TIMED if script != "bench_cpu"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_script_says_so(script, capsys):
    with pytest.raises(SystemExit):
        TIMED[script].main([])
    assert "there is no CUDA device" in capsys.readouterr().err


# Timing


def compare(*candidates: measure.Candidate, deadline: float = math.inf) -> list[dict]:
    bench = measure.Bench("cpu", seconds=0, tiny=True)
    bench.deadline = deadline
    return bench.compare(candidates)


def fail() -> measure.Cycle:
    raise RuntimeError("no such matmul\nand much more")


def test_a_failing_candidate_is_a_result():
    works, fails = compare(measure.Candidate("ours", lambda: [lambda: None]), measure.Candidate("torch peer", fail))
    assert works["median_ms"] is not None and "reason" not in works
    assert "median_ms" not in fails and fails["reason"] == "RuntimeError: no such matmul"


def test_without_time_left_candidates_are_skipped():
    (record,) = compare(measure.Candidate("ours", fail), deadline=0.0)
    assert record["reason"] == measure.SKIPPED


def test_candidates_are_interleaved_and_cycle_through_their_inputs():
    calls: list[str] = []
    candidates = [
        measure.Candidate(name, lambda name=name: [lambda: calls.append(name + "1"), lambda: calls.append(name + "2")])
        for name in "abc"
    ]
    compare(*candidates)
    turns = [call[0] for call in calls[-3 * measure.MIN_ROUNDS :]]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1  # no candidate always follows the same one
    of_a = [call for call in calls if call[0] == "a"]
    assert of_a[2:] == (["a1", "a2"] * len(of_a))[: len(of_a) - 2]


def test_a_speed_up_is_the_median_of_the_ratios_of_the_rounds():
    ours, theirs = {"turns": [1.0, 2.0, 4.0]}, {"turns": [2.0, 2.0, 2.0]}
    assert measure.speed_up(ours, theirs)["speed_up"] == 1.0
    assert measure.speed_up(ours, {"turns": [3.0, 6.0, 2.0]})["speed_up"] == 3.0
    assert measure.speed_up(ours, None) == {}


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
    assert saved_bytes(layer, partial(layer, x)) == expected


def test_saved_bytes_keeps_nothing_alive():
    outputs = []

    def forward():
        y = torch.tanh(layer(torch.randn(4, 8)))  # tanh keeps its own output for the backward
        outputs.append(weakref.ref(y))
        return y

    layer = nn.Linear(8, 8)
    assert saved_bytes(layer, forward) == 2 * 4 * 8 * 4
    gc.collect()
    assert outputs[0]() is None


# Results files


def test_of_each_case_the_last_run_counts(tmp_path):
    def save(date: str, *records: tuple[int, float]) -> None:
        rows = [{"shape": (tokens, 8, 8), "median_ms": time} for tokens, time in records]
        results_file.save(tmp_path / "out.json", {"date": date, "driver": None}, rows)

    save("2026-01-01", (1, 0.5), (2, 1.23456789))
    save("2026-01-02", (3, 3.0), (1, 1.0))
    document = results_file.load(tmp_path / "out.json")
    assert document["runs"] == [
        {"cases": [[2, 8, 8]], "date": "2026-01-01"},
        {"cases": [[3, 8, 8], [1, 8, 8]], "date": "2026-01-02"},
    ]
    assert [(record["shape"][0], record["median_ms"]) for record in document["results"]] == [
        (2, 1.23457),
        (3, 3.0),
        (1, 1.0),
    ]
    assert len((tmp_path / "out.json").read_text().splitlines()) == 2 + 2 + len(document["runs"]) + 2 + 3


def test_results_of_an_example_are_thinned():
    curve = {"train_losses": list(range(1000)), "validation_losses": [[100, 1.0]], "step_seconds": [0.1] * 99}
    source = {"date": "2026-01-01", "device": "a GPU", "driver": "1\n1", "git_commit": "abc", "processes": 2}
    document = results_file.from_example({"provenance": source, "results": [{"recipe": "linear", "curve": curve}]})
    document = json.loads(results_file.dumps(document))
    assert document["runs"] == [
        {"date": "2026-01-01", "device": "a GPU", "driver": "1", "processes": 2, "commit": "abc"}
    ]
    assert document["results"][0]["curve"] == {
        "train_losses": list(range(0, 1000, 10)),
        "validation_losses": [[100, 1.0]],
    }


# Statistics

EFFECTS = {"a": 0.01, "b": -0.02, "c": 0.0}


def synthetic(noise: float, seeds: int = 3) -> list[dict]:
    """Return runs whose seeds differ much, whose recipes differ by EFFECTS, and by chance."""
    draw = random.Random(0)
    return [
        {"recipe": recipe, "seed": seed, "loss": 1.0 + 0.1 * seed + EFFECTS.get(recipe, 0.0) + draw.gauss(0, noise)}
        for recipe in ("linear", AGAIN, *EFFECTS)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("missing", [(), {("a", 2), ("linear", 0)}])
def test_effects_are_found_beside_those_of_the_seeds(missing):
    found = effects([run for run in synthetic(0.0) if (run["recipe"], run["seed"]) not in missing], "loss")
    assert list(found.by_recipe) == ["linear", "a", "b", "c"]
    for recipe, difference in EFFECTS.items():
        assert found.by_recipe[recipe].difference == pytest.approx(difference, abs=1e-12)
    assert found.scatter == pytest.approx(0, abs=1e-12)


def test_scatter_and_standard_errors_are_those_of_the_model():
    found = effects(synthetic(0.002, seeds=400), "loss")
    assert found.degrees_of_freedom == 5 * 400 - 400 - 3
    assert found.scatter == pytest.approx(0.002, rel=0.1)
    # The baseline has twice the runs.
    assert found.by_recipe["a"].standard_error == pytest.approx(found.scatter * (1.5 / 400) ** 0.5)


def test_one_seed_without_a_repeat_has_no_scatter():
    runs = [run for run in synthetic(0.1, seeds=1) if run["recipe"] != AGAIN]
    assert math.isnan(effects(runs, "loss").scatter)


@pytest.mark.parametrize(
    ("relative", "error", "expected"),
    [
        (0.001, 0.0004, "within"),
        (-0.001, 0.001, "within, not certain"),
        (0.003, 0.001, "outside, not certain"),
        (0.01, 0.001, "worse"),
        (-0.01, 0.001, "better"),
        (0.0, math.nan, "–"),
    ],
)
def test_a_verdict_is_certain_beyond_two_standard_errors(relative, error, expected):
    assert pages.verdict(relative, error) == expected


# The models


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
