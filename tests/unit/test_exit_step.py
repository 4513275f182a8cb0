"""An engine step of the exits without an engine: what is due, what goes out, who goes on, what becomes text."""

import numpy as np
import pytest

from apparate_llm.controller.budget import AccuracyBudget, Bucket
from apparate_llm.core import Exit
from apparate_llm.exits.batch import Batch
from apparate_llm.exits.draft import DraftRequest
from apparate_llm.exits.ledger import RequestExits, VerdictLedger
from apparate_llm.exits.step import ExitStep
from apparate_llm.exits.step_clock import StepClock

STOP = 99
PROMPT = 4  # tokens
SLOTS = 8


class Alone:
    """A single rank."""

    def share_floats(self, values):
        return values

    def share_prediction(self, prediction):
        return prediction


class Drafter:
    """As much of one as the step asks for."""

    def free_slots(self, request_index, newest_position):
        return SLOTS


class Model:
    def __init__(self, request_ids):
        self.request_ids, self.appended = request_ids, {}

    def batch(self):
        return self

    def append(self, request_index, tokens):
        self.appended[request_index] = tokens


def batch_of(texts: list[int], *, first_rows: list[int] | None = None, max_model_len: int = 64) -> Batch:
    """Requests a, b, ... of so many tokens each, of which PROMPT are the prompt."""
    number = len(texts)
    return Batch(
        request_ids=[chr(ord("a") + i) for i in range(number)],
        token_ids=np.zeros((number, 64), dtype=np.int32),
        num_tokens=np.array(texts, dtype=np.int32),
        num_prompt_tokens=np.full(number, PROMPT, dtype=np.int32),
        num_computed_tokens=np.array(texts, dtype=np.int32) - 1,
        first_rows=np.array(first_rows or range(number + 1), dtype=np.int32),
        max_model_len=max_model_len,
    )


def step_of(*requests: RequestExits) -> ExitStep:
    ledger = VerdictLedger(AccuracyBudget(0.5, "agreement"))
    for i, request in enumerate(requests):
        ledger.add_request(chr(ord("a") + i), request)
    return ExitStep(ledger, StepClock(Alone()))


def request(**changes) -> RequestExits:
    return RequestExits(**{"releasable": True, "bucket": Bucket.of_request(0.5), "max_tokens": 20} | changes)


def exit_at(position: int, token_id: int = 7) -> Exit:
    return Exit(position, token_id, depth=0, draft_step=0, confidence=0.9)


def test_rows_of_released_exits_are_due_in_the_pass_that_computes_the_token_before_them():
    step = step_of(request(), request())
    step.ledger.release("b", [exit_at(10), exit_at(11)])
    batch = batch_of([9, 12], first_rows=[0, 1, 4])
    batch.num_computed_tokens[:] = [8, 9]
    assert step.due(batch, np.array([1, 3], dtype=np.int32), num_tokens=4, num_drafts=0) == [1, 2]
    assert [item.exit.position for item in step.begin_verifying()] == [10, 11]
    assert step.begin_verifying() == []  # told once
    batch.num_computed_tokens[:] = [8, 12]  # as after a preemption: another pass has them
    assert step.due(batch, np.array([1, 1], dtype=np.int32), num_tokens=2, num_drafts=0) == []


@pytest.mark.parametrize(
    ("checked", "changes", "num_tokens", "context", "goes_on"),
    [
        ([5], {}, 10, 64, True),
        ([5, 6, 7], {}, 12, 64, True),
        ([5, STOP], {"stop_token_ids": frozenset({STOP})}, 11, 64, False),
        ([5, STOP, 6], {"stop_token_ids": frozenset({STOP})}, 12, 64, False),
        ([5], {"max_tokens": 6}, 10, 64, False),  # its sixth
        ([5], {"max_tokens": 7}, 10, 64, True),
        ([5], {}, 10, 10, False),  # the context is full
        ([5], {"may_exit": False}, 10, 64, False),
    ],
)
def test_who_goes_on_and_takes_exits(checked, changes, num_tokens, context, goes_on):
    step = step_of(request(**changes))
    batch = batch_of([num_tokens], max_model_len=context)
    is_turn = step.emit(batch, [checked], [len(checked) - 1], Drafter())
    assert bool(step.requests) is goes_on
    assert is_turn is (not goes_on and changes.get("may_exit", True))
    stop = checked.index(STOP) + 1 if STOP in checked else len(checked)
    assert step.ledger.counts.emitted == step.ledger.requests["a"].num_emitted == stop


def test_a_first_token_is_a_turn_and_a_prompt_chunk_is_nothing():
    step = step_of(request(), request())
    assert step.emit(batch_of([PROMPT + 1, 9]), [[5], []], [0, 0], Drafter()) is True
    assert [item.request_index for item in step.requests] == [0] and step.ledger.counts.emitted == 1


def test_exits_fit_into_the_answer_and_the_context_as_they_are_now():
    """vLLM may shorten the context once it knows its memory; a request whose input goes on has another limit."""
    step = step_of(request(max_tokens=9))
    (drafted,) = emitted(step, batch_of([10]))
    assert (drafted.max_released, drafted.max_held) == (3, 2)  # six are out
    step.ledger.requests["a"].max_tokens = 100
    (drafted,) = emitted(step, batch_of([11]))
    assert (drafted.max_released, drafted.max_held) == (SLOTS, SLOTS)
    (drafted,) = emitted(step, batch_of([12], max_model_len=14))
    assert (drafted.max_released, drafted.max_held) == (2, 1)


def emitted(step: ExitStep, batch: Batch) -> list[DraftRequest]:
    step.emit(batch, [[5]], [0], Drafter())
    return step.requests


def test_the_state_row_is_that_of_the_newest_token_behind_rejected_drafts():
    step = step_of(request())
    step.emit(batch_of([12], first_rows=[0, 5]), [[5, 6]], [4], Drafter())  # four drafts, one accepted
    (drafted,) = step.requests
    assert drafted.state_row == 1 and (drafted.newest_token, drafted.newest_position) == (6, 11)


def test_released_exits_become_text_and_held_ones_drafts():
    step = step_of(request(), request())
    step.emit(batch_of([10, 12]), [[5], [6]], [0, 0], Drafter())
    step.drafts = given = [[], []]
    first, second = step.requests
    first.released, first.held, second.held = [exit_at(10, 1)], [exit_at(11, 2)], [exit_at(12, 3), exit_at(13, 4)]
    model = Model(["a", "b"])
    step.commit(step.requests, model)
    assert model.appended == {0: [1]} and step.released == {"a": [1]} and given == [[2], [3, 4]]
    assert step.ledger.counts.outstanding == 1 and step.ledger.requests["b"].held == second.held
    step.withdraw()
    assert given == [[], []], "the list that vLLM has"


def test_what_is_put_off_releases_nothing():
    step = step_of(request())
    step.emit(batch_of([10]), [[5]], [0], Drafter())
    done = []
    step.put_off(lambda: done.append(True))
    assert not step.requests[0].may_release and not done
    step.later()
    assert done
    step.begin_verifying()
    assert step.later is None
