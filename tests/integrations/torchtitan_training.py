"""Run torchtitan's Trainer with the converter, for test_torchtitan.py, in a process and an empty folder of its own.

It trains, resumes from the middle, loads without the converter, and reverts.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torchtitan.tools import utils

if not torch.accelerator.is_available():
    # torchtitan then takes torch.cuda for the device; its other modules import these two by name.
    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("device_count", "set_device", "synchronize")},
        current_device=lambda: 0,
        get_device_name=lambda device: "CPU",
        get_device_properties=lambda device: SimpleNamespace(total_memory=1),
        memory_stats=lambda device: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
    )

if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13, whose own name for it this is
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout

from tasks import assert_falls, assert_reloads_and_reverts, converted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import FSDPModule
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3.config_registry import llama3_debugmodel_ce_loss
from torchtitan_model import CONFIG, converter, model_spec

from torch_switchback.integrations.torchtitan import SwitchBackTitanLinear

STEPS = 20
WORDS = [f"word{number}" for number in range(100)]


def write_corpus(folder):
    """Texts that go on counting from some word, and a tokenizer for them, as torchtitan's loaders read them."""
    (folder / "corpus").mkdir()
    texts = (" ".join(WORDS[(7 * start + place) % 100] for place in range(100)) for start in range(50))
    (folder / "corpus/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "assets").mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "assets/tokenizer.json"))
    (folder / "assets/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def build(folder, name, *converters, **checkpoint):
    """A Trainer of torchtitan's own configuration for its debug model."""
    config = llama3_debugmodel_ce_loss()
    config.model_spec = model_spec(*converters)
    config.dump_folder = str(folder)
    config.hf_assets_path = str(folder / "assets")
    config.dataloader.dataset_path = str(folder / "corpus")
    config.training.steps = STEPS
    config.training.local_batch_size, config.training.seq_len = 4, 32
    config.training.disable_cuda_graphs = True
    config.debug.seed, config.debug.deterministic = 0, True
    config.validator.enable = False
    config.metrics.enable_tensorboard, config.metrics.save_tb_folder = True, name
    config.checkpoint.enable, config.checkpoint.interval = True, STEPS // 2
    for field, value in checkpoint.items():
        setattr(config.checkpoint, field, value)
    return config.build()


def train(trainer):
    """-> the loss of every step, as torchtitan logged it."""
    config = trainer.config
    trainer.train()
    trainer.close()
    (folder,) = Path(config.dump_folder, config.metrics.save_tb_folder).iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars("loss_metrics/global_avg_loss")]


def main(folder):
    write_corpus(folder)
    trainer = build(folder, "trained", converter())
    losses = train(trainer)
    assert len(losses) == STEPS
    assert_falls(losses, to=0.6)

    resumed = build(folder, "resumed", converter(), load_step=STEPS // 2, load_only=True)
    assert train(resumed) == losses[STEPS // 2 :]

    plain = build(folder, "plain")
    plain.checkpointer.load()
    assert plain.step == STEPS

    (model,), (stock,) = trainer.model_parts, plain.model_parts
    names = [name for name, module in stock.named_modules() if type(module) is Linear]  # FSDP has made lm_head another
    assert len(names) == 2 * 5
    assert converted(model) == names
    for layer in map(model.get_submodule, names):
        assert type(layer) is SwitchBackTitanLinear
        assert layer.config == CONFIG

    tokens = torch.arange(32, device=trainer.device).expand(4, -1)

    def logits(model):
        with trainer.train_context():
            output = model(tokens, tokens)
        for module in model.modules():  # or parameters that were gathered stay, in the place of the model's own
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

    assert_reloads_and_reverts(model, stock, logits)
    assert all(type(model.get_submodule(name)) is Linear for name in names)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
