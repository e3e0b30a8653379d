"""Find the linear layers whose weight another module reads, and so may multiply by without calling the layer."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def leave_read_layers(caller: str, model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return those of a model's layers, by name, whose weight no module above them reads, and warn of the others."""
    readers = weights_read_by_parents(model)
    left = [f"{fqn} ({readers[layer]})" for fqn, layer in layers.items() if layer in readers]
    if left:
        names = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        warnings.warn(f"{caller} leaves layers whose weight another module reads as they are: {names}", stacklevel=3)
    return {fqn: layer for fqn, layer in layers.items() if layer not in readers}


def weights_read_by_parents(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers of a model whose ``weight`` a module above them reads, and where it does.

    The sources of all forwards are searched for ``self.<child>.weight``, and so are the methods and properties that
    they use of themselves and of their children. A weight is found too if the child is a wrapper that passes it on, as
    PEFT's layers do. Reads that start from a local variable or from an element of a list are not found.

    Returns:
        {layer: "Attention.forward"}, the class and the method that read the layer's weight.
    """
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    owners = {id(linear.weight): linear for linear in linears if "weight" in linear._parameters}
    found: dict[nn.Module, str] = {}
    paths_of: Any = cache(_paths)  # for this call, as classes may be made for single modules
    pending = [(module, "forward") for module in model.modules()]
    seen = set(pending)
    while pending:
        module, method = pending.pop()
        for reader, path in paths_of(type(module), method):
            owner, name = _walk(module, path)
            if name == "weight" and owner is not module:
                layer = owners.get(id(_weight(owner)))
                if layer is not None:
                    found.setdefault(layer, reader)
            elif (owner, name) not in seen:
                seen.add((owner, name))
                pending.append((owner, name))
    return found


def _walk(module: nn.Module, path: tuple[str, ...]) -> tuple[nn.Module, str]:
    """Return the last module on a path of attributes, and the name that follows it, or ""."""
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return module, name
        module = child
    return module, ""


def _weight(module: nn.Module) -> Any:
    is_computed = "parametrizations" in module._modules
    return None if is_computed else getattr(module, "weight", None)


def _paths(cls: type, name: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return ("Attention.forward", ("qkv", "weight")) for self.qkv.weight in a method or property of a class.

    What a method overrides is searched as well, if it mentions super.
    """
    paths: list[tuple[str, tuple[str, ...]]] = []
    for base in cls.__mro__:
        member = vars(base).get(name)
        function = member.fget if isinstance(member, property) else member
        if base is nn.Module or not inspect.isfunction(function):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # code that was made at run time has no source
            continue
        calls_super = False
        for node in ast.walk(tree):
            path: list[str] = []
            while isinstance(node, ast.Attribute):
                path.insert(0, node.attr)
                node = node.value
            if path and isinstance(node, ast.Name) and node.id == "self":
                paths.append((f"{base.__name__}.{name}", tuple(path)))
            calls_super |= isinstance(node, ast.Name) and node.id == "super"
        if not calls_super:
            break
    return paths
