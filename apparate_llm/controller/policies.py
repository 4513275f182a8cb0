"""The policies by name."""

from dataclasses import fields

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


def make_policy(
    config: EarlyExitConfig,
    *,
    depth: int,
    depths: tuple[int, ...],
    num_layers: int,
    sibling: bool = False,
    **parameters: object,
) -> Policy:
    """The policy of the options, beginning at `depth`. It takes those options that have a field of its own;
    `parameters` are further fields, which the replay varies. Raises ValueError for one that the policy does not
    have. sibling: whether the ramps were made for another model than the one that is served."""
    policy = POLICIES[config.policy]
    takes = {item.name for item in fields(policy) if item.init and not item.name.startswith("_")}
    if unknown := parameters.keys() - takes:
        raise ValueError(f"policy {config.policy} has no parameter {', '.join(map(repr, sorted(unknown)))}")
    given = {**dict(config), "depth": depth, "depths": depths, "num_layers": num_layers, "sibling": sibling}
    given |= parameters
    return policy(**{name: given[name] for name in takes & given.keys()})
