"""What the commands share: flags, models from the command line, and how a command fails."""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import typer
from torch import nn

from ..config import RECIPES
from .transformer import transformer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A function that takes nothing and returns a model, or a model and a sample input for it, as "
        "package.module:function; or a transformer's config.json.",
        show_default=False,
    ),
]
TokensFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that each layer sees in a step; by default the sample's, else 8192.",
        show_default=False,
    ),
]
DeviceFlag = Annotated[
    str | None, typer.Option(help="cuda or cpu; by default the GPU if there is one.", show_default=False)
]
DEFAULT_TOKENS = 8192


def stop(command: str, message: object, code: int = 1) -> NoReturn:
    """End a command with a line on stderr."""
    typer.echo(f"torch-switchback {command}: {message}", err=True)
    raise typer.Exit(code)


def needs(command: str, module: str, extra: str) -> Any:
    """Import an optional package, or stop and say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        stop(command, f"this needs {module.partition('.')[0]}: pip install 'torch-switchback[{extra}]'")


def chosen_device(device: str | None) -> torch.device:
    """The device that a flag names.

    Raises:
        typer.BadParameter: there is no such device.
    """
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: PyTorch {torch.__version__} sees no CUDA GPU here")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(spec: str) -> tuple[nn.Module, Any]:
    """A model and a sample input, None if there is none. Of a config.json the layers alone, on the meta device.

    Raises:
        typer.BadParameter: there is no such function or file, or it gives no model.
    """
    if spec.endswith(".json"):
        try:
            return transformer(json.loads(Path(spec).read_text(encoding="utf-8"))), None
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{spec}: {error}") from None
    if not re.fullmatch(r"[\w.]+:[\w.]+", spec):
        raise typer.BadParameter(f"MODEL must be package.module:function or a .json file, got {spec!r}")
    module_name, _, function_name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        function: Any = importlib.import_module(module_name)
        for name in function_name.split("."):
            function = getattr(function, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise typer.BadParameter(f"{spec}: {error}") from None
    made = function()
    model, sample = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{spec} returned no nn.Module but {type(model).__name__}")
    return model, sample


Shape = TypeVar("Shape")


def parse_shapes(texts: Iterable[str], names: str, kind: Callable[[int, int, int], Shape]) -> tuple[Shape, ...]:
    """The distinct values of a ``--shape`` whose help calls its numbers by these names.

    Raises:
        typer.BadParameter: one is anything but three positive integers.
    """

    def parsed(text: str) -> Shape:
        match = re.fullmatch(r"([1-9]\d*),([1-9]\d*),([1-9]\d*)", text.replace(" ", ""))
        if not match:
            raise typer.BadParameter(f"--shape must be {names}, three positive integers, got {text!r}")
        first, second, third = map(int, match.groups())
        return kind(first, second, third)

    return tuple(dict.fromkeys(map(parsed, texts)))


def to_device(tensors: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tensors)


def sample_or_tokens(sample: Any, tokens: int | None) -> dict[str, Any]:
    """Keywords for explain and recommend."""
    if tokens is None and sample is not None:
        return {"sample_input": sample}
    return {"tokens": tokens or DEFAULT_TOKENS}


def parse_config(text: str) -> str | dict[str, str | None]:
    """A recipe's name, or a JSON file with a map of layers' names to recipes, such as ``recommend --output`` writes.

    Raises:
        typer.BadParameter: it is neither.
    """
    if text in RECIPES:
        return text
    if not text.endswith(".json"):
        raise typer.BadParameter(f"--config must be a .json file or one of {', '.join(RECIPES)}, got {text!r}")
    try:
        config = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--config {text}: {error}") from None
    unknown = [value for value in config.values() if value not in (None, *RECIPES)] if isinstance(config, dict) else [0]
    if unknown:
        raise typer.BadParameter(f"--config {text}: it must map layers' names to recipes or null, got {unknown[0]!r}")
    return config


def print_json(text: str) -> None:
    typer.echo(json.dumps(json.loads(text), indent=1, ensure_ascii=False))
