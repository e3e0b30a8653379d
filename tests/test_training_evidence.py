"""The evidence on training: its runs, its queue, its statistics, its page, on toys."""

import json
import math
import random
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")
pytest.importorskip("typer", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import typer
from typer.testing import CliRunner

import bench_training
import draw
import grad_weight_snr
import measure
import training_page
import training_runs
from bench_training import Queue
from demo import load_corpus
from training_runs import AGAIN, RECIPES, TASKS, Job, Plan, run_job
from training_statistics import effects, repeated_scatter, text_error

ROOT = Path(__file__).parents[1]
TORCHAO = "torchao float8 tensorwise"


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    training_runs.save_corpus(load_corpus(ROOT / "src", minimum_bytes=1000, block_bytes=256), folder)
    return folder


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan("cpu", tiny=True, steps=10, digits_steps=2, final_batches=3, deadline=math.inf)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine take longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SEEDS = {0: RECIPES, 1: ("linear", AGAIN, "all int8, not rotated")}


@pytest.fixture(scope="module")
def records(corpus_folder, plan) -> list[dict]:
    """The GPT with every recipe, as the script has them, through JSON. Compiled runs are the script's test."""
    with torch.compiler.set_stance("force_eager"):
        finished = [run_job(Job("gpt", name, seed), plan, corpus_folder) for seed in SEEDS for name in SEEDS[seed]]
    return json.loads(json.dumps(finished))


@pytest.fixture(scope="module")
def results(records, tmp_path_factory) -> Path:
    """A folder of results as the repository has it."""
    folder = tmp_path_factory.mktemp("results")
    output = folder / training_page.TRAINING
    bench = measure.Bench("bench_training", device="cpu", seconds=0.0, tiny=True, output=output)
    bench.results += records
    corpus = {"files": 1, "train_bytes": 2_000_000, "validation_bytes": 3_000_000, "sha256": "4"}
    bench.report(protocol={"steps": 10, "final_batches": 3, "corpus": corpus})
    arguments = ["--tiny", "--output", str(folder / training_page.GRAD_WEIGHT)]
    assert CliRunner().invoke(grad_weight_snr.app, arguments).exit_code == 0
    return folder


# The runs


def test_every_recipe_trains_or_says_why_not(records):
    assert [(record["name"], record["seed"]) for record in records] == [(n, s) for s in SEEDS for n in SEEDS[s]]
    for record in records:
        if record["reason"] is not None:
            assert record["name"] == TORCHAO
            continue
        assert record["final_validation_loss"] < 5.0 < 5.5 < math.log(256)
        assert len(record["train_losses"]) == 10 and len(record["final_validation_losses"]) == 3
        mean = sum(record["final_validation_losses"]) / 3
        assert record["final_validation_loss"] == pytest.approx(mean, abs=1e-5)


def test_runs_of_a_seed_are_paired(records):
    """The first loss is that of the initial weights on the first batch, whatever the layers' rounding."""
    for seed in SEEDS:
        first = [r["train_losses"][0] for r in records if r["seed"] == seed and r["reason"] is None]
        assert max(first) - min(first) < 0.01
    apart = [abs(a - b) for a, b in zip(records[0]["train_losses"], records[-1]["train_losses"], strict=True)]
    assert records[0]["seed"] != records[-1]["seed"] and max(apart) > 0.01


def test_a_run_of_the_same_seed_is_the_same_and_again_is_not_quite(records, corpus_folder, plan):
    again, first = (next(r for r in records if (r["name"], r["seed"]) == (n, 1)) for n in (AGAIN, "linear"))
    with torch.compiler.set_stance("force_eager"):
        repeated = run_job(Job("gpt", "linear", 1), plan, corpus_folder)
    assert repeated["final_validation_loss"] == first["final_validation_loss"]
    assert 0 < abs(again["final_validation_loss"] - first["final_validation_loss"]) < 1e-3


def test_gradients_of_every_recipe_at_three_checkpoints(records):
    snr = records[0]["gradient_snr"]
    assert not any(record.get("gradient_snr") for record in records[1:])
    assert {(r["step"], r["name"]) for r in snr} == {(s, n) for s in (0, 5, 10) for n in RECIPES if n != AGAIN}
    for record in snr:
        if record["reason"] is None:
            assert record["worst_layer_snr"] <= record["snr"] + 10
            # bf16 keeps 8 bits of each value, int8 fewer.
            low, high = (44, 60) if record["name"] == "linear" else (20, 52)
            assert low < record["snr"] < high


def test_an_exact_recipe_has_no_noise_but_bf16s(corpus_folder, plan, monkeypatch):
    monkeypatch.setattr(training_runs, "RECIPES", ("linear",))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    with torch.compiler.set_stance("force_eager"):
        snr = run_job(Job("gpt", "linear", 0), plan, corpus_folder)["gradient_snr"]
    assert all(record["snr"] > 100 for record in snr)


def test_a_run_stops_at_the_deadline(corpus_folder, plan):
    record = run_job(Job("gpt", "linear", 1), plan._replace(deadline=time.time()), corpus_folder)
    assert record["reason"] == measure.SKIPPED


def test_a_peer_that_fails_is_a_result(corpus_folder, plan, monkeypatch):
    def fail(*_):
        raise RuntimeError("no float8 here\nand more")

    monkeypatch.setattr(training_runs, "to_recipe", fail)
    record = run_job(Job("gpt", TORCHAO, 0), plan, corpus_folder)
    assert record["reason"] == "RuntimeError: no float8 here"


def test_digits(plan, corpus_folder):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    long = plan._replace(digits_steps=60)
    for name in ("linear", "all int8"):
        record = run_job(Job("digits", name, 0), long, corpus_folder)
        assert record["reason"] is None
        assert record["test_accuracy"] > 0.8
        assert record["test_loss"] < 0.8
    one, other = (training_runs.Digits.load(seed, torch.device("cpu")) for seed in (0, 1))
    assert len(one.test[0]) == 449 and len(one.train[0]) == 1348
    assert not torch.equal(one.test[0], other.test[0])


# The queue


def jobs(tasks=TASKS, recipes=("a", "b"), seeds=2):
    return [Job(task, recipe, seed) for task in tasks for recipe in recipes for seed in range(seeds)]


def test_a_worker_keeps_to_what_it_has_compiled():
    queue = Queue(jobs(["gpt"], "abc"))
    taken = [queue.take(worker, 100.0) for worker in (0, 1, 0, 1, 0, 1)]
    assert [job.recipe for job in taken] == ["a", "b", "a", "b", "c", "c"]
    assert queue.take(0, 100.0) is None and queue.left == []


def test_the_gpt_comes_first():
    queue = Queue(jobs())
    assert [queue.take(0, 100.0).task for _ in range(8)] == ["gpt"] * 4 + ["digits"] * 4


def test_nothing_starts_that_would_not_finish():
    queue = Queue(jobs())
    first = queue.take(0, 1.0)
    queue.report({"task": first.task, "reason": None, "seconds": 50.0})
    assert queue.take(0, 49.0).task == "digits"
    assert queue.take(0, 51.0).task == "gpt"
    assert queue.take(0, 0.0) is None


# Statistics


def synthetic(noise: float, seeds: int = 3) -> list[dict]:
    """Runs whose seeds differ much, whose recipes differ by what `EFFECTS` says, and by chance."""
    draw = random.Random(0)
    return [
        {"name": name, "seed": seed, "loss": 1.0 + 0.1 * seed + EFFECTS.get(name, 0.0) + draw.gauss(0, noise)}
        for name in ("linear", AGAIN, *EFFECTS)
        for seed in range(seeds)
    ]


EFFECTS = {"a": 0.01, "b": -0.02, "c": 0.0}


def test_effects_are_found_beside_those_of_the_seeds():
    found = effects(synthetic(0.0), "loss")
    assert list(found.by_recipe) == ["linear", "a", "b", "c"]
    for name, difference in EFFECTS.items():
        assert found.by_recipe[name].difference == pytest.approx(difference, abs=1e-12)
    assert found.scatter == pytest.approx(0, abs=1e-12)
    assert found.baseline == pytest.approx(1.1)
    assert len(found.by_recipe["linear"].values) == 6


def test_a_missing_run_does_not_bias():
    complete = synthetic(0.0)
    found = effects([r for r in complete if (r["name"], r["seed"]) not in {("a", 2), ("linear", 0)}], "loss")
    assert found.by_recipe["a"].difference == pytest.approx(EFFECTS["a"], abs=1e-12)


def test_scatter_and_standard_errors_are_those_of_the_model():
    runs = synthetic(0.002, seeds=400)
    found = effects(runs, "loss")
    assert found.degrees_of_freedom == 5 * 400 - 400 - 3
    assert found.scatter == pytest.approx(0.002, rel=0.1)
    # The baseline has twice the runs.
    assert found.by_recipe["a"].standard_error == pytest.approx(found.scatter * (1.5 / 400) ** 0.5)
    assert repeated_scatter(runs, "loss") == pytest.approx(0.002, rel=0.2)


def test_one_seed_and_no_repeat_have_no_scatter():
    runs = [run for run in synthetic(0.1, seeds=1) if run["name"] != AGAIN]
    assert math.isnan(effects(runs, "loss").scatter)
    assert math.isnan(repeated_scatter(runs, "loss"))


def test_the_texts_share_is_of_paired_differences():
    runs = [{"name": "linear", "seed": 0, "final_validation_losses": [1.0, 5.0, 9.0, 2.0]}]
    runs.append({"name": "a", "seed": 0, "final_validation_losses": [1.1, 5.3, 9.1, 2.3]})
    assert text_error(runs) == pytest.approx(0.2 / 3**0.5 / 2, rel=1e-5)


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
    assert training_page.verdict(relative, error) == expected


# The page and the pictures


def test_the_page_holds_what_the_committed_results_say():
    page = training_page.PAGE.read_text(encoding="utf-8")
    assert training_page.fill(page, training_page.RESULTS) == page


def test_every_block_of_the_page_is_filled(results):
    page = "".join(f"<!-- begin: {name} -->\noutdated\n<!-- end -->\nprose\n" for name in training_page.BLOCKS)
    filled = training_page.fill(page, results)
    assert filled.count("prose") == len(training_page.BLOCKS) and "outdated" not in filled
    assert "| all int8, not rotated | 2 |" in filled and "after 5 steps" in filled
    assert filled.count(training_page.MISSING) == 1  # the digits
    assert training_page.fill(filled, results) == filled
    assert training_page.fill(page, Path("nowhere")).count(training_page.MISSING) == len(training_page.BLOCKS)


def test_what_has_no_result_is_named_with_its_reason():
    records = [{"name": "a", "seed": 1, "reason": "no time"}, {"name": "b", "seed": 2, "reason": None}]
    assert training_page.skipped(records) == "\nWithout a (seed 1): no time.\n"


def test_pictures(results, tmp_path):
    for folder in ("h200", "cpu"):
        assert CliRunner().invoke(draw.app, [str(results / folder), "--out", str(tmp_path)]).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"training.png", "grad_weight_snr.png"}


