"""What a head says in given rows, draft step by draft step."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from apparate_llm.prepare.draft_data import DraftData
from apparate_llm.ramps.heads import Head

NUM_POSITIONS = 4  # of exits in an engine step that are measured and calibrated
MEASURED_TOGETHER = 2048  # rows


class Measured(NamedTuple):
    """One position on rows of one split; n rows in which all earlier draft steps agreed."""

    rows: torch.Tensor  # [n] index of the row the draft step ran in
    confidence: torch.Tensor  # [n] highest probability of the ramp
    agrees: torch.Tensor  # [n] bool, with the full model's best token


@torch.inference_mode()
def measure_head(
    head: Head,
    data: DraftData,
    index: torch.Tensor,
    *,
    num_positions: int = NUM_POSITIONS,
    on_rows: Callable[[int], None] = lambda done: None,
) -> list[Measured]:
    """By position, draft steps starting at the rows `index`. on_rows: called with how many of these are done.

    A later one counts only where those before it agreed, as serving runs it only then.
    """
    parts: list[list[Measured]] = [[] for _ in range(num_positions)]
    done = 0
    for first in index.split(MEASURED_TOGETHER):
        alive = torch.ones(len(first), dtype=torch.bool)
        state = data.enter(head, first)
        for number in range(num_positions):
            later, inside = data.follows(first, number)
            alive &= inside
            hidden, lookup = data.inputs(later)
            scores, state = head(hidden, state, lookup)
            confidence, choice = scores.float().softmax(-1).max(-1)
            agrees = choice == data.best(later)
            parts[number].append(Measured(later[alive], confidence[alive], agrees[alive]))
            # The next draft step reads this one's token: where the text went another way there is no row for it.
            after, _ = data.follows(later, 1)
            alive &= agrees & (data.rows.tokens[after] == data.rows.top_ids[later, 0])
        done += len(first)
        on_rows(done)
    return [Measured(*(torch.cat(field) for field in zip(*part, strict=True))) for part in parts]


def accepted_per_step(by_position: list[Measured]) -> float:
    """Expected accepted tokens per engine step, the mean acceptance length less one, if draft steps go on for as long
    as the ramp agrees."""
    expected, joint_acceptance = 0.0, 1.0
    for measured in by_position:
        joint_acceptance *= float(measured.agrees.float().mean()) if len(measured.agrees) else 0.0
        expected += joint_acceptance
    return expected
