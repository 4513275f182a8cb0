"""Measures of known streams from a fake server."""

import asyncio
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import aiohttp
import pytest

from apparate_llm.eval.client import Completion, PlannedRequest, Sampling, Uncounted, run_block
from apparate_llm.eval.llama_cpp import request_fields
from apparate_llm.eval.statistics import distribution, goodput_frac, shared_chunk_frac
from tests import fake_llama
from tests.fake_server import SPLITTERS, FakeTransport, bodies, fake_server, in_virtual_time


def ask(*prompts, concurrency=1, at_s=None):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asks = [PlannedRequest(index, 9, None if at_s is None else at_s[index]) for index in range(len(prompts))]
    seen = []
    call = run_block(
        "http://fake", "m", messages, asks, concurrency=concurrency, on_done=seen.append, transport=FakeTransport()
    )
    done, wall_s, _ = in_virtual_time(call)
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


def test_vllms_own_client_counts_tokens_as_we_do_and_gaps_by_the_chunk(monkeypatch):
    """What docs/evaluation.md says of `vllm bench serve`."""
    name, folder = "endpoint_request_func", find_spec("vllm").submodule_search_locations[0]
    spec = spec_from_file_location(
        name, f"{folder}/benchmarks/lib/{name}.py"
    )  # without the seconds vLLM's import takes
    vllms = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, vllms)  # for its dataclasses
    spec.loader.exec_module(vllms)

    async def ask_as_vllm(base_url):
        url, messages = f"{base_url}/v1/chat/completions", [{"role": "user", "content": "bursts"}]
        given = vllms.RequestFuncInput("", url, 1, 9, "m", extra_body={"temperature": 0.0}, chat_messages=messages)
        async with aiohttp.ClientSession() as session:
            return await vllms.async_request_openai_chat_completions(given, session)

    with fake_server() as base_url:
        theirs = asyncio.run(ask_as_vllm(base_url))
    ((ours,), _) = ask("bursts")
    assert theirs.success and theirs.output_tokens == ours.output_tokens == 8
    _role, *gaps = theirs.itl  # from the role chunk to the first token, which this server does not send together
    assert len(gaps) == len(ours.gaps_ms) == 3 < 8 - 1
    assert sum(gaps) * 1e3 / (8 - 1) == pytest.approx(ours.tpt_ms, rel=0.5)
    assert sorted(gaps)[1] * 1e3 > 1.5 * ours.tpt_ms


def test_answers_are_greedy_or_drawn_each_prompt_with_its_own_seed():
    asks = [PlannedRequest(index, 9) for index in range(2)]
    messages = [[{"role": "user", "content": "single"}]] * 2
    for sampling, expected in (
        (Sampling(), [(0.0, None), (0.0, None)]),
        (Sampling(0.7), [(0.7, None), (0.7, None)]),
        (Sampling(0.7, 40), [(0.7, 40), (0.7, 41)]),
    ):
        bodies.clear()
        call = run_block(
            "http://fake", "m", messages, asks, concurrency=1, fields_of=sampling.fields, transport=FakeTransport()
        )
        in_virtual_time(call)
        assert [(body["temperature"], body.get("seed")) for body in bodies] == expected


def test_the_loop_keeps_its_concurrency():
    _, alone = ask(*["steady"] * 4)
    _, together = ask(*["steady"] * 4, concurrency=4)
    assert alone == pytest.approx(4 * 0.35) and together == pytest.approx(0.35)


def test_arrivals_come_at_their_times_whatever_is_answered():
    done, wall_s = ask("steady", "steady", "single", concurrency=None, at_s=[0.0, 0.05, 0.5])
    assert [one.started_s for one in done] == pytest.approx([0.0, 0.05, 0.5])
    assert wall_s == pytest.approx(0.6)


