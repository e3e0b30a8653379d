"""INT8 training for PyTorch: SwitchBackLinear (arXiv 2304.13013), and how a model gets it and loses it again."""

from . import distributed, exported, nn, ops  # noqa: F401  (distributed and exported register themselves)
from .analysis.explanation import explain
from .analysis.recommendation import recommend
from .config import RECIPES, SwitchBackConfig
from .convert import conversion_report, convert_to_switchback, revert_switchback
from .functional import switchback_linear
from .integrations.bitsandbytes import install_as_bitsandbytes
from .nn import SwitchBackLinear
from .prepared import prepare_for_eval, prepare_for_training

__version__ = "0.2.0"

__all__ = [
    "RECIPES",
    "SwitchBackConfig",
    "SwitchBackLinear",
    "conversion_report",
    "convert_to_switchback",
    "explain",
    "install_as_bitsandbytes",
    "prepare_for_eval",
    "prepare_for_training",
    "recommend",
    "revert_switchback",
    "switchback_linear",
]
