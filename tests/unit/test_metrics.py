"""The metrics page says what the ledger counted; what ships for Prometheus and Grafana asks for metrics there are."""

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock

import httpx
import pytest
import yaml
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest

from apparate_llm import api
from apparate_llm.api.engines import merged
from apparate_llm.api.metrics import ExitCollector, MetricsMiddleware
from apparate_llm.config import parse_config, public_config
from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.core import Exit, ExitCounts, Outcome
from apparate_llm.exits.histograms import Histogram
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.tenants import shares_of
from apparate_llm.renamed import METRICS

CONFIG = parse_config({"policy": "static", "tpt_target_ms": 30.0, "accuracy_bound": 0.5, "tenants": {"fast": {}}})
FOLDER = Path(api.__path__[0])


@pytest.fixture(scope="module")
def status():
    """Of a server that has seen one request: two exits released, one a divergence; three held, one let through."""
    ledger = VerdictLedger(AccuracyBudget(0.5), shares_of(CONFIG))
    share = ledger.tenants["fast"]
    request = RequestExits(releasable=True, bucket=Bucket.of_request(0.5), tpt_target_ms=30.0, share=share)
    ledger.add_request("a", request)
    ledger.emit("a", 10, now_s=0.0)
    ledger.ended("a")  # so that they may be spent
    released = [Exit(10, 5, depth=0, draft_step=0, confidence=0.9), Exit(11, 6, 2, 1, 0.9)]
    for _ in released:
        ledger.budget.release(request.bucket)
    ledger.release("a", released)
    ledger.verify_released(ledger.due("a", first_position=9, num_scheduled=3, first_row=0), [5, 7], [0.0, 0.4])
    request.held = [Exit(12 + i, 3, depth=0, draft_step=i, confidence=0.5) for i in range(3)]
    ledger.accept_divergence("a", request.held[1], 0.25)
    ledger.count_held(request, num_held=3, num_accepted=2)
    ledger.emit("a", 8, now_s=0.38)
    ledger.end_request("a")
    ledger.check_integrity()
    return {
        "clock_s": 1.0,
        "active": True,
        "running": 0,
        "depth": 2,
        "config": public_config(CONFIG),
        "tenants": {name: share.as_dict() for name, share in ledger.tenants.items()},
        "audit": {},
        "counts": ledger.counts.as_dict(),
        "distributions": ledger.distributions.as_dict(),
        "budget_fill_frac": ledger.budget.fill_frac,
        "budget_left": ledger.budget.server.balance,
    }


@pytest.fixture(scope="module")
def page(status) -> str:
    registry, collector = CollectorRegistry(), ExitCollector()
    registry.register(collector)
    assert generate_latest(registry) == b""  # nothing is said before the worker has answered
    collector.publish(json.loads(json.dumps(status)))  # as it comes out of another process
    return generate_latest(registry).decode()


def test_the_page_says_what_was_counted(page):
    for line in (
        'apparate:exits_total{depth="0",outcome="released_right"} 1.0',
        'apparate:exits_total{depth="2",outcome="released_divergence"} 1.0',
        'apparate:exits_total{depth="0",outcome="held_accepted"} 1.0',
        'apparate:exits_total{depth="0",outcome="held_accepted_divergence"} 1.0',
        'apparate:exits_total{depth="0",outcome="held_rejected"} 1.0',
        "apparate:emitted_total 20.0",
        "apparate:divergences_total 2.0",
        "apparate:divergence_ratio 0.1",
        "apparate:depth 2.0",
        "apparate:threshold 0.9",
        "apparate:tpt_target_seconds 0.03",
        "apparate:targets_met_total 1.0",
        'apparate:tokens_per_pass_bucket{le="12.0"} 2.0',
        "apparate:tokens_per_pass_sum 20.0",
        'apparate:time_per_output_token_seconds_bucket{le="0.015"} 0.0',
        'apparate:time_per_output_token_seconds_bucket{le="0.02"} 1.0',
        "apparate:time_per_output_token_seconds_sum 0.02",
        'apparate:divergence_regret_nats_bucket{le="0.25"} 1.0',
        'apparate:divergence_regret_nats_bucket{le="+Inf"} 2.0',
        "apparate:decode_tokens_total 19.0",
        "apparate:decode_seconds_total 0.38",
        'apparate:tenant_emitted_total{tenant="fast"} 20.0',
        'apparate:tenant_divergences_total{tenant="fast"} 2.0',
        'apparate:tenant_emitted_total{tenant="(none)"} 0.0',
        "apparate:diverged_total 2.0",  # from here by the names of version 0.1
        'apparate:class_diverged_total{class="fast"} 2.0',
        'apparate:completion_seconds_bucket{le="+Inf"} 0.0',
    ):
        assert f"\n{line}\n" in page, line


def test_the_reference_has_every_metric_and_no_other(page):
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|", text, re.M)
    shown = re.findall(r"^# TYPE apparate:(\w+) (\w+)$", page, re.M)
    old = {name for new in METRICS.values() for name in (new, f"{new}_total")}
    assert {item for item in shown if item[0] not in old} == {item for item in listed if item[0] != "pause_seconds"}


