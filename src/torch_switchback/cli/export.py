"""``torch-switchback export``: checkpoints of prepared, int8 layers from those of training, and back."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated

import typer
from typer import Argument, Option

from .. import checkpoint
from .common import ConfigFlag, JsonFlag, Stop, WrongCall, needs, parse_config, to_json


def export(
    source: Annotated[Path, Argument(exists=True, dir_okay=False, help="A .safetensors file, or one of torch.save.")],
    target: Annotated[Path, Argument(dir_okay=False, help="The .safetensors file to write.")],
    layers: Annotated[list[str] | None, Option(metavar="PATTERN", help="Layers to quantize; repeatable.")] = None,
    config: ConfigFlag = "switchback",
    back: Annotated[bool, Option("--back", help="Dequantize a prepared checkpoint instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Quantize the linear layers of a checkpoint for good, as prepare_for_eval does: half of bfloat16's bytes.

    A model that was converted with the same --config loads the result with load_state_dict, and gives the same outputs
    as before, bit for bit. Which matrices belong to linear layers a checkpoint does not say. Name them with --layers or
    in a JSON file for --config: not the embeddings, not the LM head. --back gives a checkpoint that nn.Linear loads, in
    the dtype that there was; what was rounded away stays away. Files of torch.save are read with weights_only=True.

    Examples:

    \b
      torch-switchback export model.safetensors int8.safetensors --layers 'model.layers.*'
      torch-switchback export checkpoint.pt int8.safetensors --config switchback.json
      torch-switchback export int8.safetensors model.safetensors --back
    """
    safetensors = needs("safetensors")
    if target.suffix != ".safetensors":
        raise WrongCall(f"the target must end in .safetensors, got {target}")
    asked = parse_config(config)
    if not back and isinstance(asked, str) and not layers:
        raise WrongCall("say which layers: --layers 'model.layers.*', or --config with a JSON file")
    try:
        state, metadata, notes = checkpoint.read(source)
        if back:
            result, names = checkpoint.restored(state, notes)
            notes = {}
        else:
            patterns = asked if isinstance(asked, dict) else {pattern: asked for pattern in layers or ()}
            result, notes = checkpoint.prepared(state, patterns)
            names = list(notes)
        if not names:
            raise ValueError(f"{source} holds no {'prepared layer' if back else 'matrix under these names'}")
        checkpoint.write(target, result, metadata, notes)
    except (RuntimeError, TypeError, ValueError, UnpicklingError, safetensors.SafetensorError) as error:
        raise Stop(error) from None
    before, after = (sum(tensor.nbytes for tensor in tensors.values()) for tensors in (state, result))
    sizes = {"bytes_before": before, "bytes_after": after}
    summary = f"{target}: {len(names)} layers, {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB"
    typer.echo(to_json({"target": str(target), "layers": names, **sizes}) if json else summary)
