"""open_clip's own training program, unmodified, through the bitsandbytes bridge, on the CPU."""

import csv
import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("open_clip_train")

import open_clip
from PIL import Image
from tasks import assert_falls, converted, signal_to_noise

import torch_switchback as ts

TOWER = {"width": 64, "layers": 2, "heads": 2}
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 32, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, **TOWER},
}
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
MLPS = [
    f"{tower}transformer.resblocks.{block}.mlp.{layer}"
    for tower in ("visual.", "")
    for block in (0, 1)
    for layer in ("c_fc", "c_proj")
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    return path


def train(model_path, cwd, *arguments):
    command = [sys.executable, "-m", "torch_switchback.integrations.bitsandbytes", "-m", "open_clip_train.main"]
    command += ["--model", f"local-dir:{model_path}", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
    command += ["--batch-size", "8", "--lr", "3e-3", "--warmup", "1", "--log-every-n-steps", "1"]
    command += ["--use-bnb-linear", "SwitchBackLinearGlobal", "--logs", "logs", "--name", "run", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_training_program_learns_and_saves(model_path, tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for colour in COLOURS:
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
            rows.writerow([tmp_path / f"{colour}.png", f"a {colour} square"])
    data = ["--dataset-type", "csv", "--train-data", "pairs.csv", "--csv-img-key", "path"]
    data += ["--csv-caption-key", "caption", "--csv-separator", ",", "--epochs", "25", "--save-frequency", "25"]
    output = train(model_path, tmp_path, *data)
    for layer in ("c_fc", "c_proj"):  # it prints its model, equal blocks once
        assert output.count(f"({layer}): SwitchBackLinear(") == 2
        assert f"({layer}): Linear(" not in output
    losses = [float(loss) for loss in re.findall(r"Contrastive_loss: ([\d.]+)", output)]
    assert len(losses) == 25
    assert_falls(losses, to=0.7)

    # What it saved is a plain model's.
    saved = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_25.pt", weights_only=True)
    plain = open_clip.create_model(f"local-dir:{model_path}")
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert not converted(plain)
    check_inference_mode_and_revert(plain)


def check_inference_mode_and_revert(plain):
    """As the program prepares its layers to evaluate, ``convert_int8_model_to_inference_mode``, and back."""
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


def test_synthetic_data(model_path, tmp_path):
    output = train(model_path, tmp_path, "--dataset-type", "synthetic", "--train-num-samples", "16", "--epochs", "1")
    losses = [float(loss) for loss in re.findall(r"Contrastive_loss: ([\d.]+)", output)]
    # All pairs are one pair: nothing can be learnt, and the loss is log(8) whatever the model.
    assert losses == pytest.approx([torch.tensor(8.0).log().item()] * 2, abs=1e-3)
