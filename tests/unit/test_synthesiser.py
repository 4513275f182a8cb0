"""A synthesis on slow machines and after kills, without its engine."""

from types import SimpleNamespace

import pytest
import torch

from apparate_llm.prepare.prompts import Prompt
from apparate_llm.prepare.synthesise import STEPS_TIMED, UNDER_WAY, Answer, Synthesiser

TOKENS = [5, 6, 7]


@pytest.fixture
def made(tmp_path):
    """(slots) -> a synthesiser whose engine, store and prompts do nothing."""

    def make(slots: int = 8) -> Synthesiser:
        synthesiser = object.__new__(Synthesiser)
        parts = {
            "slots": slots,
            "step_s": [],
            "work": {},
            "finished": [],
            "number": 0,
            "max_answer_tokens": 100,
            "store": SimpleNamespace(folder=tmp_path, append=lambda *rows, **facts: None),
            "prompts": SimpleNamespace(facts=dict, is_new=lambda ids: True, goes_on=lambda prompt: None),
            "capture": SimpleNamespace(rows_so_far=lambda request: {}),
        }
        for name, part in parts.items():
            setattr(synthesiser, name, part)
        synthesiser._answer = lambda work: synthesiser.work.update({str(len(synthesiser.work)): work})
        return synthesiser

    return make


@pytest.mark.parametrize("slots", [4, 8, 16, 20, 64])
def test_slow_steps_never_lead_to_more_conversations_at_once(slots, made):
    synthesiser = made(slots)
    synthesiser.work = dict.fromkeys(map(str, range(slots)))
    for _ in range(3 * STEPS_TIMED):
        synthesiser._adapt_slots(5.0)
    assert synthesiser.slots == min(slots, 16)


def test_what_an_earlier_start_kept_is_kept_from_the_first_time_on(made):
    first = made()
    rows = {"final": torch.zeros(len(TOKENS) + 1, 2)}
    first.work = {"0": Answer(Prompt([1, 2], 0, 0), 0.7, TOKENS, rows)}
    first.keep(all_under_way=True)
    for _ in range(2):  # each kept right after its start, and killed
        later = made()
        later._go_on()
        later.keep()
        ((prompt, _, tokens, _),) = torch.load(first.store.folder / UNDER_WAY, weights_only=True)
        assert list(prompt[0]) == [1, 2] and tokens == TOKENS
