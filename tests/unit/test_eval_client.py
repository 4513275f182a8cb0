"""Measures of known streams from a fake server."""

import asyncio

import pytest
from apparate_llm.eval.client import Ask, Completion, run_block
from apparate_llm.eval.measures import distribution, goodput_frac, shared_chunk_frac

from tests.fake_server import SPLITTERS, FakeTransport, in_virtual_time


def ask(*prompts, concurrency=1, at_s=None):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asks = [Ask(index, 9, None if at_s is None else at_s[index]) for index in range(len(prompts))]
    seen = []
    call = run_block(
        "http://fake", "m", messages, asks, concurrency=concurrency, on_done=seen.append, transport=FakeTransport()
    )
    done, wall_s = in_virtual_time(call)
    assert sorted(one.prompt_index for one in seen) == list(range(len(prompts)))
    return sorted(done, key=lambda one: one.prompt_index), wall_s


@pytest.mark.parametrize("server", ["", " old"])  # with and without token counts in every chunk
def test_times_of_a_steady_stream(server):
    ((done,), _) = ask("steady" + server)
    assert done.error is None and done.text == "abbbb" and done.output_tokens == 6
    assert done.ttft_ms == pytest.approx(100)
    assert done.tpt_ms == pytest.approx(50)
    assert done.e2e_ms == pytest.approx(350)
    assert len(done.gaps_ms) == 5 and distribution(done.gaps_ms).p50 == pytest.approx(50)
    assert [chunk.tokens for chunk in done.chunks] == ([None] * 6 if server else [1, 2, 3, 4, 5, 6])


def test_tokens_that_share_a_chunk_all_count_and_are_said_so():
    (done, old), _ = ask("bursts", "bursts old")
    assert done.output_tokens == 8
    assert done.tpt_ms == pytest.approx(250 / 7)
    assert shared_chunk_frac([done]) == pytest.approx(4 / 8)  # 8 tokens in 4 chunks
    assert shared_chunk_frac([old]) is None
    assert done.tokens_before(0) == 0 and done.tokens_before(2) == 1 and done.tokens_before(4) == 4


def test_a_stall_shows_in_the_gaps_and_not_in_the_first_token():
    ((done,), _) = ask("stall")
    assert done.ttft_ms == pytest.approx(50)
    assert max(done.gaps_ms) == pytest.approx(400)
    assert done.tpt_ms == pytest.approx((50 + 400 + 50 + 50) / 4)


def test_a_token_without_text_yet_is_a_token():
    ((done,), _) = ask("silent")
    assert [(chunk.tokens, chunk.characters) for chunk in done.chunks] == [(1, 1), (2, 1), (3, 3), (4, 3)]


def test_texts_keep_every_character_at_which_other_readers_end_a_line():
    ((done,), _) = ask("lines")
    assert done.error is None and done.text == f"ab{SPLITTERS}" and done.output_tokens == 3


def test_the_loop_keeps_its_concurrency():
    _, alone = ask(*["steady"] * 4)
    _, together = ask(*["steady"] * 4, concurrency=4)
    assert alone == pytest.approx(4 * 0.35) and together == pytest.approx(0.35)


def test_arrivals_come_at_their_times_whatever_is_answered():
    done, wall_s = ask("steady", "steady", "single", concurrency=None, at_s=[0.0, 0.05, 0.5])
    assert [one.started_s for one in done] == pytest.approx([0.0, 0.05, 0.5])
    assert wall_s == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("refused", "HTTP 429"), ("broken", "ended early"), ("cut", "RemoteProtocolError"), ("error", "boom")],
)
def test_failures_are_recorded_and_cost_nobody_else(prompt, says):
    (failed, fine), _ = ask(prompt, "steady", concurrency=2)
    assert says in failed.error and failed.tpt_ms is None and failed.ttft_ms is None and failed.gaps_ms == []
    assert fine.error is None and fine.output_tokens == 6


def test_a_server_that_is_not_there_is_a_failed_request():
    messages = [[{"role": "user", "content": "steady"}]]
    ((done,), _) = asyncio.run(run_block("http://127.0.0.1:9", "m", messages, [Ask(0, 9)], concurrency=1))
    assert "ConnectError" in done.error


def test_goodput_counts_answers_within_every_objective():
    done, _ = ask("steady", "stall", "refused", "single")
    assert goodput_frac(done, {"ttft": 200, "tpt": 80}) == 0.5
    assert goodput_frac(done, {"ttft": 75}) == 0.5
    assert goodput_frac(done, {"e2e": 10}) == 0.0
    assert goodput_frac(done, {}) is None


def test_a_record_on_disk_is_the_completion():
    ((done,), _) = ask("bursts")
    again = Completion.of_record(done.as_record())
    assert again.tpt_ms == pytest.approx(done.tpt_ms, abs=0.01) and again.text == done.text
    assert [chunk.tokens for chunk in again.chunks] == [chunk.tokens for chunk in done.chunks]
