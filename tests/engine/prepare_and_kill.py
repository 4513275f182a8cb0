"""Run by test_prepare.py in a process of its own: prepares tiny models, killing the work at random moments.

    python -m tests.engine.prepare_and_kill SEED OUT MODEL...

Kills come soon after a start, and soon after costs, a conversation or the first head were kept. vLLM is imported once;
every attempt is a fork. Prints one JSON object per model.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from apparate_llm.prepare import synthesise
from apparate_llm.prepare.pipeline import prepare
from apparate_llm.prepare.plan import Plan
from apparate_llm.prepare.profile_stage import TURNS
from apparate_llm.prepare.store import INDEX, RowStore
from apparate_llm.prepare.timings import kept_in
from apparate_llm.ramps.checkpoint import RampError, read_manifest
from tests.harness import hurry_vllm

TOKENS = 3000
START, COSTS, CONVERSATION, HEAD = "start", "costs", "conversation", "head"  # after which a kill comes
KILLS = ((START, CONVERSATION, HEAD), (COSTS, CONVERSATION, START))  # of one model after the other
LATEST_S = {START: 7.0, COSTS: 0.5, CONVERSATION: 0.3, HEAD: 0.0}  # after that
WAIT_S = 180.0  # for one of the others, on a slow machine
POLL_S = 0.02
USER_PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7", "w8 w9 w10 w11 w12"]


def plan_for(model: Path, out: Path) -> Plan:
    return Plan(
        model=model,
        out=out,
        depths=(0, 2),
        aux_layers=(1, 3),
        tokens=TOKENS,
        time_budget_s=None,
        seed=0,
        ramp_vocab=120,
        intermediate_size=96,
        user_prompts=[[{"role": "user", "content": text}] for text in USER_PROMPTS],
        enforce_eager=True,
    )


def start(plan: Plan) -> int:
    if (pid := os.fork()) == 0:
        log = os.open(plan.out.parent / f"{plan.out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            prepare(plan)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def finished_work(out: Path) -> dict[str, bytes]:
    """What nothing may change any more: the rows that count, and the heads but the first, which each lap trains on."""
    kept = {path.name: path.read_bytes() for path in (out / "work").glob("head-[1-9]*.safetensors")}
    rows = out / "work" / "rows"
    if (rows / INDEX).is_file():
        store = RowStore(rows)
        kept |= {name: data_of(store, name) for name in store.columns}
    return kept


def data_of(store: RowStore, name: str) -> bytes:
    column = store.columns[name]
    return store.column(name, store.counts[column["count"]]).view(torch.uint8).numpy().tobytes()


def measured_costs(out: Path) -> dict[str, bytes]:
    """Of each kind the turns that were measured, which only further ones may follow."""
    turns = kept_in(out / "work" / TURNS).turns
    return {f"{key}": b"".join(json.dumps(turn).encode() for turn in times) for key, times in turns.items()}


def num_kept(out: Path, kind: str) -> int:
    work = out / "work"
    if kind == COSTS:
        return sum(map(len, kept_in(work / TURNS).turns.values()))
    if kind == HEAD:  # the others follow at once, and then the end
        return sum(1 for _ in work.glob("head-0.safetensors"))
    return RowStore(work / "rows").counts["conversations"] if (work / "rows" / INDEX).is_file() else 0


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def loads(out: Path) -> bool:
    try:
        read_manifest(out)
    except RampError:
        return False
    return True


def start_and_kill(plan: Plan, kind: str, rng: random.Random) -> bool:
    """Whether it had not ended by itself."""
    kept, pid = num_kept(plan.out, kind), start(plan)
    if kind != START:
        until = time.monotonic() + WAIT_S
        while num_kept(plan.out, kind) <= kept and is_running(pid) and time.monotonic() < until:
            time.sleep(POLL_S)
    time.sleep(rng.uniform(0.0, LATEST_S[kind]))
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def prepare_with_kills(model: Path, out: Path, kills: Sequence[str], rng: random.Random) -> dict[str, object]:
    out.mkdir()
    plan = plan_for(model, out)
    killed: list[tuple[str, bool]] = []
    for kind in kills:
        before = finished_work(out) | measured_costs(out)
        killed.append((kind, start_and_kill(plan, kind, rng)))
        after = finished_work(out) | measured_costs(out)
        lost = [name for name, data in before.items() if not after.get(name, b"").startswith(data)]
        assert not lost, f"finished work is gone or changed: {lost}"
        if loads(out):
            assert (out / "report.json").is_file(), "ramps were there before the work was done"
    before, costs = finished_work(out), measured_costs(out)
    code = os.waitstatus_to_exitcode(os.waitpid(start(plan), 0)[1])
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    after = finished_work(out)
    assert all((after | measured_costs(out))[name].startswith(data) for name, data in (before | costs).items())
    leftovers = [path.name for path in out.rglob(".*")]
    plain = [len(turns) for key, turns in kept_in(out / "work" / TURNS).turns.items() if key[0] == "plain"]
    kept = {"kept": len(before), "costs": len(costs), "made": len(after), "plain": plain}
    return {"model": model.name, "killed": killed, **kept, "leftovers": leftovers}


def main() -> None:
    import vllm.v1.engine.llm_engine  # noqa: F401 - once, for all forks

    hurry_vllm()
    synthesise.KEEP_EVERY_S = 0.5  # much to lose, and often kept
    synthesise.LONG_S = 0.1
    seed, out, *models = sys.argv[1:]
    rng = random.Random(int(seed))
    for number, model in enumerate(map(Path, models)):
        kills = KILLS[number % len(KILLS)]
        print(json.dumps(prepare_with_kills(model, Path(out) / model.name, kills, rng)), flush=True)


if __name__ == "__main__":
    main()
