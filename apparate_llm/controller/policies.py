"""The policies by name."""

from collections.abc import Callable
from typing import Any

from apparate_llm.config import EarlyExitConfig
from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.controller.apparate import ApparatePolicy
from apparate_llm.controller.off import OffPolicy
from apparate_llm.controller.policy import Policy
from apparate_llm.controller.static import StaticPolicy

# Each takes the knobs, the depth to begin with, all depths there are, the model's number of layers, and constructor
# arguments by name (the replay varies them).
POLICIES: dict[str, Callable[..., Policy]] = {
    "adaptive": lambda config, depth, depths, num_layers, **parameters: AdaptivePolicy(
        **{
            "depth": depth,
            "depths": depths,
            "num_layers": num_layers,
            "max_exits": config.max_exits,
            "fixed_depth": config.depth != "auto",
            **parameters,
        }
    ),
    "apparate": lambda config, depth, depths, num_layers, **parameters: ApparatePolicy(
        **{
            "depth": depth,
            "depths": depths,
            "accuracy_bound": config.accuracy_bound,
            "max_exits": config.max_exits,
            "max_rows": config.max_rows,
            "fixed_depth": config.depth != "auto",
            **parameters,
        }
    ),
    "static": lambda config, depth, depths, num_layers, **parameters: StaticPolicy(
        **{
            "depth": depth,
            "depths": depths,
            "threshold": config.threshold,
            "hold_threshold": config.hold_threshold,
            "max_exits": config.max_exits,
            "max_rows": config.max_rows,
            **parameters,
        }
    ),
    "off": lambda config, depth, depths, num_layers, **parameters: OffPolicy(**parameters),
}


def make_policy(
    config: EarlyExitConfig, *, depth: int, depths: tuple[int, ...], num_layers: int, **parameters: Any
) -> Policy:
    """Raises ValueError for a parameter the policy does not have."""
    try:
        return POLICIES[config.policy](config, depth, depths, num_layers, **parameters)
    except TypeError as error:
        raise ValueError(f"policy {config.policy}: {error}") from None
