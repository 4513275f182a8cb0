"""`eval steady`: interleaved servers under clients in a closed loop, over fake servers."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from apparate_llm.cli import build_parser
from apparate_llm.eval import run, switched
from apparate_llm.eval.client import Sampling
from apparate_llm.eval.plan import SteadyPlan, steady_plan
from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.schema import SteadyResults
from apparate_llm.eval.servers import Server
from apparate_llm.eval.steady import Answer, measure_level, ratios_of_answers, ttft_parts
from apparate_llm.eval.steady_tables import steady_tables
from apparate_llm.eval.switched import switch_level
from apparate_llm.eval.systems import ModelChoice, System
from apparate_llm.progress import SECONDS, Progress
from apparate_llm.renamed import STATUS
from tests.fake_server import bodies, fake_server


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


def plan_of(folder: Path, systems: list[System], *, switch: bool = False, prompt: str = "steady") -> SteadyPlan:
    return SteadyPlan(
        choice=ModelChoice(Path("fake")),
        systems=systems,
        baselines=(systems[0].name,),
        prompts=[Prompt([{"role": "user", "content": prompt}])] * 3,
        levels=[2],
        turns=2,
        turn_s=1.0,
        settle_s=0.2,
        learn_s=0.2,
        max_tokens=9,
        switch=switch,
        limit=None,
        settings={},
        folder=folder,
        start_timeout_s=5.0,
    )


def level_of(plan: SteadyPlan, servers: list[Server]):
    with Progress(Console(quiet=True)).stage("measure", total=plan.level_s, unit=SECONDS) as stage:
        level = switch_level(plan, servers[0], 2, stage) if plan.switch else measure_level(plan, servers, 2, stage)
        assert stage.done == pytest.approx(plan.level_s)
    return level


def server_of(system: System, folder: Path) -> Server:
    return Server(system, log=folder / "log", start_timeout_s=5.0)


def test_servers_take_turns_and_only_their_own_time_counts(base_url, tmp_path):
    """A fake server is not frozen in others' turns: so its answers go on, and count for nothing there."""
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    level = level_of(plan_of(tmp_path, systems), [server_of(system, tmp_path) for system in systems])
    assert [run.system for run in level.runs] == ["vllm", "same"]
    for one in level.runs:
        assert one.failed == 0 and one.requests >= 2 and one.step_ms is None and one.exits is None
        assert all(45 < tpt_ms < 100 for tpt_ms in one.tpt_by_turn_ms) and len(one.tpt_by_turn_ms) == 2
        assert one.tpt_ms.mean < 100 and 0 < one.output_tokens_per_s < 45  # 2 clients, 6 tokens in 0.35 s
    (ratio,) = level.ratios
    assert (ratio.system, ratio.baseline) == ("same", "vllm") and ratio.answers_of_both >= 2
    assert 0.6 < ratio.tpt < 1.6 and ratio.throughput > 0
    assert (ratio.tpt_ci95, ratio.throughput_ci95, ratio.tpt_mean_ci95) == (None, None, None)  # of two turns


def test_clients_ask_for_answers_that_are_drawn(base_url, tmp_path):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    plan = replace(plan_of(tmp_path, systems, prompt="single"), sampling=Sampling(0.7))
    bodies.clear()
    level_of(plan, [server_of(system, tmp_path) for system in systems])
    assert bodies and all(body["temperature"] == 0.7 and "seed" not in body for body in bodies)


def test_there_may_be_several_baselines(base_url, tmp_path, monkeypatch, capsys):
    systems = [System(name, base_url=base_url) for name in ("vllm", "vllm-tuned", "other")]
    plan = replace(plan_of(tmp_path, systems), baselines=("vllm-tuned", "vllm"))
    level = level_of(plan, [server_of(system, tmp_path) for system in systems])
    assert [(ratio.system, ratio.baseline) for ratio in level.ratios] == [
        ("vllm", "vllm-tuned"),
        ("other", "vllm-tuned"),
        ("vllm-tuned", "vllm"),
        ("other", "vllm"),
    ]
    assert level.ratios[0].tpt == pytest.approx(1 / level.ratios[2].tpt)
    level.ratios[0].tpt, level.ratios[1].tpt, level.ratios[2].tpt, level.ratios[3].tpt = 0.5, 0.4, 2.0, 0.8
    monkeypatch.setattr(run, "steady_plan", lambda args: plan)
    monkeypatch.setattr(run, "measure_level", lambda *args: level)
    for limit, code in ((0.6, 0), (0.45, 1)):  # of the first baseline
        monkeypatch.setattr(run, "steady_plan", lambda args, limit=limit: replace(plan, limit=limit))
        assert run.run_steady(argparse.Namespace()) == code
    text = capsys.readouterr().out
    assert text.index("Ratios to vllm-tuned:") < text.index("Ratios to vllm:")


