#!/usr/bin/env python3
"""A storm of requests of every kind against one server: each text is plain vLLM's, and its exits add up.

    python -m scripts.check_storm [--model DIR] [--minutes 5] [--references FILE] [--json OUT] [vLLM flags]

From the repository's root. float32 and a KV cache that is too small for all clients, so that requests are preempted.
First plain vLLM answers each request of the pool by itself; --references keeps its answers for another run. Then the
clients ask for what they draw from the pool, whole or as streams, and break off some. With an --accuracy-bound above 0
a quarter of the requests may diverge, so that exits are released, and are not compared. Exit code 1 if a text differs,
a request fails, nothing was preempted, exits do not add up or are left over, or the server fell back or ended.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from apparate_llm.eval.prompts import Messages, load_prompts
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import ModelChoice, early_exits, plain_vllm
from apparate_llm.machine import machine
from apparate_llm.named_model import model_folder
from apparate_llm.sse import event_data_async

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MAX_TOKENS = 48
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
# Kind -> route and what a request of it asks for besides. All of these have one right answer.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, {}),
    "greedy text": (TEXT, {}),
    "long": (CHAT, {"max_tokens": 3 * MAX_TOKENS, "ignore_eos": True}),
    "report": (CHAT, {"vllm_xargs": {"early_exit_report": 1}}),
    "logprobs": (CHAT, {"logprobs": True, "top_logprobs": 3}),
    "scores of tokens": (TEXT, {"logprobs": 1, "logprob_token_ids": [5, 80, 31], "max_tokens": 12}),
    "json_schema": (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}),
    "stop strings": (CHAT, {"stop": [".", "\n\n", " the"]}),
    "stop tokens": (TEXT, {"stop_token_ids": list(range(200, 400)), "ignore_eos": True}),
    "min_tokens": (CHAT, {"min_tokens": 30}),
    "penalties": (CHAT, {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}),
    "bad words": (CHAT, {"bad_words": ["the", "is"]}),
    "logit_bias": (CHAT, {"logit_bias": {"28": -100, "30": 2}}),
    "seed": (CHAT, {"temperature": 0.8, "seed": 11, "top_p": 0.9}),
    "n": (TEXT, {"temperature": 1.0, "seed": 12, "n": 3}),
    "min_p": (CHAT, {"temperature": 1.1, "seed": 13, "min_p": 0.1}),
}
FREE = {"temperature": 0.9, "top_k": 40}  # without a seed: any answer is right
ABORTED, STREAMED, SAMPLED, LOOSE = 0.15, 0.5, 0.08, 0.25  # shares of the requests
MOST_LOGPROB_APART = 1e-2
SETTLING_S = 30.0
Answers = list[dict[str, Any]]


@dataclass(frozen=True)
class Request:
    kind: str
    prompt: int
    route: str
    body: dict[str, Any]


def pool_of(prompts: list[Messages]) -> list[Request]:
    pool = []
    for index, messages in enumerate(prompts):
        for kind, (route, asked) in KINDS.items():
            given: dict[str, Any] = {"messages": messages} if route == CHAT else {"prompt": messages[-1]["content"]}
            pool.append(
                Request(kind, index, route, {**given, "temperature": 0, "max_tokens": MAX_TOKENS, **asked}),
            )
    return pool


async def ask(http: httpx.AsyncClient, model: str, request: Request) -> Answers:
    """Of each choice its text, how it ended, its log-probabilities; with a report its tokens' texts, too."""
    reply = await http.post(request.route, json={"model": model, **request.body})
    if reply.status_code != 200:
        raise RuntimeError(f"HTTP {reply.status_code}: {reply.text[:300]}")
    body, answers = reply.json(), []
    for choice in sorted(body["choices"], key=lambda choice: choice["index"]):
        text = choice["text"] if request.route == TEXT else choice["message"]["content"]
        answers.append({"text": text or "", "finish": choice["finish_reason"], "scores": scores_of(choice)})
    reports = {report["index"]: report for report in body.get("early_exit") or []}
    for index, report in reports.items():
        if "".join(report["texts"]) != answers[index]["text"]:
            raise RuntimeError(f"the report says {''.join(report['texts'])!r} of {answers[index]['text']!r}")
    return answers


def scores_of(choice: dict[str, Any]) -> list[float] | None:
    scores = choice.get("logprobs")
    if not scores:
        return None
    return scores["token_logprobs"] if "token_logprobs" in scores else [item["logprob"] for item in scores["content"]]


