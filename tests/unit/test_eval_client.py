"""Measures of known streams from a fake server."""

import asyncio
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import aiohttp
import pytest

from apparate_llm.eval.client import Completion, PlannedRequest, run_block
from apparate_llm.eval.statistics import distribution, goodput_frac, shared_chunk_frac
from tests.fake_server import SPLITTERS, FakeTransport, fake_server, in_virtual_time


def ask(*prompts, concurrency=1, at_s=None):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asks = [PlannedRequest(index, 9, None if at_s is None else at_s[index]) for index in range(len(prompts))]
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
    ((done,), _) = asyncio.run(run_block("http://127.0.0.1:9", "m", messages, [PlannedRequest(0, 9)], concurrency=1))
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
