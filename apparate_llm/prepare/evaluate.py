"""`ramps evaluate`: how often ramps agree with the full model on text that it generates greedily."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from apparate_llm.naming import model_name
from apparate_llm.prepare.acceptance import Measured, accepted_per_step, measure_head
from apparate_llm.prepare.chat import Chat
from apparate_llm.prepare.draft_data import BaseParts, DraftData
from apparate_llm.prepare.rows import LEAD, Rows
from apparate_llm.progress import Progress
from apparate_llm.ramps.checkpoint import RampManifest
from apparate_llm.ramps.load import RampSet, calibrated_all, load_ramps

CERTAIN = (0.5, 0.7, 0.9, 0.99)
CALIBRATION_BINS = 15


class Position(BaseModel):
    model_config = ConfigDict(extra="forbid")

    position: int  # of an exit in its engine step, from 0
    # Where the exits at all earlier positions were accepted. Mean over categories where the prompts have one, else over
    # rows.
    acceptance_rate: float | None
    acceptance_rate_all_rows: float | None
    rows: int


class DepthResult(BaseModel):
    model_config = ConfigDict(extra="forbid")

    depth: int
    positions: list[Position]
    accepted_per_step: float  # of 4 draft steps that stop at the first disagreement; mean acceptance length less 1
    calibration_error: float
    by_category: dict[str, dict[str, float | None]]  # category -> position -> acceptance rate


class Evaluation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: int = 3
    model: str
    prompts: int
    left_out: dict[str, int] = {}  # reason -> prompts that could not be asked or got no answer
    answer_tokens: int
    depths: list[DepthResult]
    ceiling: dict[str, float]
    calibration_error: float  # of the default depth


def mean(values: torch.Tensor) -> float | None:
    return float(values.float().mean()) if len(values) else None


def ceiling(rows: Rows) -> dict[str, float]:
    """The full model's own certainty over answer rows: what no ramp can know better than the model does.

    `p_over_T_frac`: share of tokens whose best next token has more probability than T; `mean_best_p`: agreement of a
    perfect model of the *distribution* with text sampled from it.
    """
    best = rows.top_logprobs[rows.answer_index > LEAD, 0].float().exp()
    facts = {f"p_over_{level:g}_frac": float((best > level).float().mean()) for level in CERTAIN}
    looked_up = (rows.lookup_tokens == rows.top_ids[:, 0]) & (rows.lookup_lengths > 0)
    return facts | {
        "mean_best_p": float(best.mean()),
        "lookup_agreement": float(looked_up[rows.answer_index > LEAD].float().mean()),
    }


def calibration_error(confidence: torch.Tensor, agrees: torch.Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: bins of equal width, |mean confidence - agreement| weighted by rows (Guo et al.,
    ICML 2017)."""
    if not len(confidence):
        return 0.0
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    gap = torch.bincount(place, weights=confidence.double() - agrees.double(), minlength=bins).abs()
    return float(gap.sum() / count.sum())


