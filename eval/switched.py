"""`eval steady --switch`: what exits bring within one server, the policy switched between its own and `off`.

Between two servers a few percent are hidden by which answers fall into a turn; here both policies have the same, if
prompts of a kind do not follow each other in the file. What `off` costs over plain vLLM is not in it.
"""

import math
import os
import time

import httpx
import numpy as np

from apparate_llm.address import authorization
from apparate_llm.admin import KEY_VARIABLE
from apparate_llm.eval.closed_loop import Clients, in_window, ratio_of, throughput_ratio
from apparate_llm.eval.plan import SteadyPlan
from apparate_llm.eval.schema import SteadyLevel, SteadyRatio, SteadyRun
from apparate_llm.eval.servers import Server
from apparate_llm.eval.steady import clients_text
from apparate_llm.progress import Stage
from apparate_llm.renamed import counts_of_any_version

OFF = "off"
SWITCH_TIMEOUT_S = 30.0
EXITS = ("emitted", "held", "accepted", "released", "divergences", "divergences_at_worst")


def switch_level(plan: SteadyPlan, server: Server, number: int, stage: Stage) -> SteadyLevel:
    server.resume()
    on = str(server.status()["config"]["policy"])
    clients = Clients(server, plan.prompts, number, plan.max_tokens, plan.sampling)
    turns: dict[str, list[tuple[float, float]]] = {OFF: [], on: []}
    exits = dict.fromkeys(EXITS, 0)  # in the counted parts of turns with exits

    def wait(seconds: float, policy: str) -> None:
        clients.check()
        stage.update(stage.done, f"policy {policy}, {clients_text(number)}")
        time.sleep(seconds)
        stage.update(stage.done + seconds, stage.facts)

    try:
        clients.start()
        wait(plan.learn_s, on)
        for pair in range(plan.turns):
            for policy in (on, OFF) if pair % 2 else (OFF, on):
                switch(server, policy)
                wait(plan.settle_s, policy)
                before, began = _counts(server), time.monotonic()
                wait(plan.turn_s, policy)
                turns[policy].append((began, time.monotonic()))
                if policy == on:
                    after = _counts(server)
                    exits = {name: exits[name] + after[name] - before[name] for name in EXITS}
        switch(server, on)
    finally:
        clients.end()
    clients.join()
    return _level_of(clients, turns, exits)


def _counts(server: Server) -> dict[str, int]:
    return counts_of_any_version(server.status()["counts"])


def _level_of(clients: Clients, turns: dict[str, list[tuple[float, float]]], exits: dict[str, int]) -> SteadyLevel:
    tpt_ms, rates = _by_turn(clients, turns)
    _, on = turns
    runs = [
        SteadyRun(
            system=policy,
            failed=clients.num_failed if policy == on else 0,  # of both: an answer sees several turns
            errors=clients.errors if policy == on else [],
            output_tokens_per_s=float(np.mean(rates[policy])),
            tpt_by_turn_ms=[None if math.isnan(value) else value for value in tpt_ms[policy]],
            exits=exits if policy == on else None,
        )
        for policy in turns
    ]
    tpt = ratio_of(tpt_ms[on], tpt_ms[OFF])
    throughput, throughput_ci95 = throughput_ratio(rates[on], rates[OFF])
    ratio = SteadyRatio(
        system=on,
        baseline=OFF,
        tpt=tpt["ratio"],
        tpt_ci95=tpt["ci95"],
        throughput=throughput,
        throughput_ci95=throughput_ci95,
    )
    return SteadyLevel(clients=clients.number, runs=runs, ratios=[ratio])


def switch(server: Server, policy: str) -> None:
    """With the admin key where there is one in the environment, which the server has from there, too."""
    headers = authorization(os.environ.get(KEY_VARIABLE, "").strip() or None) or server.headers
    url = f"{server.base_url}/early_exit/config"
    httpx.patch(url, headers=headers, json={"policy": policy}, timeout=SWITCH_TIMEOUT_S).raise_for_status()


def _by_turn(
    clients: Clients, turns: dict[str, list[tuple[float, float]]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By policy: ms per token, and tokens per second, of each turn."""
    arrivals = clients.arrivals()
    tpt_ms: dict[str, list[float]] = {policy: [] for policy in turns}
    rates: dict[str, list[float]] = {policy: [] for policy in turns}
    for policy, intervals in turns.items():
        for began_s, ended_s in intervals:
            ms, tokens = in_window(arrivals, began_s, ended_s)
            tpt_ms[policy].append(ms)
            rates[policy].append(tokens / (ended_s - began_s))
    return tpt_ms, rates
