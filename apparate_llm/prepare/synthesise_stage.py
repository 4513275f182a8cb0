"""Stage synthesise, as part of a preparation: what a lap adds to the store."""

from typing import Any, NamedTuple

from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.engine import generation_engine, import_vllm
from apparate_llm.prepare.needs import SynthesisLimits, answer_limit, disk_left, give_back_memory, synthesis_limits
from apparate_llm.prepare.plan import Run
from apparate_llm.prepare.prompts import PromptSource
from apparate_llm.prepare.records import StartRecord, SynthesisRecord
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap, write_until_s
from apparate_llm.prepare.synthesise import Synthesiser
from apparate_llm.progress import SECONDS, Stage, number, rate_of

MAX_PROMPT_TOKENS = 96  # of one that the model writes
START = "start"  # the record of how long the model takes to start
WORTH = 2.0  # starts that a lap must have time for: it writes for as long as it starts, at least
COLD_FRAC = 0.25  # of the first start, which may have read all from the disk, that counts until there was another


def synthesise_lap(run: Run, lap: Lap) -> SynthesisRecord:
    """`rows` and `tokens` (of answers) that there are at the end of the lap. Of one that an earlier start has ended
    nothing is said: the lap's own line has its tokens."""
    plan, workspace, store = run.plan, run.workspace, run.store
    stage, wanted = f"lap-{lap.number}", {"tokens": plan.tokens, "time_budget_s": plan.time_budget_s}
    done: SynthesisRecord | None = workspace.read(stage, wanted)
    if done is not None:
        return done
    if not _ended(run, lap):
        lap = _synthesise(run, lap, synthesis_limits(run))
        give_back_memory()
    counts = store.counts
    seconds = round(run.clock.spent_s)
    result = SynthesisRecord(rows=counts["rows"], tokens=counts["answer_tokens"], seconds=seconds)
    is_short = result["tokens"] < lap.tokens and run.clock.spent_s < lap.synthesise_until_s
    if is_short and disk_left(run) <= 0:
        run.say(f"the disk is full: {result['tokens']:,} answer tokens have to do; make room and start again for more")
        return {**result, "disk_is_full": True}  # a later start goes on
    return workspace.write(stage, wanted, result)


def _ended(run: Run, lap: Lap) -> bool:
    """Whether there is no use in starting the model (again) for this lap."""
    if disk_left(run) <= 0:
        return True
    counts, has_all = run.store.counts, len(run.store.splits()) == len(SPLIT_NAMES)
    if not has_all and lap.last:
        return False
    is_late = run.clock.spent_s + WORTH * _expected_start_s(run) >= lap.synthesise_until_s
    return is_late or (has_all and counts["answer_tokens"] >= lap.tokens)


def _starts(run: Run) -> StartRecord:
    known: StartRecord | None = run.workspace.read(START, {"format": 2})
    return known or StartRecord(seconds=0.0, number=0, first_s=0.0)


def _expected_start_s(run: Run) -> float:
    known = _starts(run)
    return known["seconds"] * (COLD_FRAC if known["number"] == 1 else 1.0)


def start_that_counts(run: Run) -> float:
    """Seconds of the model's start by which the number of laps is chosen, once and for all starts of a preparation;
    0.0 where it is not known."""
    return _starts(run)["first_s"]


def _keep_start(run: Run, lap: Lap, seconds: float) -> None:
    known = _starts(run)
    fastest_s = min(seconds, known["seconds"]) if known["number"] else seconds
    first_s = seconds if not known["number"] and lap.number == 0 else known["first_s"]
    run.start_s = first_s
    made = StartRecord(seconds=fastest_s, number=known["number"] + 1, first_s=first_s)
    run.workspace.write(START, {"format": 2}, made)


