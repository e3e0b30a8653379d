"""``torch-switchback recommend``: whether SwitchBack is worth it for a model on this machine."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from ..analysis.recommendation import CANDIDATES, Recommendation
from ..analysis.recommendation import recommend as recommend_for
from . import common
from .common import CudaGraphFlag, DeviceFlag, JsonFlag, ModelArgument, RecipesFlag, TokensFlag, output_option


def recommend(
    model: ModelArgument,
    tokens: TokensFlag = None,
    recipe: RecipesFlag = None,
    cuda_graph: CudaGraphFlag = False,
    seconds: Annotated[float, Option(min=0.0, help="Of measurement, about, beside compiling.")] = 2.0,
    bf16: Annotated[bool, Option("--bf16", help="Compute in bfloat16, as under autocast.")] = False,
    output: Annotated[Path | None, output_option(help="Write the configuration here, as JSON.")] = None,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Measure a model's layers as nn.Linear and as SwitchBackLinear, and say which to convert and what it gains.

    Each distinct layer shape is measured alone, forward and backward, with the recipes interleaved: by default
    switchback and switchback_memory_efficient. A layer is converted if the best recipe is 2 % faster than nn.Linear. A
    model that comes with a sample input is then run as it is and converted, and nothing is recommended that makes it
    slower. Only ratios of one run compare: leave the GPU to this command meanwhile. After Ctrl-C the finished shapes
    are printed, and no file is written.

    Examples:

    \b
      torch-switchback recommend my_package.models:build --output switchback.json
      torch-switchback recommend Llama-3-8B/config.json --tokens 16384 --cuda-graph

    The file is for `explain --config`, and in the program:

      convert_to_switchback(model, config=json.load(open("switchback.json")))
    """
    where = common.chosen_device(device)
    found: Recommendation | None = None

    def begin(so_far: Recommendation, following: str) -> None:
        nonlocal found
        found = so_far
        steps.begin(following)

    with common.Steps() as steps:
        steps.begin(model)
        module, sample = common.load_model(model, where)
        asked = common.sample_or_tokens(sample, tokens) | {"recipes": recipe or CANDIDATES, "cuda_graph": cuda_graph}
        dtype = torch.bfloat16 if bf16 else None
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            found = recommend_for(module, **asked, device=where, dtype=dtype, seconds=seconds, progress=begin)
    if found is not None and found.layers:
        typer.echo(found.to_json() if json else found)
    if steps.stopped:
        raise typer.Exit(130)
    if output is not None and found is not None:
        output.write_text(common.to_json(found.config) + "\n", encoding="utf-8")
        typer.echo(f"written to {output}", err=json)