def pooled_calibration(
    by_position: list[Measured], calibration: list[tuple[float, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(calibrated confidence, agreement) of all positions together."""
    confidence = [
        calibrated_all(measured.confidence, *calibration[min(number, len(calibration) - 1)])
        for number, measured in enumerate(by_position)
    ]
    return torch.cat(confidence), torch.cat([measured.agrees for measured in by_position])


class Answered(NamedTuple):
    """What the model answered, in rows."""

    prompts: list[int]  # which of those given were answered
    left_out: dict[str, int]  # how many of the others for which reason
    answer_tokens: int
    rows: Rows
    base: BaseParts
    dtype: torch.dtype
    texts: list[tuple[list[int], list[int]]]  # prompt and answer of each


def answer(
    model: Path, manifest: RampManifest, prompts: Sequence[Chat], *, max_tokens: int, progress: Progress
) -> Answered:
    """Generate greedily with the model, in this process, at most `max_tokens` tokens for each prompt. `progress` says
    which prompts are left out; raises ValueError if these are all."""
    from apparate_llm.prepare.capture import Capture
    from apparate_llm.prepare.chat import NOT_ANSWERED, ChatFormat, LeftOut
    from apparate_llm.prepare.engine import generation_engine
    from apparate_llm.prepare.rows import rows_of
    from apparate_llm.prepare.synthesise import generate_rows

    depths = tuple(sorted({depth for depth in (*manifest.depths, *manifest.aux_layers) if depth > 0}))
    stage_of_answers = progress.stage("answer", total=len(prompts), unit="prompts", facts="loading the model")
    with stage_of_answers as stage, generation_engine(model) as llm:
        capture = Capture(llm, depths=depths)
        config = llm.llm_engine.model_config
        chat = ChatFormat(
            llm.get_tokenizer(), max_model_len=config.max_model_len, max_answer_tokens=max_tokens, say=progress.say
        )
        asked, left_out = chat.render_all(prompts)
        stage.total = len(asked)
        stage.update(0)
        texts = [ids for _, ids in asked]
        answers = generate_rows(llm, capture, texts, temperature=0.0, max_tokens=max_tokens, on_answers=stage.update)
        del capture, llm  # what vLLM imports keeps exceptions, and with them this frame
    for conversation in answers:
        if conversation is None:
            left_out.add(LeftOut(NOT_ANSWERED))
    conversations = [conversation for conversation in answers if conversation is not None]
    if left_out.counts[NOT_ANSWERED]:
        left_out.tell(progress.say)
    return Answered(
        prompts=[number for (number, _), conversation in zip(asked, answers, strict=True) if conversation is not None],
        left_out=dict(left_out.counts),
        answer_tokens=sum(len(item.answer) for item in conversations),
        rows=rows_of(conversations),
        base=BaseParts.of(model),
        dtype=config.dtype,
        texts=[(item.prompt, item.answer) for item in conversations],
    )


def measure(answered: Answered, ramps: RampSet) -> list[Measured]:
    """A ramp, position by position, on what was answered."""
    rows = answered.rows
    data = DraftData(rows, answered.base, depth=ramps.depth, aux_layers=ramps.aux_layers, vocabulary=ramps.vocabulary)
    return measure_head(ramps.head, data, torch.nonzero(rows.answer_index > LEAD)[:, 0])


def with_progress(progress: Progress, depths: Iterable[int]) -> Iterator[int]:
    """The depths one by one, as a stage of its own."""
    depths = list(depths)
    with progress.stage("measure", total=len(depths), unit="depths") as stage:
        for done, depth in enumerate(depths):
            stage.update(done, f"depth {depth}")
            yield depth
        stage.update(len(depths))


def served_ramps(folder: Path, manifest: RampManifest, answered: Answered, depth: int) -> RampSet:
    """The ramp as a server on this machine runs it."""
    from apparate_llm.models.quantised_heads import quantised_head

    weights = {"norm": answered.base.norm, "head": answered.base.lm_head}
    ramps = load_ramps(folder, manifest, depth=depth, base_weights=weights, dtype=answered.dtype)
    ramps.head = quantised_head(ramps.head, answered.dtype)
    return ramps


def evaluate_depth(answered: Answered, ramps: RampSet, *, categories: list[str | None]) -> DepthResult:
    """`categories` [number of conversations]: None where the prompt has none."""
    measured = measure(answered, ramps)
    by_category: dict[str, dict[str, float | None]] = defaultdict(dict)
    positions = []
    names = sorted({name for name in categories if name is not None})
    for number, result in enumerate(measured):
        conversations = answered.rows.conversations[result.rows].tolist()
        of_row = np.array([categories[conversation] or "" for conversation in conversations])
        for name in names:
            by_category[name][str(number)] = mean(result.agrees[torch.from_numpy(of_row == name)])
        parts = [value for name in names if (value := by_category[name][str(number)]) is not None]
        overall = mean(result.agrees)
        rate = sum(parts) / len(parts) if parts else overall
        positions.append(
            Position(position=number, acceptance_rate=rate, acceptance_rate_all_rows=overall, rows=len(result.rows))
        )
    return DepthResult(
        depth=ramps.depth,
        positions=positions,
        accepted_per_step=accepted_per_step(measured),
        calibration_error=calibration_error(*pooled_calibration(measured, ramps.calibration)),
        by_category=dict(by_category),
    )


def evaluate(
    folder: Path,
    manifest: RampManifest,
    model: Path,
    prompts: Sequence[Chat],
    categories: list[str | None],
    *,
    max_tokens: int,
    progress: Progress,
) -> Evaluation:
    """Measure every ramp of the folder on the model's greedy answers; of prompts and `progress` see `answer`."""
    answered = answer(model, manifest, prompts, max_tokens=max_tokens, progress=progress)
    asked = [categories[number] for number in answered.prompts]
    results = [
        evaluate_depth(answered, served_ramps(folder, manifest, answered, depth), categories=asked)
        for depth in with_progress(progress, manifest.depths)
    ]
    default = next(result for result in results if result.depth == manifest.default_depth)
    return Evaluation(
        model=model_name(model),
        prompts=len(answered.prompts),
        left_out=answered.left_out,
        answer_tokens=answered.answer_tokens,
        depths=results,
        ceiling=ceiling(answered.rows),
        calibration_error=default.calibration_error,
    )