def _synthesise(run: Run, lap: Lap, limits: SynthesisLimits) -> Lap:
    """Returns the lap, which has become the only one where starting the model takes too long for several."""
    plan, clock = run.plan, run.clock
    timed, began_s = plan.tokens is None, clock.spent_s
    with run.progress.stage(
        f"synthesise, lap {lap.number + 1}",
        total=max(0.0, lap.synthesise_until_s - began_s) if timed else lap.tokens,
        unit=SECONDS if timed else "tokens",
        facts="starting the model",
    ) as bar:
        import_vllm()
        loads_s = clock.spent_s
        with generation_engine(
            plan.model,
            seed=plan.seed,
            max_num_seqs=limits.slots,
            kv_cache_memory_bytes=limits.kv_cache_bytes,
            enable_prefix_caching=True,
        ) as llm:
            _keep_start(run, lap, clock.spent_s - loads_s)
            if lap.number == 0 and not lap.last and len(laps := run.schedule.laps()) == 1:
                lap = laps[0]
                bar.total = max(0.0, lap.synthesise_until_s - began_s) if timed else lap.tokens
            synthesiser = _synthesiser(run, llm, limits)
            _run(run, lap, limits, synthesiser, bar, began_s)
            del synthesiser, llm  # what vLLM imports keeps exceptions, and with them this frame
    return lap


def _run(run: Run, lap: Lap, limits: SynthesisLimits, synthesiser: Synthesiser, bar: Stage, began_s: float) -> None:
    clock, tokens = run.clock, run.plan.tokens
    rate, until_s = _Rate(clock.spent_s, _tokens(synthesiser)), lap.synthesise_until_s

    def on_step() -> None:
        nonlocal until_s
        now_s = clock.spent_s
        if tokens is not None:
            done = min(synthesiser.answer_tokens, bar.total)
            bar.update(done, f"{len(synthesiser.work)} conversations under way")
            return
        until_s = rate.until_s(run, lap, synthesiser, now_s)
        bar.total = max(0.0, until_s - began_s)
        bar.update(min(now_s - began_s, bar.total), rate.facts(synthesiser, now_s))

    def enough() -> bool:
        late = clock.spent_s >= until_s
        return limits.disk_is_full() or (late and (not lap.last or synthesiser.has_all_splits(cut=tokens is None)))

    synthesiser.run(
        tokens=lap.tokens,
        most_tokens=float("inf") if tokens is None else float(tokens),
        enough=enough,
        on_step=on_step,
        on_kept=clock.keep,
    )
    if lap.last and tokens is None:
        synthesiser.cut()


def _tokens(synthesiser: Synthesiser) -> int:
    return synthesiser.answer_tokens + synthesiser.tokens_under_way


class _Rate(NamedTuple):
    """When the model was up, and the answer tokens that there were."""

    began_s: float
    tokens: int

    def per_s(self, tokens: int, now_s: float) -> float:
        return (tokens - self.tokens) / (now_s - self.began_s) if now_s > self.began_s else 0.0

    def facts(self, synthesiser: Synthesiser, now_s: float) -> str:
        tokens = _tokens(synthesiser)
        written, per_s = f"{number(tokens)} answer tokens", self.per_s(tokens, now_s)
        return f"{written}, {rate_of(per_s, 'tokens')}" if per_s > 0 else written

    def until_s(self, run: Run, lap: Lap, synthesiser: Synthesiser, now_s: float) -> float:
        tokens = _tokens(synthesiser)
        return write_until_s(
            lap,
            run.schedule,
            spent_s=now_s,
            tokens=tokens,
            tokens_per_s=self.per_s(tokens, now_s),
            row_s=run.trained_row_s,
        )


def _synthesiser(run: Run, llm: Any, limits: SynthesisLimits) -> Synthesiser:
    plan = run.plan
    length = llm.llm_engine.model_config.max_model_len
    chat = ChatFormat(llm.get_tokenizer(), max_model_len=length, max_answer_tokens=answer_limit(length), say=run.say)
    return Synthesiser(
        llm,
        run.store,
        PromptSource(chat, user_prompts=plan.user_prompts, seed=plan.seed),
        depths=plan.states,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_answer_tokens=answer_limit(length),
        slots=limits.slots,
        seed=plan.seed,
        row_s=run.row_s,
    )
