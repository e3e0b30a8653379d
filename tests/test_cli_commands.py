"""``torch-switchback``'s commands on the CPU, as they are called: what they print, write and exit with."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")
from packaging.requirements import Requirement
from typer.models import OptionInfo
from typer.testing import CliRunner

import torch_switchback as ts
from testing import convert_all
from torch_switchback.analysis import recommendation
from torch_switchback.cli import bench, doctor
from torch_switchback.cli.app import app
from torch_switchback.cli.export import prepared, restored

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": 100,
    "torch_dtype": "float32",
}
MODELS = """
import torch
import torch_switchback as ts
from torch import nn

class Builders:
    def plain():
        return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

def with_sample():
    return Builders.plain(), torch.randn(6, 16)

def converted():
    first = {"0": ts.SwitchBackConfig(min_tokens=0)}
    model = ts.convert_to_switchback(Builders.plain(), config=first)
    return model, {"input": torch.randn(6, 16)}

def no_model():
    return 5

def broken():
    return nn.Linear(8, 8), torch.randn(3, 7)

def raising():
    raise KeyError("no such\\nthing")

def llama():
    layer = lambda: nn.ModuleDict({"q": nn.Linear(32, 32), "v": nn.Linear(32, 16), "up": nn.Linear(32, 48)})
    with torch.device("meta"):
        return nn.ModuleDict({"0": layer(), "1": layer(), "lm_head": nn.Linear(32, 100)})
