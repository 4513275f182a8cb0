"""Stage synthesise, as part of a preparation: what a lap adds to the store."""

from typing import Any, NamedTuple

from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.engine import generation_engine
from apparate_llm.prepare.needs import SynthesisLimits, answer_limit, disk_left, give_back_memory, synthesis_limits
from apparate_llm.prepare.plan import Run
from apparate_llm.prepare.prompts import PromptSource
from apparate_llm.prepare.records import SynthesisRecord
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap
from apparate_llm.prepare.synthesise import Synthesiser
from apparate_llm.progress import SECONDS, number, rate_of

MAX_PROMPT_TOKENS = 96  # of one that the model writes


def synthesise_lap(run: Run, lap: Lap) -> SynthesisRecord:
    """`rows` and `tokens` (of answers) that there are at the end of the lap. Of one that an earlier start has ended
    nothing is said: the lap's own line has its tokens."""
    plan, workspace, store = run.plan, run.workspace, run.store
    stage, wanted = f"lap-{lap.number}", {"tokens": plan.tokens, "time_budget_s": plan.time_budget_s}
    done: SynthesisRecord | None = workspace.read(stage, wanted)
    if done is not None:
        return done
    if not _ended(run, lap):
        _synthesise(run, lap, synthesis_limits(run))
        give_back_memory()
    counts = store.counts
    seconds = round(run.clock.spent_s)
    result = SynthesisRecord(rows=counts["rows"], tokens=counts["answer_tokens"], seconds=seconds)
    is_short = result["tokens"] < lap.tokens and run.clock.spent_s < lap.synthesise_until_s
    if is_short and disk_left(run) <= 0:
        run.say(f"the disk is full: {result['tokens']:,} answer tokens have to do; make room and start again for more")
        return result  # a later start goes on
    return workspace.write(stage, wanted, result)


def _ended(run: Run, lap: Lap) -> bool:
    """Whether there is no use in starting the model (again) for this lap."""
    counts, has_all = run.store.counts, len(run.store.splits()) == len(SPLIT_NAMES)
    if not has_all and lap.last:
        return False
    start_s = (run.workspace.read("start", {}) or {"seconds": 0.0})["seconds"]
    is_late = run.clock.spent_s + start_s >= lap.synthesise_until_s
    return disk_left(run) <= 0 or is_late or (has_all and counts["answer_tokens"] >= lap.tokens)


def _synthesise(run: Run, lap: Lap, limits: SynthesisLimits) -> None:
    plan, clock = run.plan, run.clock
    timed, began_s = plan.tokens is None, clock.spent_s
    with (
        run.progress.stage(
            f"synthesise, lap {lap.number + 1}",
            total=max(0.0, lap.synthesise_until_s - began_s) if timed else lap.tokens,
            unit=SECONDS if timed else "tokens",
            facts="starting the model",
        ) as bar,
        generation_engine(
            plan.model,
            seed=plan.seed,
            max_num_seqs=limits.slots,
            kv_cache_memory_bytes=limits.kv_cache_bytes,
            enable_prefix_caching=True,
        ) as llm,
    ):
        run.workspace.write("start", {}, {"seconds": clock.spent_s - began_s})
        synthesiser = _synthesiser(run, llm, limits)
        rate = _Rate(clock.spent_s, synthesiser.answer_tokens + synthesiser.tokens_under_way)

        def on_step() -> None:
            done = clock.spent_s - began_s if timed else synthesiser.answer_tokens
            under_way = f"{len(synthesiser.work)} conversations under way"
            bar.update(min(done, bar.total), rate.facts(synthesiser, clock.spent_s) if timed else under_way)

        def enough() -> bool:
            late = clock.spent_s >= lap.synthesise_until_s
            return limits.disk_is_full() or (late and (not lap.last or synthesiser.has_all_splits(cut=timed)))

        synthesiser.run(
            tokens=lap.tokens,
            most_tokens=float("inf") if timed else float(plan.tokens or 0),
            enough=enough,
            on_step=on_step,
            on_kept=clock.keep,
        )
        if lap.last and timed:
            synthesiser.cut()


class _Rate(NamedTuple):
    """When the model was up, and the answer tokens that there were."""

    began_s: float
    tokens: int

    def facts(self, synthesiser: Synthesiser, now_s: float) -> str:
        tokens = synthesiser.answer_tokens + synthesiser.tokens_under_way
        written = f"{number(tokens)} answer tokens"
        if tokens <= self.tokens or now_s <= self.began_s:
            return written
        return f"{written}, {rate_of((tokens - self.tokens) / (now_s - self.began_s), 'tokens')}"


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
    )