def block_of(*prompts, counted, concurrency, **uncounted):
    """counted, and what is given of Uncounted: (number of the prompt, arrival) each."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def asks(given):
        return tuple(PlannedRequest(index, 9, at_s) for index, at_s in given)

    around = {name: asks(given) if name != "period_s" else given for name, given in uncounted.items()}
    call = run_block(
        "http://fake",
        "m",
        messages,
        asks(counted),
        concurrency=concurrency,
        uncounted=Uncounted(**around),
        transport=FakeTransport(),
    )
    return in_virtual_time(call)


def test_clients_go_on_asking_until_the_last_that_counts_has_ended():
    """Two clients: one begins with a short answer that does not count, the other with one that does."""
    asked = block_of(
        *("steady", "stall", "single", "bursts"),
        counted=[(0, None), (1, None)],
        concurrency=2,
        lead_in=[(2, None)],
        run_out=[(3, None), (2, None)],
    )
    assert [(done.prompt_index, done.started_s) for done in asked.completions] == [(0, 0.0), (1, pytest.approx(0.1))]
    assert asked.wall_s == pytest.approx(0.7)  # the stall's end
    assert [(done.prompt_index, done.started_s) for done in asked.uncounted[:2]] == [(2, 0.0), (3, pytest.approx(0.35))]
    lead_in, filler = asked.uncounted[:2]
    assert [lead_in.tokens_until(at_s) for at_s in (0.04, 0.06, 9.0)] == [0, 1, 2]
    assert [filler.tokens_until(at_s) for at_s in (0.44, 0.46, 0.56)] == [0, 1, 4]
    assert all(done.started_s < 0.7 + 1e-9 for done in asked.uncounted)


def test_what_is_under_way_when_the_last_that_counts_has_ended_is_cut_off():
    asked = block_of("single", "steady", counted=[(0, None)], concurrency=2, run_out=[(1, None)])
    assert [done.output_tokens for done in asked.completions] == [2] and asked.wall_s == pytest.approx(0.1)
    (filler,) = asked.uncounted
    assert filler.error is None and filler.output_tokens in (None, 0, 1)  # of six


def test_arrivals_go_on_as_they_came_until_the_last_that_counts_has_ended():
    asked = block_of(
        *("steady", "single", "stall"),
        counted=[(0, 0.21), (1, 0.27)],
        concurrency=None,
        lead_in=[(2, 0.0)],
        run_out=[(0, 0.21), (1, 0.27)],
        period_s=0.12,
    )
    assert [done.started_s for done in asked.completions] == pytest.approx([0.27, 0.21])
    assert asked.wall_s == pytest.approx(0.35)  # from 0.21 to 0.56
    expected = [(2, 0.0), (0, 0.33), (1, 0.39), (0, 0.45), (1, 0.51)]
    assert [done.prompt_index for done in asked.uncounted] == [index for index, _ in expected]
    assert [done.started_s for done in asked.uncounted] == pytest.approx([at_s for _, at_s in expected])


def test_an_uncounted_request_that_fails_is_not_asked_again_at_once():
    asked = block_of("stall", "refused", counted=[(0, None)], concurrency=2, run_out=[(1, None)])
    assert asked.wall_s == pytest.approx(0.6)
    assert [done.started_s for done in asked.uncounted] == pytest.approx([0.0, 0.5])
    assert all("HTTP 429" in done.error for done in asked.uncounted)


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
    call = run_block("http://127.0.0.1:9", "m", messages, [PlannedRequest(0, 9)], concurrency=1)
    (done,) = asyncio.run(call).completions
    assert "ConnectError" in done.error


def test_goodput_counts_answers_within_every_objective():
    done, _ = ask("steady", "stall", "refused", "single")
    assert goodput_frac(done, {"ttft": 200, "tpt": 80}) == 0.5
    assert goodput_frac(done, {"ttft": 75}) == 0.5
    assert goodput_frac(done, {"e2e": 10}) == 0.0
    assert goodput_frac(done, {}) is None


def ask_llama(kind, fields):
    call = run_block(
        "http://fake",
        "m",
        [[{"role": "user", "content": kind}]],
        [PlannedRequest(0, 9)],
        concurrency=1,
        fields_of=lambda ask: fields,
        transport=FakeTransport(fake_llama.answer),
    )
    (done,) = in_virtual_time(call).completions
    assert done.error is None and done.prompt_tokens == fake_llama.PROMPT_TOKENS
    return done


@pytest.mark.parametrize(
    ("kind", "text", "chunks"),
    [  # (seconds, tokens so far, characters so far) of each
        ("steady", "abbbb", [(0.1, 1, 1), (0.15, 2, 2), (0.2, 3, 3), (0.25, 4, 4), (0.3, 5, 5), (0.35, 6, 5)]),
        ("drafted", "abcdef", [(0.1, 1, 1), *((0.2, n, n) for n in (2, 3, 4)), (0.3, 5, 5), (0.3, 6, 6), (0.3, 7, 6)]),
        ("drafted, counted at once", "abcdef", [(0.1, 1, 1), (0.2, 4, 4), (0.3, 7, 6)]),
        ("cut off", "abc", [(0.1, 1, 1), (0.15, 2, 2), (0.2, 3, 3)]),
        ("silent", "abcd", [(0.1, 1, 0), (0.15, 2, 2), (0.25, 4, 4), (0.3, 5, 4)]),
    ],
)
def test_llama_cpp_s_tokens_are_counted_as_it_counts_them(kind, text, chunks):
    done = ask_llama(kind, request_fields(0.0))
    assert done.text == text and done.output_tokens == chunks[-1][1]
    assert [(round(at_s, 3), tokens, characters) for at_s, tokens, characters in done.chunks] == chunks
    assert done.ttft_ms == pytest.approx(chunks[0][0] * 1e3)
    assert done.tpt_ms == pytest.approx((chunks[-1][0] - chunks[0][0]) * 1e3 / (chunks[-1][1] - 1))


def test_llama_cpp_s_times_are_right_where_it_counts_no_chunk():
    done = ask_llama("steady", {})
    assert [chunk.tokens for chunk in done.chunks] == [None] * 6 and done.output_tokens == 6
    assert (done.ttft_ms, done.tpt_ms) == (pytest.approx(100), pytest.approx(50))


def test_a_record_on_disk_is_the_completion():
    ((done,), _) = ask("bursts")
    assert [done.tokens_until(at_s) for at_s in (0.05, 0.15, 0.25, 9.0)] == [0, 1, 4, 8]
    ((old,), _) = ask("bursts old")
    assert [old.tokens_until(at_s) for at_s in (0.05, 0.15, 0.25, 9.0)] == [0, 1, 2, 4]  # chunks
    again = Completion.of_record(done.as_record())
    assert again.tpt_ms == pytest.approx(done.tpt_ms, abs=0.01) and again.text == done.text
    assert [chunk.tokens for chunk in again.chunks] == [chunk.tokens for chunk in done.chunks]