"""


MEASURED = {"saved_bytes": 1, "speed_up": 1.5, "speed_up_p10": 1.4, "speed_up_p90": 1.6}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "some_models.py").write_text(MODELS)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "list.json").write_text("[1, 2]")
    yield tmp_path
    sys.modules.pop("some_models", None)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def python_m(*arguments):
    command = [sys.executable, "-m", "torch_switchback", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def loaded(*arguments, code=0):
    return json.loads(call(*arguments, "--json", code=code).stdout)


@pytest.mark.parametrize("command", ["doctor", "recommend", "explain", "bench", "tune", "export"])
def test_help_teaches_by_example(command):
    text = call(command, "--help").output
    assert f"torch-switchback {command}" in text and "Examples:" in text and "--json" in text
    assert command in call("--help").output


# doctor


def test_no_metavar_is_taken_for_the_name():
    """typer 0.27.2 makes --RECIPE of metavar="RECIPE" for recipe."""
    for command in app.registered_commands:
        for name, annotation in get_type_hints(command.callback, include_extras=True).items():
            for info in getattr(annotation, "__metadata__", ()):
                if isinstance(info, OptionInfo) and info.metavar:
                    assert info.metavar.lower() != name


def test_doctor_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {finding["name"]: finding for finding in loaded("doctor")}
    assert found["torch"]["detail"].startswith(torch.__version__)
    assert (found["CPU layer"]["status"], found["CPU layer"]["detail"]) == ("ok", "as defined")
    assert found["GPU"]["status"] == "note"
    assert "all is well" in call("doctor").output


@pytest.mark.parametrize(("test", "detail"), [(lambda: False, "other results"), (lambda: 1 / 0, "ZeroDivisionError")])
def test_doctor_exits_with_1_if_a_test_fails(monkeypatch, test, detail):
    monkeypatch.setattr(doctor, "_layer_on_the_cpu", test)
    result = call("doctor", code=1)
    assert "failed  CPU layer" in result.output and detail in result.output
    assert "1 of " in result.output


@pytest.fixture
def a_gpu(monkeypatch):
    """Return a function that makes doctor examine a GPU of an architecture."""
    pytest.importorskip("triton")
    importlib.import_module("torch_switchback.kernels.int8_matmul")  # imports the function itself, not what is patched
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"name": "A GPU", "total_memory": 2**34, "multi_processor_count": 9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def examine(architecture):
        monkeypatch.setattr("torch_switchback.kernels.device.architecture", lambda device: architecture)
        return {finding.name: finding for finding in doctor.examine_gpu()}

    return examine


def test_doctor_says_where_int8_is_never_faster(a_gpu):
    gpu = a_gpu("sm_103")["GPU"]
    assert gpu.status == "note" and gpu.detail.endswith("; sm_103 multiplies int8 more slowly than 16-bit values")


def test_doctor_examines_a_gpu_by_its_table(a_gpu):
    found = a_gpu("sm_130")
    assert found["GPU"].detail == "A GPU, sm_130, 16 GiB, 9 SMs"
    assert found["tiles"].status == "note" and "none for sm_130" in found["tiles"].detail
    assert found["kernel tma"] == ("kernel tma", "note", "not on sm_130")
    if not torch.cuda.is_initialized():
        assert found["kernel pointer"].status == "failed"


# explain


def test_explain_a_function_with_a_sample():
    rows = loaded("explain", "some_models:converted", "--device", "cpu")["layers"]
    assert [(row["fqn"], row["strategy"], row["tokens"]) for row in rows] == [("0", "global", 6), ("2", "Linear", 6)]
    assert "global" in call("explain", "some_models:converted", "--device", "cpu", "--strict").stdout


def test_explain_converts_what_is_not_converted(folder):
    (folder / "map.json").write_text(json.dumps({"1.up": "rowwise"}))
    rows = loaded("explain", "some_models:llama", "--config", "map.json", "--tokens", "5", "--device", "cpu")["layers"]
    strategies = {row["fqn"]: row["strategy"] for row in rows}
    assert strategies.pop("1.up") == "rowwise"
    assert set(strategies.values()) == {"Linear"} and len(strategies) == 6
    assert {row["tokens"] for row in rows} == {5}


def test_explain_strictly(folder):
    (folder / "narrow.py").write_text("import torch\n\ndef model():\n    return torch.nn.Linear(1, 8)\n")
    arguments = ("explain", "narrow:model", "--config", "switchback", "--tokens", "5", "--device", "cpu")
    assert "is wrong at inner dimension 1" in call(*arguments).stdout
    assert "1 of 1 layers fall back" in call(*arguments, "--strict", code=1).stderr


# recommend


def test_recommend_writes_what_convert_takes(folder):
    arguments = ("recommend", "some_models:with_sample", "--recipe", "rowwise", "--seconds", "0", "--device", "cpu")
    found = loaded(*arguments, "--output", "chosen.json")
    config = json.loads((folder / "chosen.json").read_text())
    assert config == found["config"] and set(config) == {"0", "2"}
    assert found["model"]["milliseconds"]["nn.Linear"] > 0
    assert set(found["layers"][0]["milliseconds"]) == {"nn.Linear", "rowwise"}


def test_the_written_configuration_is_for_convert_and_explain(folder, monkeypatch):
    def compare_layers(layers, inputs, **kwargs):
        return [MEASURED | {"name": name, "median_ms": ms} for name, ms in zip(layers, (3.0, 2.0, 1.0), strict=True)]

    monkeypatch.setattr(recommendation, "compare_layers", compare_layers)
    arguments = ("some_models:llama", "--tokens", "6", "--device", "cpu")
    output = call("recommend", *arguments, "--output", "chosen.json").stdout
    assert "the whole model gains was not measured" in output and "written to chosen.json" in output
    config = json.loads((folder / "chosen.json").read_text())
    assert config["0.q"]["mem_efficient"] is True and config["0.q"]["min_tokens"] <= 6 and config["lm_head"] is None
    layer = ts.convert_to_switchback(nn.Linear(32, 32), config={"": config["0.q"]})
    assert asdict(layer.config) == config["0.q"]
    rows = loaded("explain", *arguments, "--config", "chosen.json")["layers"]
    assert {row["fqn"] for row in rows if row["matmuls"]} == {fqn for fqn, fields in config.items() if fields}


def test_recommend_for_a_model_on_the_meta_device():
    arguments = ("recommend", "some_models:llama", "--tokens", "6", "--bf16", "--seconds", "0", "--device", "cpu")
    output = call(*arguments).stdout
    assert "lm_head stays nn.Linear: the LM head" in output and "bfloat16" in output


@pytest.mark.parametrize("when", ["in the first shape", "in the second", "in the model"])
def test_ctrl_c_in_recommend_prints_the_finished_shapes(folder, monkeypatch, when):
    def compare_layers(layers, inputs, **kwargs):
        if inputs[0][0].shape[1] == {"in the first shape": 16, "in the second": 24, "in the model": None}[when]:
            raise KeyboardInterrupt
        return [MEASURED | {"name": name, "median_ms": 1.0 + (name == "nn.Linear")} for name in layers]

    def interrupted(clocks, rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(recommendation, "compare_layers", compare_layers)
    monkeypatch.setattr(recommendation, "interleaved", interrupted)
    result = call("recommend", "some_models:with_sample", "--device", "cpu", "--output", "out.json", code=130)
    assert "1/2  6 tokens, 16 → 24" in result.stderr and "Stopped" in result.stderr
    for partial_result in ("its fastest: 2.00 ×", "the whole model gains was not measured"):
        assert (partial_result in result.stdout) == (when != "in the first shape")
    assert not (folder / "out.json").exists()


# bench


def test_bench_shapes(folder):
    result = loaded(
        *("bench", "--shape", "6,16,24", "--shape", "6,24,16", "--recipe", "rowwise", "--dtype", "float32"),
        *("--seconds", "0", "--device", "cpu", "--output", "bench.json"),
    )
    assert [(row["shape"], row["name"]) for row in result["results"]] == [
        ([6, 16, 24], "nn.Linear"),
        ([6, 16, 24], "rowwise"),
        ([6, 24, 16], "nn.Linear"),
        ([6, 24, 16], "rowwise"),
    ]
    linear, rowwise = result["results"][:2]
    assert linear["speed_up"] == 1 and rowwise["speed_up_p10"] <= rowwise["speed_up"] <= rowwise["speed_up_p90"]
    assert rowwise["median_ms"] > 0 and "turns" not in rowwise
    assert linear["saved_bytes"] == 6 * 16 * 4
    assert json.loads((folder / "bench.json").read_text()) == result


def test_bench_the_layers_of_a_model(folder):
    pytest.importorskip("matplotlib")
    output = call(
        *("bench", "--model", "some_models:llama", "--tokens", "6", "--recipe", "switchback", "--dtype", "float32"),
        *("--seconds", "0", "--device", "cpu", "--picture", "bench.svg"),
    ).stdout
    for shape in ("6, 32 → 32", "6, 32 → 16", "6, 32 → 48", "6, 32 → 100"):
        assert output.count(shape) == 2
    assert "switchback" in (folder / "bench.svg").read_text()


def test_a_candidate_that_fails_is_a_row_with_the_reason(monkeypatch):
    def broken(name, shape, device, dtype):
        if name != "nn.Linear":
            raise RuntimeError(f"no {name} here")
        return nn.Linear(shape.in_features, shape.out_features)

    monkeypatch.setattr(bench, "new_layer", broken)
    flags = ("--shape", "6,16,24", "--recipe", "rowwise", "--dtype", "float32", "--seconds", "0", "--device", "cpu")
    assert "RuntimeError: no rowwise here" in call("bench", *flags, code=1).stdout
    assert "reason" in loaded("bench", *flags, code=1)["results"][1]


def test_ctrl_c_in_bench_prints_the_finished_shapes(folder, monkeypatch):
    def measured(layers, inputs, **kwargs):
        if inputs[0][0].shape[1] == 24:
            raise KeyboardInterrupt
        return [{"name": "nn.Linear", "mode": "eager", "median_ms": 7.0}]

    monkeypatch.setattr(bench, "compare_layers", measured)
    shapes = ("--shape", "6,16,24", "--shape", "6,24,16")
    result = call("bench", *shapes, "--device", "cpu", "--output", "bench.json", code=130)
    assert "6, 16 → 24" in result.stdout and "7.000" in result.stdout and "6, 24 → 16" not in result.stdout
    assert "1/2  6, 16 → 24" in result.stderr and "Stopped" in result.stderr
    assert len(json.loads((folder / "bench.json").read_text())["results"]) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("bench", "--shape", "4096,1024,1024", "--dtype", "float32"), "1/1  4096, 1024 → 1024\n"),
        (("recommend", "some_models:llama"), "some_models:llama\n"),
    ],
    ids=["bench", "recommend"],
)
def test_progress_shows_before_anything_is_measured(folder, arguments, line):
    """A measurement of many seconds on a CPU; the line comes before, and Ctrl-C ends it."""
    flags = [*arguments, "--seconds", "60", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "torch_switchback", *flags]
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment}
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore SIGINT
    with subprocess.Popen(command, preexec_fn=heeds, **options) as process:
        assert process.stderr.readline() == line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert "Stopped" in process.stderr.read()
    # A shell shows both as 130. Python dies of the signal itself if it came while exec() ran a string, as in imports.
    assert process.returncode in (130, -signal.SIGINT)


# export


@pytest.fixture
def checkpoint(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)).bfloat16()
    safetensors.save_file(model.state_dict(), folder / "training.safetensors", metadata={"epoch": "3"})
    return model


def load(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("recipe", ["switchback", "rowwise_memory_efficient", "rowwise_rotated_features"])
def test_export_is_prepare_for_eval(checkpoint, recipe):
    arguments = ("export", "training.safetensors", "int8.safetensors", "--config", recipe, "--layers", "[13]")
    found = loaded(*arguments)
    assert found["layers"] == ["1", "3"]
    is_padded = recipe == "rowwise_rotated_features"  # from 16 features to a block of 64
    assert (found["bytes_after"] < found["bytes_before"]) != is_padded
    model = convert_all(checkpoint, recipe)
    x = torch.randint(10, (5,))
    expected = model(x)
    state = load("int8.safetensors")
    assert state["1.weight_int8"].dtype == torch.int8 and state["0.weight"].dtype == torch.bfloat16
    model.load_state_dict(state)
    assert model[1].is_prepared and torch.equal(model(x), expected)
    call("export", "int8.safetensors", "again.safetensors", "--back")
    again, reverted = load("again.safetensors"), ts.revert_switchback(model).state_dict()
    assert again.keys() == reverted.keys()
    assert all(torch.equal(tensor, reverted[name]) for name, tensor in again.items())


def test_export_and_back(checkpoint, folder):
    from safetensors import safe_open

    (folder / "map.json").write_text(json.dumps({"1": "rowwise", "3": "switchback", "*": None}))
    assert "2 layers" in call("export", "training.safetensors", "int8.safetensors", "--config", "map.json").stdout
    call("export", "int8.safetensors", "again.safetensors", "--back")
    again, before = load("again.safetensors"), checkpoint.state_dict()
    assert again.keys() == before.keys()
    assert {name: tensor.dtype for name, tensor in again.items()} == {name: t.dtype for name, t in before.items()}
    for name, tensor in again.items():
        if name in ("1.weight", "3.weight"):
            step = before[name].abs().max().item() / 127
            assert 0 < (tensor - before[name]).abs().max() <= step  # half of it, and the rounding to bfloat16
        else:
            assert torch.equal(tensor, before[name])
    for name in ("int8.safetensors", "again.safetensors"):
        with safe_open(name, "pt") as file:
            metadata = file.metadata()
        assert metadata["epoch"] == "3" and ("torch_switchback" in metadata) == (name == "int8.safetensors")


def test_rotated_values_without_a_note_do_not_come_back_padded():
    layer = ts.SwitchBackLinear(100, 24, config="rowwise_rotated_features")
    layer.prepare_for_eval()
    with pytest.raises(ValueError, match="weight_int8 is rotated, and no note says how many features"):
        restored(layer.state_dict(), {})
    again, _ = restored(layer.state_dict(), {"": {"in_features": 100}})
    assert again["weight"].shape == (24, 100)


def test_export_of_a_model_that_is_one_layer():
    layer = ts.SwitchBackLinear(16, 24)
    state, notes = prepared(layer.state_dict(), {"*": "switchback"})
    assert state.keys() == {"weight_int8", "weight_absmax", "bias"} and notes.keys() == {""}
    again, layers = restored(state, notes)
    assert again.keys() == {"weight", "bias"} and layers == [""]
    x = torch.randn(5, 16)
    expected = layer(x)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_export_reads_what_torch_saved_but_runs_no_code_of_it(checkpoint):
    state = checkpoint.state_dict()
    state["tied.weight"] = state["1.weight"]
    torch.save(state, "training.pt")
    call("export", "training.pt", "int8.safetensors", "--layers", "3")
    assert torch.equal(load("int8.safetensors")["tied.weight"], state["1.weight"])
    torch.save({"weight": nn.Linear(2, 2)}, "module.pt")
    assert "weights_only" in call("export", "module.pt", "x.safetensors", "--layers", "*", code=1).stderr


def test_export_names_the_key_of_a_state_dict_that_is_not_alone(checkpoint):
    state = checkpoint.state_dict()
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "model": state, "optimizer": optimizer, "ema": {}}, "nested.pt")
    arguments = ("export", "nested.pt", "int8.safetensors", "--layers", "[13]")
    assert "2 layers of the state_dict under 'model', " in call(*arguments).stdout
    assert loaded(*arguments)["key"] == "model"
    call("export", "training.safetensors", "plain.safetensors", "--layers", "[13]")
    int8, expected = load("int8.safetensors"), load("plain.safetensors")
    assert int8.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in int8.items())

    torch.save({"state_dict": int8}, "nested.pt")
    assert loaded("export", "nested.pt", "again.safetensors", "--back")["key"] == "state_dict"
    assert load("again.safetensors").keys() == state.keys()
    for content, message in (
        ({"model": state, "ema": state}, "but tensors under 'model', 'ema'"),
        ({"model": state, "step": torch.tensor(3)}, "but tensors under 'model'"),
        ({"model": [state]}, "holds no state_dict"),
        ([state], "holds no state_dict"),
        ({}, "holds no state_dict"),
    ):
        torch.save(content, "nested.pt")
        assert message in call("export", "nested.pt", "x.safetensors", "--layers", "*", code=1).stderr


def save_shards(state, index, **notes):
    """Write each tensor to a file of its own, and the index of them all."""
    from safetensors.torch import save_file

    folder, places = Path(index).parent, {}
    folder.mkdir(exist_ok=True)
    for number, (name, tensor) in enumerate(state.items()):
        places[name] = f"model-{number}{Path(index).name.removesuffix('.index.json')[5:]}"
        if index.endswith(".bin.index.json"):
            torch.save({name: tensor}, folder / places[name])
        else:
            save_file({name: tensor}, folder / places[name], metadata=notes)
    Path(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_export_reads_several_files(checkpoint, name):
    state = checkpoint.state_dict()
    save_shards(state, f"shards/{name}")
    call("export", "training.safetensors", "one.safetensors", "--layers", "[13]")
    expected = load("one.safetensors")
    for source in ("shards", f"shards/{name}"):
        assert loaded("export", source, "int8.safetensors", "--layers", "[13]")["layers"] == ["1", "3"]
        found = load("int8.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

    note = json.dumps({"1": {"dtype": "float32"}})
    save_shards(expected, f"int8/{name}", torch_switchback=note)
    assert loaded("export", "int8", "again.safetensors", "--back")["layers"] == ["1", "3"]
    again = load("again.safetensors")
    assert again.keys() == state.keys()
    assert again["1.weight"].dtype == (torch.float32 if "safetensors" in name else torch.bfloat16)
    assert again["3.weight"].dtype == torch.bfloat16


def test_export_takes_a_folder_with_one_checkpoint(checkpoint, folder):
    (folder / "model").mkdir()
    arguments = ("export", "model", "int8.safetensors", "--layers", "[13]")
    assert "model holds no index.json and no .safetensors" in call(*arguments, code=1).stderr
    content = (folder / "training.safetensors").read_bytes()
    (folder / "model" / "model.safetensors").write_bytes(content)
    assert loaded(*arguments)["layers"] == ["1", "3"]
    (folder / "model" / "ema.safetensors").write_bytes(content)
    message = "model holds several checkpoints: ema.safetensors, model.safetensors"
    assert message in call(*arguments, code=1).stderr
    save_shards(checkpoint.state_dict(), "model/model.safetensors.index.json")
    save_shards({"9.weight": torch.ones(2, 2)}, "model/pytorch_model.bin.index.json")
    assert loaded(*arguments)["layers"] == ["1", "3"]


def test_an_index_that_is_none_or_wrong_is_named(checkpoint, folder):
    index = "shards/model.safetensors.index.json"
    save_shards(checkpoint.state_dict(), index)
    content = json.loads(Path(index).read_text())
    arguments = ("x.safetensors", "--layers", "*")
    assert "config.json is no index of a checkpoint" in call("export", "config.json", *arguments, code=1).stderr
    for change, message in (
        ({"9.weight": content["weight_map"]["1.weight"]}, f"{index} says that model-1.safetensors holds 9.weight"),
        ({"9.weight": "nowhere.safetensors"}, "nowhere.safetensors"),
    ):
        Path(index).write_text(json.dumps(content | {"weight_map": content["weight_map"] | change}))
        assert message in call("export", index, *arguments, code=1).stderr
    for arguments in (("training.safetensors", index), ("training.safetensors", "x.safetensors", "--config", index)):
        assert index in call("export", *arguments, "--layers", "*", code=2).stderr


def test_export_refuses(checkpoint, folder):
    (folder / "broken.safetensors").write_bytes(b"nothing")
    for code, message, arguments in (
        (2, "say which layers", ("training.safetensors", "x.safetensors")),
        (2, "must end in .safetensors", ("training.safetensors", "x.pt", "--layers", "1")),
        (1, "holds no matrix under these names", ("training.safetensors", "x.safetensors", "--layers", "nobody")),
        (1, "holds no prepared layer", ("training.safetensors", "x.safetensors", "--back")),
        (1, "torch-switchback export: ", ("broken.safetensors", "x.safetensors", "--layers", "1")),
    ):
        assert message in call("export", *arguments, code=code).stderr.splitlines()[-1]
    assert not (folder / "x.safetensors").exists()


def test_back_needs_an_absmax_and_a_dtype():
    weight_int8, absmax = torch.ones(2, 2, dtype=torch.int8), torch.ones(1)
    with pytest.raises(ValueError, match=r"has no a\.weight_absmax"):
        restored({"a.weight_int8": weight_int8}, {})
    state = {"a.weight_int8": weight_int8, "a.weight_absmax": absmax}
    with pytest.raises(ValueError, match="noted as of 'load'"):
        restored(state, {"a": {"dtype": "load"}})
    assert restored(state, {})[0]["a.weight"].dtype == torch.bfloat16


# What all share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "nowhere:build"), "No module named 'nowhere'"),
        (("explain", "some_models:nothing"), "no attribute 'nothing'"),
        (("explain", "some_models:no_model"), "returned no nn.Module but int"),
        (("explain", "some_models"), "must be package.module:function or a .json file"),
        (("explain", "some_models:raising"), "some_models:raising: KeyError: 'no such"),
        (("bench", "--model", "some_models:raising"), "KeyError"),
        (("explain", "missing.json"), "No such file"),
        (("explain", "list.json"), "list.json: a config.json of Transformers is an object with a model_type"),
        (("recommend", "list.json"), "is an object with a model_type"),
        (("explain", "some_models:llama", "--config", "list.json"), "must map layers' names to configurations or null"),
        (("explain", "some_models:llama", "--config", "int4"), "'--config': must be a .json file or one of switchback"),
        (("explain", "some_models:llama", "--config", "config.json"), "config.json: architectures: config must be a"),
        (("explain", "config.json", "--device", "tpu"), "'tpu' is not one of 'cuda', 'cpu'"),
        (("recommend", "config.json", "--recipe", "int4"), "'--recipe': must be one of switchback"),
        (("bench", "--recipe", "int4"), "'--recipe': must be one of switchback"),
        (("bench", "--dtype", "int8"), "'int8' is not one of 'bfloat16'"),
        (("bench", "--shape", "1,2"), "'--shape': must be TOKENS,IN,OUT, three positive integers, got '1,2'"),
        (("bench", "--shape", "1,2,3", "--model", "config.json"), "not both"),
        (("bench", "--shape", "1,2,3", "--tokens", "4"), "--tokens goes with --model"),
        (("bench", "--model", "list.json"), "is an object with a model_type"),
        (("explain", "config.json", "--device", "cuda"), "'--device': PyTorch"),
        (("recommend", "config.json", "--device", "cuda"), "'--device': PyTorch"),
        (("bench", "--device", "cuda"), "'--device': PyTorch"),
        (("recommend", "some_models:with_sample", "--output", "nowhere/x.json"), "'--output': nowhere is not a folder"),
        (("bench", "--output", "nowhere/x.json"), "'--output': nowhere is not a folder"),
        (("bench", "--picture", "nowhere/x.png"), "'--picture': nowhere is not a folder"),
        (("export", "config.json", "nowhere/x.safetensors"), "'target': nowhere is not a folder"),
        (("tune", "--shape", "1,2"), "'--shape': must be TOKENS,IN,OUT, three positive integers, got '1,2'"),
    ],
)
def test_wrong_calls_exit_with_2(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = call(*arguments, code=2).stderr.splitlines()[-1]
    assert line.startswith("Error: Invalid value") and message in line


@pytest.mark.parametrize("command", ["explain", "recommend"])
def test_a_model_that_fails_exits_with_1(command):
    result = call(command, "some_models:broken", "--device", "cpu", code=1)
    assert f"torch-switchback {command}: " in result.stderr


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("matplotlib", ("bench", "--shape", "2,2,2", "--picture", "x.png", "--device", "cpu")),
        ("safetensors", ("export", "config.json", "x.safetensors")),
        ("numpy", ("export", "config.json", "x.safetensors")),
        ("transformers", ("explain", "config.json")),
    ],
)
def test_a_missing_package_is_named_with_its_pip_command(monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    line = call(*arguments, code=2).stderr.splitlines()[-1]
    assert line == f"Error: Invalid value: this needs {module}: pip install {module}"


def test_a_warning_is_one_line():
    lines = python_m("explain", "some_models:llama", "--tokens", "5", "--device", "cpu").stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("UserWarning: convert_to_switchback converts no layer")


@pytest.mark.parametrize("command", ["explain", "bench", "doctor"])
def test_a_traceback_is_shown_if_it_is_asked_for(command, monkeypatch, capfd):
    def broken(*arguments, **kwargs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(bench, "new_layer", broken)
    monkeypatch.setattr(doctor, "_layer_on_the_cpu", broken)
    arguments = {"explain": ("some_models:broken", "--device", "cpu"), "doctor": ()}
    arguments["bench"] = ("--shape", "6,16,24", "--seconds", "0", "--device", "cpu")
    for asked in (False, True):
        if asked:
            monkeypatch.setenv("TYPER_STANDARD_TRACEBACK", "1")
        result = CliRunner().invoke(app, [command, *arguments[command]])
        assert result.exit_code == 1
        raised = isinstance(result.exception, Exception)
        assert (raised or "Traceback" in result.output + capfd.readouterr().err) == asked


def test_version():
    assert call("--version").stdout == f"torch-switchback {ts.__version__}\n"


def test_python_m_is_the_command():
    done = python_m("--version")
    assert (done.stdout, done.stderr) == (f"torch-switchback {ts.__version__}\n", "")


def closure(requirements):
    """The installed distributions that some requirements ask for, with those that they ask for in turn."""
    found, pending = {}, [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[requirement.name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        pending += map(Requirement, found[requirement.name].requires or ())
    return found


EVERY_COMMAND = """
import sys
from torch_switchback.cli import main
for arguments in {commands}:
    sys.argv = ["torch-switchback", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 0, arguments
"""


def test_the_extra_cli_is_all_that_the_command_needs(folder, tmp_path):
    """safetensors writes through NumPy, and torch warns on stderr without it; neither of them requires it."""
    pytest.importorskip("safetensors")
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^cli = (\[.*\])$", project, re.MULTILINE)
    site = tmp_path / "site"
    site.mkdir()
    for distribution in closure(["torch", "triton", *json.loads(extra)]).values():
        for file in distribution.files:
            top, target = file.parts[0], site / file.parts[0]
            if top != ".." and not target.is_symlink():
                target.symlink_to(distribution.locate_file(top))
    torch.save({"1.weight": torch.randn(4, 4)}, "training.pt")
    environment = os.environ | {"PYTHONPATH": f"{Path(ts.__file__).parents[1]}{os.pathsep}{site}"}
    commands = [
        ["export", "training.pt", "int8.safetensors", "--layers", "1"],
        ["doctor"],
        ["explain", "some_models:converted", "--device", "cpu"],
        *([command, "--help"] for command in ("doctor", "recommend", "explain", "bench", "tune", "export")),
    ]
    program = EVERY_COMMAND.format(commands=commands)
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == 6


# config.json


def test_the_real_architecture_of_a_config_file(folder):
    pytest.importorskip("transformers")
    (folder / "map.json").write_text('{"*": null}')
    arguments = ("explain", "config.json", "--config", "map.json", "--tokens", "5", "--device", "cpu")
    rows = loaded(*arguments)["layers"]
    layers = {row["fqn"].rpartition(".")[2]: (row["in_features"], row["out_features"]) for row in rows}
    assert layers == {
        "q_proj": (32, 32),
        "k_proj": (32, 16),
        "v_proj": (32, 16),
        "o_proj": (32, 32),
        "gate_proj": (32, 48),
        "up_proj": (32, 48),
        "down_proj": (48, 32),
        "lm_head": (32, 100),
    }
    assert {row["dtype"] for row in rows} == {"float32"}
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(vit | {"intermediate_size": 48}))
    rows = loaded(*arguments)["layers"]
    assert {row["dtype"] for row in rows} == {"bfloat16"} and (32, 48) in {
        (r["in_features"], r["out_features"]) for r in rows
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "no such"}))
    assert "config.json: ValueError" in call(*arguments, code=2).stderr
