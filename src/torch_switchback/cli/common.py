"""Define what the commands share: flags, models from the command line, and progress."""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from torch import nn
from typer import Argument, BadParameter, Option

from .._timing import reason_of
from ..config import RECIPES, config_of

DEFAULT_TOKENS = 8192
MODEL = (
    "A function that takes nothing and returns a model, or a model and a sample input for it, as "
    "package.module:function; or a config.json of Transformers, which must be installed then."
)
CONFIG = "A recipe, or a JSON file that maps layers' names to configurations, such as `recommend --output` writes."


class Shape(NamedTuple):
    """A linear layer on its tokens."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens}, {self.in_features} → {self.out_features}"


def parse_shape(text: str) -> Shape:
    if not re.fullmatch(r" *[1-9]\d* *(, *[1-9]\d* *){2}", text):
        raise BadParameter(f"must be TOKENS,IN,OUT, three positive integers, got {text!r}")
    return Shape(*map(int, text.split(",")))


def parse_recipe(text: str) -> str:
    if text not in RECIPES:
        raise BadParameter(f"must be one of {', '.join(RECIPES)}, got {text!r}")
    return text


def parse_config(text: str) -> str | dict[str, Any]:
    """Return a recipe's name, or the map of layers to recipes, SwitchBackConfig's fields or null in a JSON file."""
    if text in RECIPES:
        return text
    if not text.endswith(".json"):
        raise BadParameter(f"must be a .json file or one of {', '.join(RECIPES)}, got {text!r}")
    config = read_json(text)
    if not isinstance(config, dict):
        raise BadParameter(f"{text} must map layers' names to configurations or null")
    for fqn, value in config.items():
        try:
            value is None or config_of(value)
        except (TypeError, ValueError) as error:
            raise BadParameter(f"{text}: {fqn}: {error}") from None
    return config


def check_device(device: str | None) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        raise BadParameter(f"PyTorch {torch.__version__} sees no CUDA GPU here")
    return device


def check_output(path: Path | None) -> Path | None:
    """Refuse a file whose folder is missing or read-only, before anything has been measured for it."""
    if path is not None and not os.access(path.parent, os.W_OK):
        raise BadParameter(f"{path.parent} is not a folder that can be written to")
    return path


output_option = partial(Option, dir_okay=False, callback=check_output)
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
ConfigFlag = Annotated[Any, Option(parser=parse_config, metavar="RECIPE|JSON", help=CONFIG)]
ShapesFlag = Annotated[
    list[Shape] | None, Option("--shape", parser=parse_shape, metavar="TOKENS,IN,OUT", help="A layer; repeatable.")
]
TokensFlag = Annotated[int | None, Option(min=1, help="Tokens per layer and step; by default the sample's, else 8192.")]
RecipesFlag = Annotated[
    list[str] | None,
    Option("--recipe", parser=parse_recipe, metavar="NAME", help=f"One of {', '.join(RECIPES)}; repeatable."),
]
CudaGraphFlag = Annotated[bool, Option("--cuda-graph", help="Measure without CPU overhead, as in a compiled model.")]
DeviceFlag = Annotated[
    Literal["cuda", "cpu"] | None, Option(callback=check_device, help="By default the GPU if there is one.")
]
JsonFlag = Annotated[bool, Option("--json", help="Print JSON and nothing else on stdout.")]


class Steps(Progress):
    """Progress on stderr: a line per step, and on a terminal a bar. Ctrl-C ends the block and sets ``stopped``."""

    stopped = False

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        super().__init__(BarColumn(), TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._bar = self.add_task("", total=None)

    def begin(self, text: str, total: int | None = None) -> None:
        """Show that a step of so many parts begins."""
        self.console.print(text)
        self.reset(self._bar, total=total)

    def advance_step(self) -> None:
        """Show that a part of the step is done."""
        self.advance(self._bar)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:  # type: ignore[override]
        self.stop()
        self.stopped = kind is KeyboardInterrupt
        if self.stopped:
            self.console.print("Stopped: only what was finished is shown and kept.")
        return self.stopped


def needs(module: str) -> Any:
    """Import an optional package, or stop with the pip command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise BadParameter(f"this needs {module}: pip install {module}") from None


def chosen_device(device: str | None) -> torch.device:
    """Return the device that a flag names."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(spec: str, device: torch.device) -> tuple[nn.Module, Any]:
    """Return a model on a device and a sample input, or None. The model of a config.json is on the meta device."""
    if spec.endswith(".json"):
        return _model_of_config(spec), None
    if not re.fullmatch(r"[\w.]+:[\w.]+", spec):
        raise BadParameter(f"MODEL must be package.module:function or a .json file, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        made = pkgutil.resolve_name(spec)()
    except Exception as error:  # a user's code can raise anything
        raise BadParameter(f"{spec}: {reason_of(error)}") from None
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise BadParameter(f"{spec} returned no nn.Module but {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        return model, sample
    to_device = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), sample)
    return model.to(device), to_device


def _model_of_config(path: str) -> nn.Module:
    """Build the architecture that a config.json describes on the meta device, in its dtype, else in bfloat16."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise BadParameter(f"{path}: a config.json of Transformers is an object with a model_type")
    transformers = needs("transformers")
    try:
        config = transformers.AutoConfig.for_model(**content)
        architecture = getattr(transformers, (config.architectures or ["none"])[0], None)
        with torch.device("meta"):
            model: nn.Module = architecture(config) if architecture else transformers.AutoModel.from_config(config)
        return model.to(config.dtype or torch.bfloat16)
    except Exception as error:  # Transformers raises what it likes for a config that it cannot use
        raise BadParameter(f"{path}: {reason_of(error)}") from None


def sample_or_tokens(sample: Any, tokens: int | None) -> dict[str, Any]:
    """Return the keywords for explain and recommend."""
    return {"sample_input": sample} if tokens is None and sample is not None else {"tokens": tokens or DEFAULT_TOKENS}


def read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadParameter(f"{path}: {error}") from None


def to_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, default=dataclasses.asdict)