def test_a_failure_and_when_exits_come_back_are_on_the_page(status):
    failure = {"part": "drafting", "error": "RuntimeError", "returns_in_s": 12.5}
    failed = {**status, "active": False, "failure": failure, "counts": {**status["counts"], "fallbacks": 2}}
    failed["counts"]["recoveries"] = 1
    registry, collector = CollectorRegistry(), ExitCollector()
    registry.register(collector)
    collector.publish(json.loads(json.dumps(failed)))
    page = generate_latest(registry).decode()
    for line in ("active 0.0", "fallbacks_total 2.0", "recoveries_total 1.0", "pause_seconds 12.5"):
        assert f"\napparate:{line}\n" in page, line
    both = merged([json.loads(json.dumps(status)), failed])
    assert both["active"] is False and both["failure"] == failure


def test_two_engines_are_one_server_of_twice_the_totals(status):
    collector, registry = ExitCollector(), CollectorRegistry()
    registry.register(collector)
    empty_depth = json.loads(json.dumps(status))  # as it comes out of another process
    empty_depth["counts"]["outcomes"][Outcome.RELEASED_RIGHT] = {"1": 3}
    collector.publish(merged([json.loads(json.dumps(status)), empty_depth]))
    page = generate_latest(registry).decode()
    for line in (
        "apparate:emitted_total 40.0",
        "apparate:divergence_ratio 0.1",
        'apparate:exits_total{depth="0",outcome="released_right"} 1.0',
        'apparate:exits_total{depth="1",outcome="released_right"} 3.0',
        'apparate:tokens_per_pass_bucket{le="12.0"} 4.0',
        'apparate:tenant_divergences_total{tenant="fast"} 4.0',
        "apparate:accuracy_bound 0.5",
        "apparate:time_per_output_token_seconds_sum 0.04",
    ):
        assert f"\n{line}\n" in page, line
    assert len(collector.status["engines"]) == 2
    assert merged([status]) is status


def test_the_number_for_the_bound_has_exits_without_a_verdict_in_it(status):
    counts = ExitCounts(emitted=20, released=6, verified=3, released_divergences=2, unverified=3).as_dict()
    fast = {**status["tenants"]["fast"], "unverified": 3, "divergences_at_worst": 5}
    one = json.loads(json.dumps({**status, "counts": counts, "tenants": {"fast": fast}}))
    registry, collector = CollectorRegistry(), ExitCollector()
    registry.register(collector)
    for statuses, number in (([one], 5), ([one, one], 10)):
        collector.publish(merged(statuses))
        page = generate_latest(registry).decode()
        for line in (
            f"apparate:divergences_at_worst_total {number}.0",
            "apparate:divergences_at_worst_ratio 0.25",
            "apparate:divergence_ratio 0.1",
            f'apparate:tenant_divergences_at_worst_total{{tenant="fast"}} {number}.0',
        ):
            assert f"\n{line}\n" in page, line
    alerts = (FOLDER / "alerts.yml").read_text()
    assert "apparate:divergences_at_worst_ratio > apparate:accuracy_bound" in alerts


def test_the_page_shows_it_wherever_it_shows_divergences():
    page = (FOLDER / "dashboard.html").read_text()
    for figure in ("counts.divergence_frac", "counts.divergences", "report.divergences"):
        for line in page.splitlines():
            assert not re.search(rf"{re.escape(figure)}\b", line) or "at_worst" in line or "unverified" in line, line
    assert page.count("at worst") >= 3


def test_outcomes_are_disjoint_and_complete(status):
    counts = status["counts"]
    total = sum(sum(by_depth.values()) for by_depth in counts["outcomes"].values())
    assert total == counts["held"] + counts["released"] and set(counts["outcomes"]) == set(Outcome)


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yml"])
def test_what_ships_asks_for_metrics_there_are(name, page):
    text = (FOLDER / name).read_text()
    asked = set(re.findall(r"apparate:\w+", text))
    old = {f"apparate:{name}{end}" for name in METRICS.values() for end in ("", "_total", "_sum", "_count", "_bucket")}
    assert not asked & old
    assert len(asked) > 4 and asked <= set(re.findall(r"^(apparate:\w+)[ {]", page, re.MULTILINE))
    read = json.loads(text) if name.endswith("json") else yaml.safe_load(text)
    expressions = (
        [target["expr"] for panel in read["panels"] for target in panel["targets"]]
        if name.endswith("json")
        else [rule["expr"] for group in read["groups"] for rule in group["rules"]]
    )
    assert all(text.count("(") == text.count(")") for text in expressions)


def test_a_value_on_a_bound_counts_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1] and histogram.total == 7.5


@pytest.mark.parametrize("processes", [1, 2])
def test_the_page_of_several_api_processes_has_our_metrics_too(status, monkeypatch, processes):
    if processes > 1:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    app, collector = FastAPI(), ExitCollector()
    app.add_middleware(MetricsMiddleware)
    app.state.early_exit = SimpleNamespace(collector=collector, freshen=AsyncMock())
    collector.publish(json.loads(json.dumps(status)))
    app.get("/metrics", response_class=PlainTextResponse)(lambda: "vllm:other 1.0\n")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            return await http.get("/metrics")

    text = asyncio.run(ask()).text
    assert text.startswith("vllm:other 1.0\n")
    assert ("\napparate:emitted_total 20.0\n" in text) == (processes > 1)


def test_the_figures_of_tenants_can_be_taken_off_the_page(status):
    """The page asks nobody for a key."""

    def page_of(**config):
        registry, collector = CollectorRegistry(), ExitCollector()
        registry.register(collector)
        collector.publish({**status, "config": {**status["config"], **config}})
        return generate_latest(registry).decode()

    assert "apparate:tenant_" in page_of()
    closed = page_of(tenant_metrics=False)
    assert "apparate:tenant_" not in closed and "fast" not in closed and "apparate:emitted_total 20.0" in closed
