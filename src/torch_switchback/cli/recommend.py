"""``torch-switchback recommend``: whether SwitchBack is worth it for a model on this machine."""

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..analysis.recommendation import CANDIDATES
from ..analysis.recommendation import recommend as recommend_for
from ..config import RECIPES
from .common import (
    DeviceFlag,
    JsonFlag,
    ModelArgument,
    TokensFlag,
    chosen_device,
    load_model,
    print_json,
    sample_or_tokens,
    stop,
    to_device,
)
from .transformer import NAMED_LIKE_LLAMA


def recommend(
    model: ModelArgument,
    tokens: TokensFlag = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"One to choose from, of {', '.join(RECIPES)}; repeatable. By default {' and '.join(CANDIDATES)}.",
            show_default=False,
        ),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Measure without the host's time, as for a model to be compiled.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of measurement, about, beside compiling.")] = 2.0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16 whatever the weights are, as under autocast.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write the configuration here, as JSON, for convert_to_switchback and `explain --config`. From a "
            "config.json only if the layers of its model_type are named as Llama's.",
            show_default=False,
        ),
    ] = None,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Measure a model's layers as nn.Linear and as SwitchBackLinear, and say which to convert and what it gains.

    Each distinct layer shape is measured alone, forward and backward, in turns. A layer is converted if the best recipe
    is 2 % faster than nn.Linear. A model that comes with a sample input is run as it is and as recommended, too. Only
    ratios of one run compare: leave the GPU to this command meanwhile.

    Examples:

    \b
      torch-switchback recommend my_package.models:build --output switchback.json
      torch-switchback recommend Llama-3-8B/config.json --tokens 16384 --cuda-graph

    and in the program:

      convert_to_switchback(model, config=json.load(open("switchback.json")))
    """
    where = chosen_device(device)
    recipes = recipe or list(CANDIDATES)
    for name in recipes:
        if name not in RECIPES:
            raise typer.BadParameter(f"--recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    module, sample = load_model(model)
    if not any(parameter.is_meta for parameter in module.parameters()):
        module, sample = module.to(where), to_device(sample, where)
    try:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            found = recommend_for(
                module,
                **sample_or_tokens(sample, tokens),
                recipes=recipes,
                cuda_graph=cuda_graph,
                device=where,
                dtype=torch.bfloat16 if bf16 else None,
                seconds=seconds,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        stop("recommend", error)
    if json:
        print_json(found.to_json())
    else:
        typer.echo(found)
    if output is None:
        return
    if _has_made_up_names(model):
        why = (
            "this model_type names its layers otherwise than Llama's; give the model itself, as package.module:function"
        )
        stop("recommend", f"{output} is not written: {why}", code=2)
    output.write_text(json_module.dumps(found.config, indent=1) + "\n", encoding="utf-8")
    if not json:
        typer.echo(f"written to {output}")


def _has_made_up_names(model: str) -> bool:
    """Whether it is a config.json whose layers have other names in the real model than here."""
    if not model.endswith(".json"):
        return False
    return json_module.loads(Path(model).read_text(encoding="utf-8")).get("model_type") not in NAMED_LIKE_LLAMA