async def stream(http: httpx.AsyncClient, model: str, request: Request, num_events: int | None) -> Answers:
    """The same, as it comes; num_events: after which the client goes."""
    answers: dict[int, dict[str, Any]] = {}
    body = {"model": model, "stream": True, **request.body}
    async with http.stream("POST", request.route, json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"HTTP {reply.status_code}: {(await reply.aread()).decode()[:300]}")
        async for data in event_data_async(reply.aiter_bytes()):
            if num_events is not None:
                num_events -= 1
                if num_events < 0:
                    break
            chunk = json.loads(data) if data != "[DONE]" else {}
            if "error" in chunk:
                raise RuntimeError(f"a stream broke off: {chunk}")
            for choice in chunk.get("choices", []):
                own = answers.setdefault(choice["index"], {"text": "", "finish": None, "scores": None})
                own["text"] += (choice["text"] if request.route == TEXT else choice["delta"].get("content")) or ""
                own["finish"] = choice["finish_reason"] or own["finish"]
                if (scores := scores_of(choice)) is not None:
                    own["scores"] = [*(own["scores"] or []), *scores]
    return [answers[index] for index in sorted(answers)]


def difference(got: Answers, expected: Answers, *, broken_off: bool) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if broken_off:
        for own, whole in zip(got, expected, strict=False):
            if not whole["text"].startswith(own["text"]):
                return f"begins with {own['text']!r}, not as {whole['text']!r}"
        return None
    for name in ("text", "finish"):
        ours, theirs = [own[name] for own in got], [whole[name] for whole in expected]
        if ours != theirs:
            return f"{name} {ours!r}, not {theirs!r}"
    for own, whole in zip(got, expected, strict=True):
        pairs = zip(own["scores"] or [], whole["scores"] or [], strict=True)
        if apart := [pair for pair in pairs if abs(pair[0] - pair[1]) > MOST_LOGPROB_APART]:
            return f"log-probabilities differ: {apart[:3]}"
    return None


@dataclass
class Storm:
    """What the clients do, and what came of it."""

    http: httpx.AsyncClient
    model: str
    pool: list[Request]
    references: list[Answers]
    ends_s: float
    bounded: bool
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < self.ends_s:
            index = draw.randrange(len(self.pool))
            request, expected = self.pool[index], self.references[index]
            broken_off, streamed = draw.random() < ABORTED, draw.random() < STREAMED
            is_exact = True
            if draw.random() < SAMPLED:
                request, is_exact = self._changed(request, "sampled", FREE), False
            elif self.bounded:
                is_exact = draw.random() >= LOOSE
                own = {} if not is_exact else {"accuracy_bound": 0.0}
                request = self._changed(
                    request, request.kind, {"vllm_xargs": {**request.body.get("vllm_xargs", {}), **own}}
                )
            self.asked[request.kind] += 1
            self.asked["(broken off)"] += broken_off
            self.asked["(streamed)"] += streamed and not broken_off
            try:
                if broken_off:
                    got = await stream(self.http, self.model, request, draw.randrange(1, 12))
                elif streamed:
                    got = await stream(self.http, self.model, request, None)
                else:
                    got = await ask(self.http, self.model, request)
                problem = difference(got, expected, broken_off=broken_off) if is_exact else None
            except Exception as error:
                problem = repr(error)
            if problem is not None:
                self.wrong.append(
                    {"kind": request.kind, "prompt": request.prompt, "streamed": streamed, "problem": problem}
                )
                print(f"{request.kind}, prompt {request.prompt}: {problem}", file=sys.stderr, flush=True)

    def _changed(self, request: Request, kind: str, given: dict[str, Any]) -> Request:
        body = {**request.body, **given}
        if kind == "sampled":
            body.pop("seed", None)
        return Request(kind, request.prompt, request.route, body)


async def raise_storm(
    server: Server, pool: list[Request], references: list[Answers], args: argparse.Namespace
) -> Storm:
    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=600.0, limits=limits) as http:
        ends_s = time.monotonic() + args.minutes * 60
        storm = Storm(http, server.model_name(), pool, references, ends_s, args.accuracy_bound > 0)
        await asyncio.gather(*(storm.client(number) for number in range(args.clients)))
    return storm


def asked_of_plain(request: Request) -> Request:
    body = {key: value for key, value in request.body.items() if key != "vllm_xargs"}
    return Request(request.kind, request.prompt, request.route, body)


def key_of(request: Request) -> str:
    return json.dumps([request.route, request.body], sort_keys=True)


async def answer_one_by_one(server: Server, requests: list[Request]) -> dict[str, Answers]:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=600.0) as http:
        model = server.model_name()
        return {key_of(request): await ask(http, model, request) for request in requests}


