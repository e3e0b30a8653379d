"""A few steps of the soak, and that it would see what it looks for."""

import pytest

import soak
from testing import gradients


def test_some_steps():
    result = soak.soak("cpu", minutes=10, seed=1000, most=30)
    assert result["cases"] == 30
    assert result["counts"]["out of memory"] >= 1
    assert result["wrong"] == []


@pytest.mark.parametrize("which", [0, 1, 2], ids=["output", "grad_input", "grad_weight"])
def test_it_sees_what_is_wrong(which, monkeypatch):
    def perturbed(*arguments):
        step = list(gradients(*arguments))
        step[which] = step[which] * 1.5 + 1
        return step

    if which == 2:  # is held against float64, save in int8
        monkeypatch.setattr(soak.Step, "__call__", lambda self, x, grad: perturbed(self.layer, x, grad))
    else:
        monkeypatch.setattr(soak, "gradients", perturbed)
    with pytest.raises(AssertionError):
        soak.Case(1, "cpu").run()


@pytest.mark.parametrize(("memory", "flat"), [([1, 5, 5, 5], True), ([2**21 * i for i in range(8)], False)])
def test_memory_that_grows_is_seen(memory, flat):
    assert soak.is_flat(memory) == flat
