"""What a perfect ramp would reach, by replaying the model's shipped log of exits."""

from pathlib import Path

from apparate_llm.controller.feedback import read_header, read_steps
from apparate_llm.controller.replay import LogCosts, oracle
from apparate_llm.ramps.base_weights import BaseWeights
from apparate_llm.ramps.checkpoint import RampError
from apparate_llm.ramps.fingerprint import WeightsError
from apparate_llm.ramps.fitting import fitting_ramps
from apparate_llm.replay import shipped_logs

LEAST_STEPS = 100


def oracle_ratios(model: Path, concurrencies: list[int]) -> dict[str, float]:
    """Concurrency -> TPT with a ramp that knows every verdict / without; empty where no ramps with a log ship that
    serve this model. From the log's own machine, model and prompts, so a bound to hold measured ratios against, no
    more."""
    try:
        ramps = fitting_ramps(BaseWeights.of(model), model, None).manifest.weights_sha256
    except (RampError, WeightsError):  # none fit, or weights that early exits cannot read, and others can
        return {}
    path = next((path for path in shipped_logs().values() if read_header(path).get("ramps") == ramps), None)
    if path is None:
        return {}
    steps = list(read_steps(path))
    costs = LogCosts(steps)
    depth = min(costs.draft_steps)
    ratios = {}
    for concurrency in concurrencies:
        part = [step for step in steps if step.num_requests == concurrency]
        if len(part) >= LEAST_STEPS:
            ratios[str(concurrency)] = oracle(part, costs, depth=depth).tpt_ratio
    return ratios
