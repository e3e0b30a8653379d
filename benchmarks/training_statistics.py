"""Compare recipes by a few paired training runs.

Runs of one seed share weights and data. A final loss is therefore taken as a sum: what the recipe
does, what the seed does, and chance, which is estimated from the residuals of all runs (two-way
analysis of variance).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from results_file import Record

BASELINE = "linear"
AGAIN = "linear, again"
BASELINES = (BASELINE, AGAIN)


class Effect(NamedTuple):
    """The effect of a recipe on a figure."""

    values: list[float]  # by seed, those that there are
    difference: float  # to nn.Linear
    standard_error: float  # of the difference; NaN without residuals to estimate it from


class Effects(NamedTuple):
    by_recipe: dict[str, Effect]  # nn.Linear first
    baseline: float  # nn.Linear's mean
    scatter: float  # standard deviation of one run, by chance alone
    degrees_of_freedom: int

    @property
    def resolution(self) -> float:
        """Twice the largest standard error. Smaller differences are within noise."""
        return 2 * max(effect.standard_error for name, effect in self.by_recipe.items() if name != BASELINE)


def finished(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "reason" not in record]


def effects(records: Sequence[Record], figure: str) -> Effects:
    """Fit finished runs by least squares. nn.Linear's second runs count as nn.Linear's."""
    named = [(BASELINE if record["recipe"] in BASELINES else record["recipe"], record) for record in records]
    recipes = [BASELINE, *(name for name in dict.fromkeys(name for name, _ in named) if name != BASELINE)]
    seeds = sorted({record["seed"] for record in records})
    design = torch.zeros(len(named), len(seeds) + len(recipes) - 1, dtype=torch.float64)
    for row, (name, record) in enumerate(named):
        design[row, seeds.index(record["seed"])] = 1
        if name != BASELINE:
            design[row, len(seeds) + recipes.index(name) - 1] = 1
    values = torch.tensor([record[figure] for record in records], dtype=torch.float64)
    solution = torch.linalg.pinv(design) @ values
    degrees_of_freedom = len(named) - int(torch.linalg.matrix_rank(design))
    residual = (values - design @ solution).square().sum().item()
    variance = residual / degrees_of_freedom if degrees_of_freedom else math.nan
    covariance = variance * torch.linalg.pinv(design.t() @ design)
    by_recipe = {}
    for index, recipe in enumerate(recipes):
        own = [value for (name, _), value in zip(named, values.tolist(), strict=True) if name == recipe]
        column = len(seeds) + index - 1
        difference, error = 0.0, 0.0
        if recipe != BASELINE:
            difference, error = solution[column].item(), covariance[column, column].sqrt().item()
        by_recipe[recipe] = Effect(own, difference, error)
    mean = sum(by_recipe[BASELINE].values) / max(1, len(by_recipe[BASELINE].values))
    return Effects(by_recipe, mean, math.sqrt(variance), degrees_of_freedom)