def test_turns_too_short_for_an_answer_are_said(base_url, tmp_path):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    plan = replace(plan_of(tmp_path, systems, prompt="stall"), turns=1, turn_s=0.35)
    with pytest.raises(ValueError, match="no two answers of vllm began and ended within its turns: give more --turns"):
        level_of(plan, [server_of(system, tmp_path) for system in systems])


def test_a_server_that_answers_nobody_is_given_up_and_its_error_told(base_url, tmp_path):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    plan = replace(plan_of(tmp_path, systems, prompt="refused"), turns=10)
    with pytest.raises(RuntimeError, match="5 requests of a client failed one after the other, at last: HTTP 429"):
        level_of(plan, [server_of(system, tmp_path) for system in systems])


class Frozen(Server):
    """Asked for something only while it runs."""

    frozen = False

    def pause(self):
        self.frozen = True

    def resume(self):
        self.frozen = False

    def model_name(self):
        assert not self.frozen
        return super().model_name()

    def counts(self):
        assert not self.frozen
        return super().counts()


def test_servers_are_asked_before_they_are_frozen(base_url, tmp_path):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    servers = [Frozen(system, log=tmp_path / "log", start_timeout_s=5.0) for system in systems]
    for server in servers:
        server.pause()  # as it is after the start
    level_of(plan_of(tmp_path, systems), servers)