def references_of(choice: ModelChoice, pool: list[Request], file: Path | None, log: Path) -> list[Answers]:
    """Plain vLLM's answers, one request at a time; `file` has those of earlier runs, and gets the others."""
    kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
    known = kept.setdefault(shlex.join([str(choice.model), *choice.vllm_flags]), {})
    requests = [asked_of_plain(request) for request in pool]
    if missing := [request for request in requests if key_of(request) not in known]:
        with Server(plain_vllm(choice), log=log, start_timeout_s=900) as server:
            server.wait_ready()
            known.update(asyncio.run(answer_one_by_one(server, missing)))
        if file is not None:
            file.write_text(json.dumps(kept))
    return [known[key_of(request)] for request in requests]


def preemptions(server: Server) -> int:
    text = httpx.get(f"{server.base_url}/metrics", timeout=30.0).raise_for_status().text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total"))


def settled(server: Server) -> dict[str, Any]:
    """The server's status once no request runs there."""
    deadline = time.monotonic() + SETTLING_S
    while True:
        status = server.status()
        if (not status["running"] and not status["counts"]["outstanding"]) or time.monotonic() > deadline:
            return status
        time.sleep(0.5)


def faults(status: dict[str, Any], server: Server, num_preempted: int) -> list[str]:
    """What the server's own figures say is wrong."""
    counts, outcomes = status["counts"], status["counts"]["outcomes"]
    total = {name: sum(by_depth.values()) for name, by_depth in outcomes.items()}
    accepted = total["held_accepted"] + total["held_accepted_divergence"]
    checks = {
        "requests run on": status["running"] == 0,
        "exits are outstanding": counts["outstanding"] == 0,
        "released exits do not add up": counts["released"] == counts["verified"] + counts["unverified"],
        "held exits do not add up": counts["held"] == accepted + total["held_rejected"],
        "accepted exits do not add up": counts["accepted"] == accepted,
        "verdicts do not add up": counts["verified"] == total["released_right"] + total["released_divergence"],
        "exits by depth do not add up": sum(counts["exits_by_depth"].values()) == counts["released"] + accepted,
        "no exits were taken": counts["accepted"] > 0,
        "more divergences than the bound": counts["divergences_at_worst"]
        <= status["config"]["accuracy_bound"] * counts["emitted"],
        "the server fell back": counts["fallbacks"] == 0 and status["active"],
        "nothing was preempted": num_preempted > 0,
        "the server is not well": httpx.get(f"{server.base_url}/health", timeout=30.0).status_code == 200,
        "the server ended": server.process is not None and server.process.poll() is None,
    }
    return [f"{what}: {counts}" for what, is_well in checks.items() if not is_well]


def parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=6)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--accuracy-bound", type=float, default=0.0)
    parser.add_argument("--policy", default="static", help="static takes exits at any load (default)")
    parser.add_argument("--kv-blocks", type=int, default=36, help="of 32 tokens each")
    parser.add_argument("--references", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_known_args()


def main() -> int:
    args, flags = parsed()
    model, folder = model_folder(args.model), Path(tempfile.mkdtemp(prefix="check-storm-"))
    common: tuple[str, ...] = ("--dtype", "float32", "--max-model-len", "1024", "--block-size", "32")
    common += ("--kv-cache-memory-bytes", str(1 << 30), *flags)
    pool = pool_of([prompt.messages for prompt in load_prompts(args.prompts)[: args.num_prompts]])
    references = references_of(ModelChoice(model, common), pool, args.references, folder / "plain.log")
    options = ["--policy", args.policy, "--accuracy-bound", str(args.accuracy_bound)]
    if args.policy == "static":
        options += ["--threshold", "0.5", "--hold-threshold", "0.3", "--max-batch-tokens", "1024"]
    tiny = ModelChoice(model, (*common, "--num-gpu-blocks-override", str(args.kv_blocks)))
    system = early_exits("storm", tiny, *options)
    with Server(system, log=folder / "storm.log", start_timeout_s=900) as server:
        server.wait_ready()
        storm = asyncio.run(raise_storm(server, pool, references, args))
        status, num_preempted = settled(server), preemptions(server)
        problems = faults(status, server, num_preempted)
    result = {
        "command": "python -m scripts.check_storm " + shlex.join(sys.argv[1:]),
        "machine": machine(),
        "requests": dict(storm.asked),
        "wrong": storm.wrong,
        "faults": problems,
        "preemptions": num_preempted,
        "counts": status["counts"],
        "logs": str(folder),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(storm.wrong or problems))


if __name__ == "__main__":
    sys.exit(main())
