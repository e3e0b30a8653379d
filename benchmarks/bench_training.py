"""Train a GPT on Python sources to the end, with every recipe from several seeds.

    python benchmarks/bench_training.py
    CUDA_VISIBLE_DEVICES=1 python benchmarks/bench_training.py --recipe switchback --recipe rowwise

Everything but the linear layers is the same for all recipes: for each seed the initial weights, the
data and their order. nn.Linear runs twice, to show chance alone. docs/training.md has the outcome.
The results are written after every recipe, and those of other recipes are kept, so that a run can
be split over several commands and GPUs. A recipe takes about 40 seconds per seed on an H200.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import peers
import results_file
from demo import GPT, PRESETS, Corpus, Run, Settings, load_corpus
from measure import RESULTS, reason_of
from peers import compile_in_place, convert
from results_file import Record
from torch_switchback import SwitchBackConfig
from training_statistics import AGAIN

OURS: dict[str, SwitchBackConfig | None] = {
    "linear": None,
    AGAIN: None,  # from weights that are larger by a millionth, to see how far runs of one recipe end apart by chance
    **{name: peers.RECIPES[name] for name in ("switchback", "switchback_memory_efficient", "rowwise")},
    "all int8": peers.RECIPES["switchback_int8_grad_weight"],
    "all int8, not rotated": SwitchBackConfig(grad_weight="int8", rotate_tokens=None, min_tokens=0),
}
RECIPES = (*OURS, "torchao float8 tensorwise")
SNR_SEED = 0
to_recipe = partial(convert, recipes=OURS)


def train(recipe: str, seed: int, corpus: Corpus, preset_name: str, steps: int, final_batches: int) -> Record:
    """Train once and return the record. If the run fails, the record has a ``reason``."""
    preset = PRESETS[preset_name]
    record: Record = {"recipe": recipe, "seed": seed}
    settings = Settings(preset_name, [recipe], steps, seed, preset.learning_rate, compile=False)
    checkpoints = {0, steps // 2 // preset.steps_per_sync * preset.steps_per_sync, steps}
    snr: list[Record] = []

    def on_progress(run: Run) -> None:
        if (recipe, seed) == ("linear", SNR_SEED) and run.step in checkpoints:
            snr.extend({"step": run.step} | found for found in gradient_snr(run))

    try:
        run = Run(recipe, settings, corpus, convert=to_recipe)
        if recipe == AGAIN:
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(1 + 1e-6)
        for block in run.model.blocks:  # one by one: they share one graph, and so do the seeds
            compile_in_place(block, "compiled", tiny=preset_name == "tiny")
        on_progress(run)
        run.train(lambda: False, on_progress)
        final_loss = run.validation_loss(final_batches)
    except Exception as error:  # another library can fail in any way
        return record | {"reason": reason_of(error)}
    return record | {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "tokens": steps * preset.batch_size * preset.model.context,
        "final_validation_loss": final_loss,
        "validation_losses": run.curve.validation_losses,
        "first_loss": run.curve.train_losses[0],
        "gradient_snr": snr or None,
    }


def gradient_snr(run: Run) -> list[Record]:
    """Measure the noise of the whole network's weight gradient, for each recipe.

    All take the gradient at the weights that a run has reached, on the batch that it reads next,
    under its autocast. The reference is nn.Linear's in float32.
    """
    preset = run.preset
    batch = run.corpus.train_batch(preset.batch_size, preset.model.context, seed=run.settings.seed, step=run.step)
    inputs, targets = (part.to(run.device) for part in batch)

    def gradients(recipe: str, bf16: bool) -> dict[str, Tensor]:
        with run.device:
            model = GPT(preset.model)
        model.load_state_dict(run.model.state_dict())
        to_recipe(model, recipe)
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=bf16):
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with sdpa_kernel(SDPBackend.MATH):  # others may round float32 to TF32
        exact = gradients("linear", bf16=False)
    signal = {name: gradient.double().square().sum() for name, gradient in exact.items()}
    records = []
    for recipe in RECIPES:
        if recipe == AGAIN:
            continue
        try:
            found = gradients(recipe, bf16=True)
        except Exception as error:
            records.append({"recipe": recipe, "reason": reason_of(error)})
            continue
        noise = {name: (gradient.double() - exact[name]).square().sum() for name, gradient in found.items()}
        worst = min(decibels(signal[name], noise[name]) for name in exact if exact[name].ndim == 2)
        snr = decibels(sum(signal.values()), sum(noise.values()))
        records.append({"recipe": recipe, "snr": snr, "worst_layer_snr": worst})
    return records


def decibels(signal: Tensor, noise: Tensor) -> float:
    return round((10 * torch.log10(signal / noise)).item(), 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a GPT with every recipe from several seeds.")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="may be repeated; by default all")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU; shows only that the script runs")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/<device>/bench_training.json")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs on the CPU")
    run = results_file.provenance("cpu" if arguments.tiny else "cuda")
    path = arguments.output or (None if arguments.tiny else RESULTS / results_file.folder(run) / "bench_training.json")

    preset = "tiny" if arguments.tiny else "gpu"
    # The standard library, and everything that is installed beside torch.
    roots = [Path(sysconfig.get_path("stdlib"))] + ([] if arguments.tiny else [Path(torch.__file__).parents[1]])
    corpus = load_corpus(*roots)
    protocol = {"steps": arguments.steps, "final_batches": 4 if arguments.tiny else 128, "files": corpus.files}
    protocol |= {"train_bytes": len(corpus.train), "validation_bytes": len(corpus.validation), "sha256": corpus.sha256}
    protocol["validation_batches"] = PRESETS[preset].validation_batches
    if path is not None and path.exists():
        if any(other["protocol"] != protocol for other in results_file.load(path)["runs"]):
            parser.error(f"{path} has runs with another protocol or corpus; move it away")
    results = []
    for recipe in arguments.recipe or RECIPES:
        for seed in range(arguments.seeds):
            results.append(train(recipe, seed, corpus, preset, protocol["steps"], protocol["final_batches"]))
            print(
                {key: value for key, value in results[-1].items() if isinstance(value, int | float | str)}, flush=True
            )
        if path is not None:
            results_file.save(path, run | {"protocol": protocol}, results)


if __name__ == "__main__":
    main()
