"""The named configurations, and maps of them. A name serves wherever ``convert_to_switchback`` takes one."""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from .config import SwitchBackConfig

RECIPES = {
    "switchback": SwitchBackConfig(),
    "switchback_memory_efficient": SwitchBackConfig(mem_efficient=True),
    "switchback_int8_grad_weight": SwitchBackConfig(grad_weight="int8"),
    "rowwise": SwitchBackConfig("rowwise"),
    "rowwise_memory_efficient": SwitchBackConfig("rowwise", mem_efficient=True),
    "rowwise_int8_grad_weight": SwitchBackConfig("rowwise", grad_weight="int8"),
    "rowwise_rotated_features": SwitchBackConfig("rowwise", rotate_features=64),
}

Value = TypeVar("Value")


def look_up(patterns: Mapping[str, Value], fqn: str) -> Value | None:
    """What stands under a layer's very name, else under the first fnmatch pattern that matches it, else None."""
    if fqn in patterns:
        return patterns[fqn]
    return next((value for pattern, value in patterns.items() if fnmatchcase(fqn, pattern)), None)


def unmatched(patterns: Iterable[str], fqns: Collection[str]) -> list[str]:
    """The names and fnmatch patterns that no layer has."""
    return [p for p in patterns if p not in fqns and not any(fnmatchcase(fqn, p) for fqn in fqns)]


def config_of(config: SwitchBackConfig | str) -> SwitchBackConfig:
    """A configuration itself, or the one of a recipe.

    Raises:
        ValueError: there is no recipe of that name.
        TypeError: config is something else.
    """
    if isinstance(config, str):
        if config not in RECIPES:
            raise ValueError(f"config: the recipes are {', '.join(RECIPES)}; got {config!r}")
        return RECIPES[config]
    if not isinstance(config, SwitchBackConfig):
        raise TypeError(f"config must be a SwitchBackConfig or the name of a recipe, got {config!r}")
    return config
