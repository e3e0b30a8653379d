"""Turn a model's nn.Linear layers into SwitchBackLinear in place, and back."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .config import SwitchBackConfig
from .distributed.fsdp import undo_int8_all_gather, use_int8_all_gather
from .nn import SwitchBackLinear
from .recipes import config_of

Model = TypeVar("Model", bound=nn.Module)


def convert_to_switchback(
    model: Model,
    *,
    config: SwitchBackConfig | str | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Model:
    """Make every exact nn.Linear of a model a SwitchBackLinear, in place.

    Only the layer's class changes: parameters, hooks and state_dict keys stay the same objects, so optimisers
    and checkpoints stay valid. Subclasses of nn.Linear are left alone. Parameters in a dtype that the int8
    products do not take (float64) are refused when the layer is called.

    Args:
        model: any module; a bare nn.Linear becomes a SwitchBackLinear itself.
        config: how the layers compute, or the name of a recipe (:data:`RECIPES`); the paper's default if None.
        module_filter_fn: called with a linear layer and its fully qualified name (``""`` for the model itself);
            the layer is converted if it returns True, for each of its names if it has several.

    Returns:
        The same model.

    Raises:
        TypeError: config is something else.
        ValueError: there is no recipe of that name.
        RuntimeError: all_gather is "int8" and fully_shard has been called already.
        ValueError: all_gather is "int8" and a layer shares its weight with a module that needs it in full.
    """
    config = SwitchBackConfig() if config is None else config_of(config)
    fqns: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        fqns.setdefault(module, []).append(fqn)
    for module, names in fqns.items():
        if type(module) is not nn.Linear:
            continue
        if module_filter_fn is not None and not all(module_filter_fn(module, fqn) for fqn in names):
            continue
        if "forward" in vars(module):
            warnings.warn(
                f"convert_to_switchback leaves {names[0]!r} alone: its forward has been replaced on the instance, so "
                "another class would change nothing",
                stacklevel=2,
            )
            continue
        module.__class__ = SwitchBackLinear
        module.config = config  # type: ignore[assignment]
    if config.all_gather == "int8":
        use_int8_all_gather(model)
    return model


def revert_switchback(model: Model) -> Model:
    """Make every SwitchBackLinear of a model an nn.Linear again, in place, its parameters the same objects.

    A layer that was prepared for evaluation gets a new ``weight``, dequantised. Subclasses of SwitchBackLinear, such as
    torch.nn.utils.parametrize makes, stay.

    Args:
        model: any module, converted or built with SwitchBackLinear.

    Returns:
        The same model.

    Raises:
        RuntimeError: fully_shard has cut up weights that are gathered as int8.
    """
    undo_int8_all_gather(model)
    for module in model.modules():
        if type(module) is SwitchBackLinear:
            module.prepare_for_training()
            del module.config
            module.__dict__.pop("_weight_cache", None)
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
