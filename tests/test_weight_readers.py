"""Find the linear layers whose weight a module above them reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_switchback.weight_readers import weights_read_by_parents


class Multiplies(nn.Module):
    """Multiply by a layer's weight without calling it, as timm's BEiT does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight))


class ByMethod(Multiplies):
    def forward(self, x):
        return self.proj(self.attend(x))

    def attend(self, x):
        return x @ self.transposed

    @property
    def transposed(self):
        return self.qkv.weight.t()


class Overrides(Multiplies):
    def forward(self, x):
        return super().forward(x) + 1


class AsksTheDtype(Multiplies):
    def forward(self, x):
        return self.proj(self.qkv(x.to(self.qkv.weight.dtype)))


class OfAGrandchild(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.qkv = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.inner.qkv.weight)


class OfAChildsMethod(nn.Module):
    """The child has a forward, and a method that only its parent calls."""

    def __init__(self):
        super().__init__()
        self.child = Computes()

    def forward(self, x):
        return self.child.compute(x)


class Computes(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x):
        return self.qkv(x)

    def compute(self, x):
        return F.linear(x, self.qkv.weight)


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self):
        layer = self.base_layer
        return layer.weight

    def forward(self, x):
        return self.base_layer(x)


class Wraps(Multiplies):
    def __init__(self):
        super().__init__()
        self.qkv = Wrapper(self.qkv)


def names_read(model):
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: reader for layer, reader in weights_read_by_parents(model).items()}


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (Multiplies, {"qkv": "Multiplies.forward"}),
        (ByMethod, {"qkv": "ByMethod.transposed"}),
        (Overrides, {"qkv": "Multiplies.forward"}),
        (AsksTheDtype, {"qkv": "AsksTheDtype.forward"}),
        (OfAGrandchild, {"inner.qkv": "OfAGrandchild.forward"}),
        (OfAChildsMethod, {"child.qkv": "Computes.compute"}),
        (Wraps, {"qkv.base_layer": "Multiplies.forward"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reads_are_found(parent, expected):
    model = parent()
    model(torch.randn(2, 8))
    assert names_read(model) == expected
    nested = nn.Sequential(nn.Linear(8, 8), model)
    assert names_read(nested) == {f"1.{name}": reader for name, reader in expected.items()}


def test_pytorchs_own_fast_path_is_found():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    assert {"linear1", "linear2"} <= names_read(encoder).keys()


class OnlyOutsideForward(Multiplies):
    def forward(self, x):
        return self.proj(self.qkv(x))

    def reset_parameters(self):
        nn.init.zeros_(self.qkv.weight)

    def fuse_projections(self):
        return torch.cat([self.qkv.weight, self.proj.weight])


class Writes(Multiplies):
    def forward(self, x):
        self.embedding = nn.Embedding(8, 8)
        return self.proj(self.qkv(x)) + self.embedding.weight


def test_what_forward_does_not_use_is_not_a_read():
    assert names_read(OnlyOutsideForward()) == {}
    assert names_read(nn.Sequential(nn.Linear(8, 8), Computes())) == {}
    model = Writes()
    model(torch.randn(8, 8))
    assert names_read(model) == {}, "an embedding is no linear layer"


def test_computed_weights_are_not_computed():
    model = Multiplies()
    calls = []

    class Counts(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight

    nn.utils.parametrize.register_parametrization(model.qkv, "weight", Counts())
    calls.clear()
    assert names_read(model) == {}
    assert not calls


def test_a_method_without_source_is_passed_over():
    namespace = {"nn": nn, "F": F}
    exec("def forward(self, x): return F.linear(x, self.qkv.weight)", namespace)
    assert names_read(type("Made", (Multiplies,), {"forward": namespace["forward"]})()) == {
        "qkv": "Multiplies.forward"
    }, "found in the forward that it overrides"