class WithExits(Server):
    emitted = 0
    divergences = "divergences"  # what it calls them

    def status(self):
        self.emitted += 10
        counts = dict.fromkeys(switched.EXITS, 0)
        del counts["divergences"]
        counts |= {"emitted": self.emitted, self.divergences: self.emitted // 10}
        return {"counts": counts, "config": {"policy": "static"}}


@pytest.mark.parametrize("divergences", ["divergences", STATUS["counts"]["divergences"]], ids=["new", "old"])
def test_one_server_s_policy_is_switched(base_url, tmp_path, monkeypatch, divergences):
    asked = []
    monkeypatch.setattr(WithExits, "divergences", divergences)
    monkeypatch.setattr(switched, "switch", lambda server, policy: asked.append(policy))
    system = System("lossless", base_url=base_url, has_exits=True)
    level = level_of(
        plan_of(tmp_path, [system], switch=True), [WithExits(system, log=tmp_path / "log", start_timeout_s=5.0)]
    )
    assert asked == [
        "off",
        "static",
        "static",
        "off",
        "static",
    ]  # pairs, each the other way round; then as it was
    off, on = level.runs
    assert (off.system, off.exits) == ("off", None)
    assert (on.system, on.exits) == ("static", dict.fromkeys(switched.EXITS, 0) | {"emitted": 20, "divergences": 2})
    (ratio,) = level.ratios
    assert (ratio.system, ratio.baseline, ratio.tpt_mean) == ("static", "off", None) and 0.6 < ratio.tpt < 1.6


@pytest.fixture
def flags(tiny_llama, lens_ramps):
    def parsed(out: Path, *more: str) -> argparse.Namespace:
        ramps = ["--ramps", str(lens_ramps(depth=3))]
        return build_parser().parse_args(["eval", "steady", str(tiny_llama), "--out", str(out), *ramps, *more])

    return parsed


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--switch"], "--switch: --systems must name one system with exits, e.g. lossless, got vllm, lossless"),
        (["--switch", "--systems", "ngram"], "--switch: --systems must name one system with exits"),
        (["--systems", "vllm"], "--systems must name two or more, e.g. vllm,lossless, got vllm"),
        (["--systems", "vllm,fast"], "fast"),
        (["--systems", "vllm,hf"], "hf works on 1 request at a time: --clients 1 only"),
        (["--max-tokens", "1"], "--max-tokens: at least 2, as a single token has no time"),
        (["--turn-s", "0.2"], "--turn-s: 1 to 300 s, got 0.2"),
        (["--systems", "vllm,hf", "--clients", "1", "--temperature", "0.7"], "it decodes greedily, so not at"),
        (["--sampling-seed", "3"], "--sampling-seed is about a --temperature above 0"),
        (["--switch", "--systems", "lossless", "--baseline", "lossless"], "--switch compares a server with itself"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, tmp_path, more, says):
    with pytest.raises(ValueError, match=says):
        steady_plan(flags(tmp_path / "out", *more))


def test_results_are_not_written_over_without_fresh(flags, tmp_path):
    (tmp_path / "logs").mkdir()  # of a start that failed
    assert steady_plan(flags(tmp_path)).folder == tmp_path
    (tmp_path / "results.json").write_text('{"levels": []}')
    with pytest.raises(ValueError, match="holds results: choose another --out, or give --fresh"):
        steady_plan(flags(tmp_path))
    assert steady_plan(flags(tmp_path, "--fresh")).folder == tmp_path
    for name, text in (("results.json", '{"runs": []}'), ("plan.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="holds something else: choose another --out"):
            steady_plan(flags(tmp_path, "--fresh"))
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("limit", "code"), [(None, 0), (0.01, 1)])
def test_results_are_kept_after_every_level(base_url, tmp_path, monkeypatch, capsys, limit, code):
    systems = [System("vllm", base_url=base_url), System("same", base_url=base_url)]
    plan = replace(plan_of(tmp_path, systems), limit=limit)
    monkeypatch.setattr(run, "steady_plan", lambda args: plan)
    assert run.run_steady(argparse.Namespace()) == code
    results = SteadyResults.model_validate_json((tmp_path / "results.json").read_text())
    assert [level.clients for level in results.levels] == [2]
    text = capsys.readouterr().out
    assert "Clients in a closed loop" in text and "Ratios to vllm" in text and "What first tokens waited" in text
    assert all(len(line) <= 120 for line in text.splitlines()) and len(steady_tables(results)) == 3
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == 1


def test_intervals_of_answers_are_over_the_turns_in_which_they_began():
    """Two answers in each of 24 turns, of prompts that are slow for both; ours takes half as long."""
    rng = np.random.default_rng(0)
    slowdown = np.exp(rng.normal(0, 0.3, 48))
    theirs = {(i, 0): Answer(50 * slowdown[i], 200.0, i // 2) for i in range(48)}
    ours = {
        key: Answer(0.5 * tpt_ms * np.exp(rng.normal(0, 0.02)), 100.0, turn)
        for key, (tpt_ms, _, turn) in theirs.items()
    }
    ratios = ratios_of_answers(ours, theirs)
    low, high = ratios["tpt_mean_ci95"]
    assert low < ratios["tpt_mean"] < high and high / low < 1.03 and ratios["tpt_mean"] == pytest.approx(0.5, rel=0.01)
    assert ratios["ttft_mean_ci95"] == pytest.approx((0.5, 0.5)) and ratios["tpt_p99_ci95"] is None  # 48 answers
    of_one_turn = {key: answer._replace(turn=answer.turn // 4) for key, answer in ours.items()}
    assert ratios_of_answers(of_one_turn, theirs)["tpt_mean_ci95"] is None  # six turns
    many = {(i, 0): Answer(50.0 + i % 97, 200.0, i % 24) for i in range(600)}
    low, high = ratios_of_answers(many, many)["tpt_p99_ci95"]
    assert low == high == 1.0


def test_parts_of_a_wait_for_the_first_token():
    """Steps end at 1.0, 1.1, 1.4 and 1.8: the third reads one prompt, the last two."""
    arrivals = [
        [1.0, 1.1, 1.4, 1.801],
        [1.399, 1.8],  # its prompt was read by the step from 1.1 to 1.4
        [1.8],
        [1.801],
    ]
    asked_in_the_first = ttft_parts([(1.02, 1.399)], arrivals)
    assert {name: round(value) for name, value in asked_in_the_first.items()} == {
        "step_under_way_ms": 80,
        "further_steps_ms": 0,
        "own_step_ms": 299,
        "prompts_in_own_step": 1,
    }
    both = ttft_parts([(1.05, 1.8), (1.4, 1.8)], arrivals)  # one waits for the other's prompt, one for nothing
    assert {name: round(value) for name, value in both.items()} == {
        "step_under_way_ms": 25,
        "further_steps_ms": 150,
        "own_step_ms": 400,
        "prompts_in_own_step": 2,
    }
