"""``torch-switchback explain``: what runs in each layer of a model."""

from typing import Annotated

import typer

from ..analysis.explanation import explain as explain_model
from ..convert import convert_to_switchback
from ..nn import SwitchBackLinear
from .common import (
    DeviceFlag,
    JsonFlag,
    ModelArgument,
    TokensFlag,
    chosen_device,
    load_model,
    parse_config,
    print_json,
    sample_or_tokens,
    stop,
    to_device,
)


def explain(
    model: ModelArgument,
    tokens: TokensFlag = None,
    config: Annotated[
        str,
        typer.Option(
            help="How a model that is not converted yet is to be: a recipe, or a JSON file that maps layers' names to "
            "recipes, such as `recommend --output` writes."
        ),
    ] = "switchback",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if any layer falls back.")] = False,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Say how each layer of a model computes: strategy, kernels and tiles, shapes, and what falls back and why.

    A fall-back is a slower way than was meant: a plainer kernel than the tuned one, a weight gradient that stays at 16
    bits where int8 was asked for, a layer that the model goes round. On a GPU each distinct layer runs once, so that a
    kernel that does not compile there is found. Layers that stay nn.Linear are listed too, and are no fall-back.

    Examples:

    \b
      torch-switchback explain my_package.models:build --strict
      torch-switchback explain Llama-3-8B/config.json --tokens 16384 --config rowwise
    """
    where = chosen_device(device)
    asked = parse_config(config)
    module, sample = load_model(model)
    if not any(isinstance(part, SwitchBackLinear) for part in module.modules()):
        convert_to_switchback(module, config=asked)
    if not any(parameter.is_meta for parameter in module.parameters()):
        module, sample = module.to(where), to_device(sample, where)
    try:
        found = explain_model(module, **sample_or_tokens(sample, tokens), device=where)
    except (RuntimeError, ValueError, TypeError) as error:
        stop("explain", error)
    if json:
        print_json(found.to_json())
    else:
        typer.echo(found)
    if strict and found.fallbacks:
        stop("explain", f"{len(found.fallbacks)} of {len(found.layers)} layers fall back")
