"""The policies by name."""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from apparate_llm.config import EarlyExitConfig, PolicyName
from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.controller.apparate import ApparatePolicy
from apparate_llm.controller.off import OffPolicy
from apparate_llm.controller.policy import Policy
from apparate_llm.controller.static import StaticPolicy

PolicyClass = type[AdaptivePolicy] | type[ApparatePolicy] | type[StaticPolicy] | type[OffPolicy]
POLICIES: dict[PolicyName, PolicyClass] = {
    "adaptive": AdaptivePolicy,
    "apparate": ApparatePolicy,
    "static": StaticPolicy,
    "off": OffPolicy,
}
OF_THE_MODEL = ("depth", "depths", "num_layers", "sibling")  # fields that are no parameters
MOST = 10**9
ALLOWED: dict[type, str] = {
    bool: "true or false",
    int: f"a whole number from 1 to {MOST:,}",
    float: "a number of at least 0",
}


def make_policy(
    config: EarlyExitConfig,
    *,
    depth: int,
    depths: tuple[int, ...],
    num_layers: int,
    sibling: bool = False,
    parameters: Mapping[str, object] = MappingProxyType({}),
) -> Policy:
    """The policy of the options, beginning at `depth`. It takes those options that have a field of its own;
    `parameters` are further fields, which the replay varies. Raises ValueError for one that the policy does not have,
    and for a value that it does not take. sibling: whether the ramps were made for another model than the one that is
    served."""
    policy = POLICIES[config.policy]
    takes = {item.name for item in fields(policy) if item.init and not item.name.startswith("_")}
    _check_parameters(config.policy, policy, parameters)
    given = {**dict(config), "depth": depth, "depths": depths, "num_layers": num_layers, "sibling": sibling}
    given |= parameters
    return policy(**{name: given[name] for name in takes & given.keys()})


def _check_parameters(name: str, policy: PolicyClass, parameters: Mapping[str, object]) -> None:
    own = [item for item in fields(policy) if item.init and not item.name.startswith("_")]
    kinds = {item.name: kind for item in own if item.name not in OF_THE_MODEL for kind in ALLOWED if item.type is kind}
    if unknown := parameters.keys() - kinds.keys():
        raise ValueError(f"policy {name} has no parameter {', '.join(map(repr, sorted(unknown)))}")
    for parameter, value in parameters.items():
        if kinds[parameter] is bool:
            fits = isinstance(value, bool)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            fits = False
        elif kinds[parameter] is int:
            fits = isinstance(value, int) and 1 <= value <= MOST
        else:
            fits = 0.0 <= value < math.inf
        if not fits:
            raise ValueError(f"policy {name}: {parameter} must be {ALLOWED[kinds[parameter]]}, got {value!r}")
