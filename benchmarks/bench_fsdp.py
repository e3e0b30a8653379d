"""Training steps with FSDP2 on several GPUs: nn.Linear, and SwitchBack with either all-gather, interleaved.

    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py
    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --preset wide --mode compiled --rounds 12

Models and steps are those of examples/train_fsdp.py. All runs start from the same weights, read the same
batches, and take turns of TURN steps. ``median_ms`` is a step's time on the slowest rank, ``speed_up`` the
median over the rounds of nn.Linear's time over a run's. ``loss`` is the validation loss after the last
step, ``peak_bytes`` what a run's model, optimizer and step need, and ``bytes_per_step`` what collectives
move. The learning rate is a quarter of the example's: at that one the first steps are unstable, and any
rounding changes the course of the training.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import results_file
from demo import PRESETS, Corpus, Settings, load_corpus
from measure import RESULTS, ratio, speed_up
from results_file import Record
from train_fsdp import ShardedRun, label, largest_over_ranks, release_memory  # which demo finds

RUNS = (("linear", "high_precision"), ("switchback", "high_precision"), ("switchback", "int8"))
WARM_UP = 8  # steps, which compile
TURN = 5  # steps


def measure(preset: str, mode: str, rounds: int, corpus: Corpus) -> list[Record]:
    """Return a record of each run, for one preset, eager or compiled."""
    defaults = PRESETS[preset]
    steps, rate = WARM_UP + rounds * TURN + 1, defaults.learning_rate / 4
    settings = Settings(preset, ["linear", "switchback"], steps, seed=0, learning_rate=rate, compile=mode == "compiled")
    runs: list[ShardedRun] = []
    records: list[Record] = []
    for recipe, gather in RUNS:
        before = torch.cuda.memory_allocated()
        run = ShardedRun(recipe, gather, settings, corpus, reshard=True)
        for _ in range(WARM_UP - 1):
            run.train_step()
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.train_step()
        runs.append(run)
        found: Record = {"label": f"{preset}, {mode}", "preset": preset, "mode": mode}
        found |= {"recipe": recipe, "all_gather": gather}
        found |= {"parameters": sum(p.numel() for p in run.model.parameters()), "steps": steps}
        found["peak_bytes"] = largest_over_ranks(torch.cuda.max_memory_allocated() - before, run.device) or None
        records.append(found)
    turns: list[list[float]] = [[turn_ms(run) for run in runs] for _ in range(rounds)]
    for index, (run, record) in enumerate(zip(runs, records, strict=True)):
        times = {"turns": [turn[index] for turn in turns]}
        record["median_ms"] = statistics.median(times["turns"])
        record |= speed_up(times, {"turns": [turn[0] for turn in turns]})
        record["tokens_per_s"] = ratio(defaults.batch_size * defaults.model.context * 1e3, record["median_ms"])
        run.counted_step()
        record["bytes_per_step"] = run.bytes_per_step
        record["loss"] = run.validation_loss(defaults.validation_batches)
        if dist.get_rank() == 0:
            name = f"{record['label']}: {label(run)}"
            print(f"{name} {record['median_ms']:.1f} ms, {record['speed_up']:.2f} ×", flush=True)
    return records


def turn_ms(run: ShardedRun) -> float:
    """Return the milliseconds of a step, over TURN steps, on the rank that took longest."""
    synchronize(run.device)
    start = time.perf_counter()
    for _ in range(TURN):
        run.train_step()
    synchronize(run.device)
    milliseconds = torch.tensor((time.perf_counter() - start) / TURN * 1e3, device=run.device)
    dist.all_reduce(milliseconds, dist.ReduceOp.MAX)
    return milliseconds.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["wide", "large"])
    parser.add_argument("--mode", nargs="+", choices=("compiled", "eager"), default=["compiled", "eager"])
    parser.add_argument("--rounds", type=int, default=10, help=f"of turns of {TURN} steps of each run (%(default)s)")
    parser.add_argument("--output", type=Path, help="results file; by default the one of this GPU")
    options = parser.parse_args(argv)
    device = PRESETS[options.preset[0]].device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # one limit for all runs, whose blocks are the same code
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    corpus = load_corpus()
    run = results_file.provenance(device) | {"processes": dist.get_world_size()}
    path = options.output or RESULTS / results_file.folder(run) / "bench_fsdp.json"
    for preset in options.preset:
        for mode in options.mode:
            records = measure(preset, mode, options.rounds, corpus)
            if dist.get_rank() == 0:
                results_file.save(path, run, records)
            release_memory()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
