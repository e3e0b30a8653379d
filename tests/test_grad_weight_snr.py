"""The int8 weight gradient on every kind of data that hurts: above 33 dB, and above float8."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks need torch-switchback[demo]")
pytest.importorskip("typer", reason="the benchmarks need torch-switchback[demo]")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import grad_weight_snr
from grad_weight_snr import CASES, GATE, GRADIENTS, INPUTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("x", INPUTS)
def test_rotated_int8_is_above_the_gate_and_above_float8(x, grad):
    snr = grad_weight_snr.measure_case(x, grad, tokens=2048, in_features=256)
    for block in (64, 128):
        rotated = snr[f"int8, {block} tokens rotated"]
        assert rotated >= GATE
        assert rotated > max(snr["float8 tensorwise"], snr["float8 columnwise"])
    assert grad_weight_snr.passes(snr)
    assert 26 < snr["float8 tensorwise"] < 32 and snr["bf16"] > 50


def test_without_the_rotation_it_is_not():
    snr = grad_weight_snr.measure_case("Gaussian", "tokens log-normal σ = 2", tokens=2048, in_features=256)
    assert snr["int8, not rotated"] < snr["float8 tensorwise"]
    worse = snr | {"int8, 64 tokens rotated": snr["int8, not rotated"]}
    assert not grad_weight_snr.passes(worse)


def test_every_committed_case_passes():
    document = json.loads((ROOT / "benchmarks/results/cpu/grad_weight_snr.json").read_text(encoding="utf-8"))
    cases = [(record["x"], record["grad"], record["tokens"]) for record in document["results"]]
    assert cases == CASES
    for record in document["results"]:
        assert record["passes"] and grad_weight_snr.passes(record["snr"]), record
