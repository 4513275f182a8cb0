"""Preparations in parts: made-up rows of a tiny model, and an engine whose clock the test moves."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from apparate_llm.prepare.plan import Plan, Run
from apparate_llm.prepare.rows import TOP, Conversation
from apparate_llm.prepare.schedule import WorkClock
from apparate_llm.prepare.splits import split_of
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import BaseModelInfo
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE

CONTEXT = 512
STATES = (1, 2, 3)


class Killed(BaseException):
    """As by `kill -9`, as far as a test can."""


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def plan_for(model: Path, out: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "model": model,
        "out": out,
        "depths": (0, 2),
        "aux_layers": (1, 3),
        "tokens": 3000,
        "time_budget_s": None,
        "seed": 0,
        "ramp_vocab": 40,
        "intermediate_size": 96,
        "enforce_eager": True,
    }
    return Plan(**(settings | changes))


@contextmanager
def running(plan: Plan) -> Iterator[tuple[Run, io.StringIO]]:
    """Without its clock's thread; and what it says."""
    log, workspace = io.StringIO(), Workspace(plan.out)
    with Progress(Console(file=log, width=200), poll_s=1e6) as progress:
        base, store = BaseModelInfo.of(plan.model), RowStore(workspace.path("rows"))
        yield Run(plan, workspace, store, base, WorkClock(workspace), progress), log


def lines(log: io.StringIO) -> list[str]:
    """Without the time of day."""
    return [line[10:] for line in log.getvalue().splitlines()]


def conversations(number: int, *, tokens: int = 18, seed: int = 0) -> list[Conversation]:
    """Made up: a token has always the same states, and the one that follows it."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    made = []
    for place in range(number):
        text = torch.randint(5, VOCAB_SIZE, (6,), generator=generator).tolist()
        while len(text) < 6 + tokens:
            text.append(5 + (3 * text[-1] + 7) % (VOCAB_SIZE - 5))
        best = torch.tensor(text[5:])
        states = table[torch.tensor(text[4:-1])]
        ids = (best[:, None] + torch.arange(TOP)) % VOCAB_SIZE
        probability = torch.full((len(best), TOP), 0.1 / (TOP - 1))
        probability[:, 0] = 0.9
        at_depths = {depth: states + depth for depth in STATES}
        split = split_of(place, "0")
        made.append(Conversation(text[:6], text[6:], at_depths, states, ids, probability.log(), split, place % 2))
    return made


# ---- an engine


class FakeEngine:
    """Each step takes `step_s` of the clock, and gives each request a token: a prompt `prompt_words`, an answer as many
    as it may have."""

    def __init__(self, clock: Clock, *, step_s: float, prompt_words: int = 8) -> None:
        self.clock, self.step_s, self.prompt_words = clock, step_s, prompt_words
        self.requests: dict[str, Any] = {}
        self.generated = 0
        self.longest_prompt = 0
        self.model_config = SimpleNamespace(max_model_len=CONTEXT)

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        ids = prompt["prompt_token_ids"]
        assert 0 < len(ids) < CONTEXT
        self.longest_prompt = max(self.longest_prompt, len(ids))
        most = min(params.max_tokens, self.prompt_words if params.detokenize else params.max_tokens)
        self.requests[name] = SimpleNamespace(ids=list(ids), made=[], most=most, ended=False)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def step(self) -> list[Any]:
        self.clock.now += self.step_s
        outputs = []
        for name, request in self.requests.items():
            if request.ended:
                continue
            self.generated += 1
            token = 5 + (17 * self.generated + len(request.made)) % (VOCAB_SIZE - 5)
            request.made.append(token)
            request.ended = len(request.made) >= request.most
            news = SimpleNamespace(token_ids=[token], text=f" w{token - 5}")
            outputs.append(SimpleNamespace(request_id=name, finished=request.ended, outputs=[news]))
        return outputs


class FakeCapture:
    """Rows of what a `FakeEngine` generates."""

    def __init__(self, llm: Any, *, depths: tuple[int, ...]) -> None:
        self.engine, self.depths = llm.llm_engine, depths

    def watch(self, request: str, num_prompt: int) -> None:
        pass

    def draw(self, request: str, temperature: float) -> None:
        pass

    def forget(self, request: str) -> None:
        self.engine.requests.pop(request, None)

    def rows_so_far(self, request: str) -> dict[int | str, torch.Tensor]:
        made = self.engine.requests[request].made
        if not made:
            return {}
        number = len(made) + 1
        keys: list[int | str] = [*self.depths, "final"]
        rows = {key: torch.zeros(number, HIDDEN_SIZE) for key in keys}
        rows["top_ids"] = torch.zeros(number, TOP, dtype=torch.int32)
        rows["top_logprobs"] = torch.zeros(number, TOP, dtype=torch.float16)
        return rows


class FakeLLM:
    def __init__(self, engine: FakeEngine, tokenizer: Any) -> None:
        self.llm_engine, self.tokenizer = engine, tokenizer

    def get_tokenizer(self) -> Any:
        return self.tokenizer
