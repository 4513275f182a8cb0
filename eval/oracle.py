"""What a perfect ramp would reach, by replaying the model's shipped log of exits."""

from pathlib import Path

from apparate_llm.controller.feedback import read_header, read_steps
from apparate_llm.controller.replay import LogCosts, oracle
from apparate_llm.ramps.checkpoint import find_shipped, read_manifest
from apparate_llm.ramps.fingerprint import WeightsError, fingerprint_of
from apparate_llm.replay import shipped_logs

LEAST_STEPS = 100


def oracle_ratios(model: Path, concurrencies: list[int]) -> dict[str, float]:
    """Concurrency -> TPT with a ramp that knows every verdict / without; empty where no log of this model ships. From
    the log's own machine and prompts, so a bound to hold measured ratios against, no more."""
    try:
        folder = find_shipped(fingerprint_of(model))
    except WeightsError:  # that early exits cannot read, and others can
        folder = None
    if folder is None:
        return {}
    ramps = read_manifest(folder).weights_sha256
    for path in shipped_logs().values():
        if read_header(path).get("ramps") == ramps:
            steps = list(read_steps(path))
            costs = LogCosts(steps)
            depth = min(costs.draft_steps)
            ratios = {}
            for concurrency in concurrencies:
                part = [step for step in steps if step.num_requests == concurrency]
                if len(part) >= LEAST_STEPS:
                    ratios[str(concurrency)] = oracle(part, costs, depth=depth).tpt_ratio
            return ratios
    return {}
