"""Does it train as well? A GPT on Python sources and a ViT on digits, with every recipe from several seeds.

    python benchmarks/bench_training.py                  # on all GPUs of this host, a run on each at a time
    python benchmarks/bench_training.py --device cpu --tiny

For each seed all recipes start from the same weights and read the same data in the same order, so that differences are
the recipe's and chance's; nn.Linear runs twice, to show chance alone. docs/training.md says what came out. The JSON is
written after every run; called again with the same --output, the script goes on with the runs that it lacks.
"""

import itertools
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from demo import PRESETS, load_corpus
from measure import SKIPPED, Bench, BudgetFlag, DeviceFlag, OutputFlag, Record, TinyFlag, new_app, reason_of
from training_runs import RECIPES, TASKS, Job, Plan, run_job, save_corpus

app = new_app()


class Workers:
    """A process for each device, each with one job at a time."""

    def __init__(self, devices: Sequence[str | None]) -> None:
        """devices: as CUDA_VISIBLE_DEVICES has them, which makes each the only one; None: this process's."""
        self._pools = []
        for device in devices:
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            previous = os.environ.get("CUDA_VISIBLE_DEVICES")
            if device is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = device
            pool.submit(os.getpid)  # starts the process
            if previous is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = previous
            elif device is not None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            self._pools.append(pool)

    def run(self, queue: "Queue", plan: Plan, corpus_folder: Path) -> Iterator[Record]:
        """The records of the queue's jobs, as they are finished."""
        running: dict[Future[Record], tuple[int, Job]] = {}
        idle = list(range(len(self._pools)))
        while True:
            for worker in idle.copy():
                job = queue.take(worker, plan.deadline - time.time())
                if job is not None:
                    running[self._pools[worker].submit(run_job, job, plan, corpus_folder)] = (worker, job)
                    idle.remove(worker)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                worker, job = running.pop(future)
                try:
                    record = future.result()
                    idle.append(worker)
                except Exception as error:  # the process has died, and takes no more jobs
                    record = failed(job, reason_of(error))
                queue.report(record)
                yield record

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


class Queue:
    """The jobs that are left, and who should take which."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.left = list(jobs)
        self._compiled: dict[int, set[str]] = {}
        self._longest = dict.fromkeys(TASKS, 0.0)  # seconds

    def take(self, worker: int, seconds_left: float) -> Job | None:
        """The next job for a worker that fits into the time that is left, going by the longest of its task so far."""
        fitting = [job for job in self.left if self._longest[job.task] < seconds_left]
        if not fitting:
            return None
        compiled = self._compiled.setdefault(worker, set())
        waiting = [(job.task, job.recipe) for job in fitting]
        # A recipe that this worker has compiled; else that of which most is left, which others compile least likely.
        job = min(
            fitting,
            key=lambda job: (
                TASKS.index(job.task),
                job.recipe not in compiled,
                -waiting.count((job.task, job.recipe)),
            ),
        )
        self.left.remove(job)
        compiled.add(job.recipe)
        return job

    def report(self, record: Record) -> None:
        if record["reason"] is None:
            self._longest[record["task"]] = max(self._longest[record["task"]], record["seconds"])


def failed(job: Job, why: str) -> Record:
    return {"task": job.task, "name": job.recipe, "seed": job.seed, "reason": why}


def job_of(record: Record) -> Job:
    return Job(record["task"], record["name"], record["seed"])


def visible_devices(device: str) -> list[str | None]:
    if device == "cpu":
        return [None]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return listed.split(",")[:count] if listed else [str(index) for index in range(count)]


def source_roots(tiny: bool) -> list[Path]:
    """The standard library, and everything that is installed beside torch."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    return roots if tiny else [*roots, Path(torch.__file__).parents[1]]


def earlier_results(path: Path | None, protocol: Record) -> list[Record]:
    """The finished runs of a file. Raises BadParameter if they followed another protocol."""
    if path is None or not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("protocol") != protocol:
        raise typer.BadParameter(f"{path} holds runs of another protocol or corpus; move it away")
    return [record for record in document["results"] if record["reason"] is None]


@app.command(help="A GPT and a ViT trained with every recipe from several seeds.")
def main(
    device: DeviceFlag = "cuda",
    budget: BudgetFlag = 310.0,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
    steps: Annotated[int, typer.Option(min=2, help="of the GPT")] = 1000,
    digits_steps: Annotated[int, typer.Option(min=2, help="of the ViT")] = 150,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    only: Annotated[str, typer.Option("--only", help="gpt or digits")] = "",
) -> None:
    deadline = time.time() + budget
    bench = Bench(
        "bench_training",
        device=device,
        seconds=0.0,
        tiny=tiny,
        output=output,
        budget=budget,
        steps=steps,
        digits_steps=digits_steps,
        seeds=seeds,
    )
    plan = Plan(device, tiny, steps, digits_steps, final_batches=4 if tiny else 128, deadline=deadline)
    devices = visible_devices(device)
    workers = Workers(devices)  # before the corpus, so that they import meanwhile
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(*source_roots(tiny))
        save_corpus(corpus, Path(folder))
        protocol = {
            "preset": asdict(PRESETS[plan.preset_name]),
            "steps": steps,
            "digits_steps": digits_steps,
            "final_batches": plan.final_batches,
            "corpus": {
                "files": corpus.files,
                "train_bytes": len(corpus.train),
                "validation_bytes": len(corpus.validation),
                "sha256": corpus.sha256,
            },
        }
        del corpus
        bench.console.print(f"{len(devices)} devices, {protocol['corpus']}")
        bench.results += earlier_results(bench.output, protocol)
        done = {job_of(record) for record in bench.results}
        # The first run also measures the gradients of all recipes, so it starts first.
        jobs = [Job(*each) for each in itertools.product(TASKS, RECIPES, range(seeds)) if only in each[0]]
        queue = Queue([job for job in jobs if job not in done])
        for record in workers.run(queue, plan, Path(folder)):
            bench.results.append(record)
            bench.report(protocol=protocol)
            bench.console.print(progress(record), markup=False, highlight=False)
        bench.results += [failed(job, SKIPPED) for job in queue.left]
    bench.report(protocol=protocol)
    workers.close()
    bench.finish()


def progress(record: Record) -> str:
    figures = {key: record[key] for key in ("final_validation_loss", "test_loss", "seconds", "reason") if key in record}
    return f"{record['task']} {record['name']} seed {record['seed']}: {figures}"


if __name__ == "__main__":
    app()
