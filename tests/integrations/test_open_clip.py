"""open_clip's own training program, unmodified, through the bitsandbytes bridge, on the CPU."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip_train")

import open_clip
from tasks import assert_falls, converted, signal_to_noise

import torch_switchback as ts
import train_open_clip

MLPS = [
    f"{tower}transformer.resblocks.{block}.mlp.{layer}"
    for tower in ("visual.", "")
    for block in (0, 1)
    for layer in ("c_fc", "c_proj")
]


def run(*arguments, cwd):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(output):
    return [float(loss) for loss in re.findall(r"Contrastive_loss: ([\d.]+)", output)]


def test_training_program_learns_and_saves(tmp_path):
    script = Path(train_open_clip.__file__)
    output = run(script, "--out", tmp_path, cwd=tmp_path)
    for layer in ("c_fc", "c_proj"):  # it prints its model, equal blocks once
        assert output.count(f"({layer}): SwitchBackLinear(") == 2
        assert f"({layer}): Linear(" not in output
    assert len(losses(output)) == 25
    assert_falls(losses(output), to=0.7)

    # What it saved is a plain model's.
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch_25.pt", weights_only=True)
    plain = open_clip.create_model(f"local-dir:{tmp_path}")
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert not converted(plain)
    check_inference_mode_and_revert(plain)


def check_inference_mode_and_revert(plain):
    """Prepare the layers as the program does to evaluate, ``convert_int8_model_to_inference_mode``, and revert."""
    images, texts = torch.randn(4, 3, 32, 32), open_clip.get_tokenizer("ViT-B-32")(["red", "a blue one"])[:, :16]

    @torch.no_grad()
    def encode(model):
        model.eval()
        return torch.cat((model.encode_image(images), model.encode_text(texts)))

    expected = encode(plain)
    names = [name for name, module in plain.named_modules() if name in MLPS]
    assert sorted(names) == sorted(MLPS)
    ts.convert_to_switchback(plain, module_filter_fn=lambda module, fqn: fqn in MLPS)
    trained = encode(plain)
    assert 25 < signal_to_noise(trained, expected) < 70
    open_clip.utils.convert_int8_model_to_inference_mode(plain)
    assert all(plain.get_submodule(name).is_prepared for name in MLPS)
    assert torch.equal(encode(plain), trained)
    ts.revert_switchback(plain)
    assert not converted(plain)
    assert signal_to_noise(encode(plain), expected) > 25


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_low_precision_weights_are_converted_by_name(precision, tmp_path):
    """With them open_clip's own replacement fails: it makes float32 layers, whatever the layers' class."""
    train_open_clip.tiny(tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}", precision=precision)
    tokens = open_clip.get_tokenizer("ViT-B-32")(["red"])[:, :16]
    expected = model.encode_text(tokens)
    ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: fqn in MLPS)
    actual = model.encode_text(tokens)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert signal_to_noise(actual, expected) > 25
    actual.sum().backward()


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_synthetic_data(precision, tmp_path):
    train_open_clip.tiny(tmp_path)
    command = ["-m", "torch_switchback.integrations.bitsandbytes", "-m", "open_clip_train.main"]
    command += ["--model", f"local-dir:{tmp_path}", "--use-bnb-linear", "SwitchBackLinearVectorwise"]
    command += ["--dataset-type", "synthetic", "--train-num-samples", "16", "--batch-size", "8", "--epochs", "1"]
    command += ["--device", "cpu", "--precision", precision, "--workers", "0", "--log-every-n-steps", "1"]
    # All pairs are one pair: nothing can be learned, and the loss is log(8) whatever the model.
    assert losses(run(*command, cwd=tmp_path)) == pytest.approx([math.log(8)] * 2, abs=1e-3)
