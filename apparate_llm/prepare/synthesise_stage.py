"""Stage synthesise, as part of a preparation: what a lap adds to the store."""

from typing import Any

from apparate_llm.prepare.chat import ChatFormat
from apparate_llm.prepare.engine import generation_engine
from apparate_llm.prepare.needs import SynthesisLimits, answer_limit, give_back_memory, synthesis_limits
from apparate_llm.prepare.plan import Run
from apparate_llm.prepare.prompts import PromptSource
from apparate_llm.prepare.records import SynthesisRecord
from apparate_llm.prepare.rows import SPLIT_NAMES
from apparate_llm.prepare.schedule import Lap
from apparate_llm.prepare.synthesise import Synthesiser
from apparate_llm.progress import SECONDS, number

MAX_PROMPT_TOKENS = 96  # of one that the model writes


def synthesise_lap(run: Run, lap: Lap) -> SynthesisRecord:
    """`rows` and `tokens` (of answers) that there are at the end of the lap."""
    plan, workspace, store = run.plan, run.workspace, run.store
    stage, wanted = f"lap-{lap.number}", {"tokens": plan.tokens, "time_budget_s": plan.time_budget_s}
    done: SynthesisRecord | None = workspace.read(stage, wanted)
    if done is not None:
        run.say(f"synthesise: done, {done['tokens']:,} answer tokens")
        return done
    is_time = run.clock.spent_s < lap.synthesise_until_s or not store.counts["rows"]
    is_short = store.counts["answer_tokens"] < lap.tokens or len(store.splits()) < len(SPLIT_NAMES)
    if is_time and is_short:
        _synthesise(run, lap, synthesis_limits(run))
        give_back_memory()
    counts = store.counts
    seconds = round(run.clock.spent_s)
    return workspace.write(
        stage, wanted, SynthesisRecord(rows=counts["rows"], tokens=counts["answer_tokens"], seconds=seconds)
    )


def _synthesise(run: Run, lap: Lap, limits: SynthesisLimits) -> None:
    plan, clock = run.plan, run.clock
    timed, began_s = plan.tokens is None, clock.spent_s
    with (
        run.progress.stage(
            f"synthesise, lap {lap.number + 1}",
            total=lap.synthesise_until_s - began_s if timed else lap.tokens,
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
        synthesiser = _synthesiser(run, llm, limits)

        def on_step() -> None:
            tokens = synthesiser.answer_tokens
            written = f"{number(tokens + synthesiser.tokens_under_way)} answer tokens"
            facts = written if timed else f"{len(synthesiser.work)} conversations under way"
            bar.update(min(clock.spent_s - began_s, bar.total) if timed else min(tokens, bar.total), facts)

        def enough() -> bool:
            late = clock.spent_s >= lap.synthesise_until_s and synthesiser.answer_tokens > 0
            return late or limits.disk_is_full()

        synthesiser.run(
            tokens=lap.tokens,
            most_tokens=float("inf") if timed else float(plan.tokens or 0),
            enough=enough,
            on_step=on_step,
            on_kept=clock.keep,
        )
        if lap.last and timed:
            synthesiser.cut()


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
