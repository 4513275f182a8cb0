"""`eval steady --switch`: what exits bring within one server, the policy switched between `adaptive` and `off`.

Between two servers a few percent are hidden by which answers fall into a turn; here both policies have the same, if
prompts of a kind do not follow each other in the file. What `off` costs over plain vLLM is not in it.
"""

import math
import time

import httpx
import numpy as np

from apparate_llm.eval.closed_loop import Clients, in_window, ratio_of
from apparate_llm.eval.plan import SteadyPlan
from apparate_llm.eval.schema import SteadyLevel, SteadyRatio, SteadyRun
from apparate_llm.eval.servers import Server
from apparate_llm.progress import Stage

ON, OFF = "adaptive", "off"
EXITS = ("emitted", "held", "accepted", "released", "diverged", "divergences_at_worst")


def switch_level(plan: SteadyPlan, server: Server, number: int, stage: Stage) -> SteadyLevel:
    clients = Clients(server, plan.prompts, number, plan.max_tokens)
    turns: dict[str, list[tuple[float, float]]] = {ON: [], OFF: []}
    exits = dict.fromkeys(EXITS, 0)  # in the counted parts of turns with exits

    def wait(seconds: float, policy: str) -> None:
        stage.update(stage.done, f"policy {policy}, {number} clients")
        time.sleep(seconds)
        stage.update(stage.done + seconds, stage.facts)

    server.resume()
    clients.start()
    try:
        switch(server, ON)
        wait(plan.learn_s, ON)
        for pair in range(plan.turns):
            for policy in (ON, OFF) if pair % 2 else (OFF, ON):
                switch(server, policy)
                wait(plan.settle_s, policy)
                before, began = server.status()["counts"], time.monotonic()
                wait(plan.turn_s, policy)
                turns[policy].append((began, time.monotonic()))
                if policy == ON:
                    after = server.status()["counts"]
                    exits = {name: exits[name] + after[name] - before[name] for name in EXITS}
    finally:
        clients.stop()
    return _level_of(clients, turns, exits)


def _level_of(clients: Clients, turns: dict[str, list[tuple[float, float]]], exits: dict[str, int]) -> SteadyLevel:
    tpt_ms, rates = _by_turn(clients, turns)
    runs = [
        SteadyRun(
            system=policy,
            failed=clients.num_failed if policy == ON else 0,  # of both: an answer sees several turns
            output_tokens_per_s=float(np.mean(rates[policy])),
            tpt_by_turn_ms=[None if math.isnan(value) else value for value in tpt_ms[policy]],
            exits=exits if policy == ON else None,
        )
        for policy in (OFF, ON)
    ]
    tpt, throughput = ratio_of(tpt_ms[ON], tpt_ms[OFF]), ratio_of(rates[ON], rates[OFF])
    ratio = SteadyRatio(
        system=ON,
        baseline=OFF,
        tpt=tpt["ratio"],
        tpt_ci95=tpt["ci95"],
        throughput=throughput["ratio"],
        throughput_ci95=throughput["ci95"],
    )
    return SteadyLevel(clients=clients.number, runs=runs, ratios=[ratio])


def switch(server: Server, policy: str) -> None:
    answer = httpx.patch(
        f"{server.base_url}/early_exit/config", headers=server.headers, json={"policy": policy}, timeout=30.0
    )
    answer.raise_for_status()


def _by_turn(
    clients: Clients, turns: dict[str, list[tuple[float, float]]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By policy: ms per token, and tokens per second, of each turn."""
    arrivals = clients.arrivals()
    tpt_ms: dict[str, list[float]] = {policy: [] for policy in turns}
    rates: dict[str, list[float]] = {policy: [] for policy in turns}
    for policy, found in turns.items():
        for began_s, ended_s in found:
            ms, tokens = in_window(arrivals, began_s, ended_s)
            tpt_ms[policy].append(ms)
            rates[policy].append(tokens / (ended_s - began_s))
    return tpt_ms, rates