# The script


class HereAndNow:
    """Workers that are this process."""

    def __init__(self, devices):
        pass

    def run(self, queue, plan, corpus_folder):
        while job := queue.take(0, plan.deadline - time.time()):
            yield run_job(job, plan, corpus_folder)

    def close(self):
        pass


def test_the_script_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_training, "Workers", HereAndNow)
    output = tmp_path / "bench_training.json"
    flags = ["--device", "cpu", "--tiny", "--steps", "2", "--seeds", "1", "--only", "gpt", "--output", str(output)]
    finished = CliRunner().invoke(bench_training.app, [*flags, "--budget", "0"])
    assert finished.exit_code == 0, finished.output
    records = json.loads(output.read_text())["results"]
    assert [record["name"] for record in records] == list(RECIPES)
    assert {record["reason"] for record in records} == {measure.SKIPPED}

    document = json.loads(output.read_text())
    kept = {"task": "gpt", "seed": 0, "reason": None, "final_validation_loss": 1.0, "gradient_snr": []}
    document["results"] = [kept | {"name": name} for name in RECIPES if name != "rowwise"]
    output.write_text(json.dumps(document))
    finished = CliRunner().invoke(bench_training.app, flags)
    assert finished.exit_code == 0, finished.output
    records = json.loads(output.read_text())["results"]
    assert [record["name"] for record in records if "tokens" in record] == ["rowwise"]
    assert len(records) == len(RECIPES) and {record["reason"] for record in records} == {None}

    with pytest.raises(typer.BadParameter, match="another protocol"):
        bench_training.earlier_results(output, document["protocol"] | {"steps": 3})


def test_a_worker_that_dies_costs_its_job_only(plan):
    workers = bench_training.Workers([None, None])
    queue = Queue([Job("gpt", "linear", 0), Job("die", "linear", 0)])
    queue._longest["die"] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_training, "TASKS", ("gpt", "die"))
        patch.setattr(bench_training, "run_job", die_or_finish)
        records = list(workers.run(queue, plan, Path()))
    workers.close()
    assert {record["task"]: record["reason"] is None for record in records} == {"gpt": True, "die": False}


def die_or_finish(job: Job, plan: Plan, corpus_folder: Path) -> dict:
    if job.task == "die":
        import os

        os._exit(1)
    return {"task": job.task, "name": job.recipe, "seed": job.seed, "reason": None, "seconds": 0.0}
