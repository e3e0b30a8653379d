"""Fine-tune a Llama with Hugging Face's Trainer, its linear layers in SwitchBack.

    python examples/finetune_llama.py           # a random Llama, small or for a GPU, on bytes of text
    python examples/finetune_llama.py --model path/to/llama --out runs/llama

Needs pip install 'transformers>=5,<6' accelerate. finetune_lora.py trains adapters instead.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from corpus import Corpus, load_corpus
from torch_switchback import SwitchBackConfig
from torch_switchback.integrations.transformers import SwitchBackCallback

CPU = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
GPU = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a corpus, whose bytes are the tokens."""

    def __init__(self, corpus: Corpus, context: int) -> None:
        self.bytes, self.context = corpus.train, context

    def __len__(self) -> int:
        return len(self.bytes) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.bytes[index * self.context :][: self.context].long()
        return {"input_ids": window, "labels": window}


@app.command(help="Fine-tune a Llama with Hugging Face's Trainer and SwitchBack.")
def main(
    model: Annotated[str | None, typer.Option(help="of from_pretrained; by default a small random one")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    monitor_every: Annotated[int, typer.Option(min=0, help="steps from one sample of the noise to the next")] = 20,
    seed: Annotated[int, typer.Option(help="of the weights and the data order")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="the trained model")] = Path("runs/llama"),
) -> None:
    is_cuda = torch.cuda.is_available()
    torch.manual_seed(seed)
    context = 1024 if is_cuda else 64
    if model is None:
        config = LlamaConfig(vocab_size=256, max_position_embeddings=context, **(GPU if is_cuda else CPU))
        llama = LlamaForCausalLM(config)
    else:
        llama = AutoModelForCausalLM.from_pretrained(model)
    monitoring: dict[str, Any] = {}
    if monitor_every:
        monitoring = {"monitor_every": monitor_every, "monitor_layers": "*.mlp.down_proj"}
    callback = SwitchBackCallback(
        **monitoring,
        config=SwitchBackConfig(min_tokens=None if is_cuda else 0),  # int8 also where the small model gains nothing
        module_filter_fn=lambda module, fqn: "layers." in fqn,
    )
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        learning_rate=3e-4 if is_cuda else 3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        per_device_train_batch_size=16 if is_cuda else 8,
        bf16=is_cuda,
        use_cpu=not is_cuda,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(llama, arguments, train_dataset=Windows(load_corpus(), context), callbacks=[callback])
    trainer.train()
    trainer.save_model(str(out))
    report(trainer, out)


def report(trainer: Trainer, out: Path) -> None:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token; saved in {out}")
    for entry in history:
        noise = [value for tag, value in entry.items() if tag.endswith("/output_snr")]
        if noise:
            print(
                f"step {entry['switchback_step']}: outputs of the down projections {min(noise):.1f} dB above the noise"
            )


if __name__ == "__main__":
    app()
