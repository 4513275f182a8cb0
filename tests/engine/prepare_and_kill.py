"""Run by test_prepare.py in a process of its own: prepares tiny models, killing the work at random moments.

    python -m tests.engine.prepare_and_kill KILLS SEED OUT MODEL...

vLLM is imported once; every attempt is a fork. Prints one JSON object per model.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from apparate_llm.prepare import synthesise
from apparate_llm.prepare.pipeline import prepare
from apparate_llm.prepare.plan import Plan
from apparate_llm.prepare.store import INDEX, RowStore
from apparate_llm.ramps.checkpoint import RampError, read_manifest
from tests.harness import hurry_vllm

TOKENS = 3000
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


def num_stages(out: Path) -> int:
    """Files of the work folder that a finished piece of work left, and conversations in the store."""
    work = out / "work"
    files = sum(1 for pattern in ("head-*", "*.json") for _ in work.glob(pattern))
    return files + (RowStore(work / "rows").counts["conversations"] if (work / "rows").is_dir() else 0)


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def loads(out: Path) -> bool:
    try:
        read_manifest(out)
    except RampError:
        return False
    return True


def prepare_with_kills(model: Path, out: Path, kills: int, rng: random.Random) -> dict[str, object]:
    out.mkdir()
    killed = 0
    for number in range(kills):
        before = finished_work(out)
        pid = start(plan_for(model, out))
        if number % 2:  # any moment
            time.sleep(rng.uniform(0.1, 7.0))
        else:  # some moment after the next piece of work is finished, on a slow machine too
            until, stages = time.monotonic() + 60, num_stages(out)
            while num_stages(out) <= stages and is_running(pid) and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 1.0))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        after = finished_work(out)
        lost = [name for name, data in before.items() if not after.get(name, b"").startswith(data)]
        assert not lost, f"finished work is gone or changed: {lost}"
        if loads(out):
            assert (out / "report.json").is_file(), "ramps were there before the work was done"
    before = finished_work(out)
    code = os.waitstatus_to_exitcode(os.waitpid(start(plan_for(model, out)), 0)[1])
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    after = finished_work(out)
    assert all(after[name].startswith(data) for name, data in before.items())
    leftovers = [path.name for path in out.rglob(".*")]
    return {"model": model.name, "killed": killed, "kept": len(before), "made": len(after), "leftovers": leftovers}


def main() -> None:
    import vllm.v1.engine.llm_engine  # noqa: F401 - once, for all forks

    hurry_vllm()
    synthesise.KEEP_EVERY_S = 0.5  # much to lose, and often kept
    synthesise.LONG_S = 0.1
    kills, seed, out, *models = sys.argv[1:]
    rng = random.Random(int(seed))
    for model in map(Path, models):
        print(json.dumps(prepare_with_kills(model, Path(out) / model.name, int(kills), rng)), flush=True)


if __name__ == "__main__":
    main()
