"""``torch-switchback explain``: what runs in each layer of a model."""

from typing import Annotated

import typer
from typer import Option

from ..analysis.explanation import FallbackError
from ..analysis.explanation import explain as explain_model
from ..convert import convert_to_switchback
from ..nn import SwitchBackLinear
from . import common
from .common import ConfigFlag, DeviceFlag, JsonFlag, ModelArgument, TokensFlag


def explain(
    model: ModelArgument,
    tokens: TokensFlag = None,
    config: ConfigFlag = "switchback",
    strict: Annotated[bool, Option("--strict", help="Exit with 1 if any layer falls back.")] = False,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Say how each layer of a model computes: strategy, kernels and tiles, shapes, and what falls back and why.

    A model that is not converted yet is converted as --config says. A fall-back is a slower way than was meant: a
    plainer kernel than the tuned one, or a layer that the model does not call. On a GPU each distinct layer runs once,
    so that a kernel that does not compile there is found. Layers that compute as nn.Linear are listed too, with the
    reason, and are no fall-back.

    Examples:

    \b
      torch-switchback explain my_package.models:build --strict
      torch-switchback explain Llama-3-8B/config.json --tokens 16384 --config rowwise
    """
    where = common.chosen_device(device)
    module, sample = common.load_model(model, where)
    if not any(isinstance(part, SwitchBackLinear) for part in module.modules()):
        convert_to_switchback(module, config=config)
    found = explain_model(module, **common.sample_or_tokens(sample, tokens), device=where)
    typer.echo(found.to_json() if json else found)
    if strict and found.fallbacks:
        raise FallbackError(f"{len(found.fallbacks)} of {len(found.layers)} layers fall back")
