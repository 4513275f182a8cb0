import asyncio
import json

import pytest
from apparate_llm.eval.client import Completion, closed_loop
from apparate_llm.eval.measures import distribution, identical_frac, ratio, tokens_per_s
from apparate_llm.eval.prompts import BUILT_IN, load_prompts
from apparate_llm.eval.schema import Results, Run

from tests.fake_server import fake_server


@pytest.fixture(scope="module")
def base_url():
    with fake_server() as url:
        yield url


def ask(base_url, *prompts, concurrency=1):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    seen = []
    done, wall_s = asyncio.run(
        closed_loop(base_url, "m", messages, concurrency=concurrency, max_tokens=9, on_done=seen.append)
    )
    assert sorted(one.prompt_index for one in seen) == list(range(len(prompts)))
    return sorted(done, key=lambda one: one.prompt_index), wall_s


def test_times_of_a_steady_stream(base_url):
    ((done,), _) = ask(base_url, "steady")
    assert done.error is None and done.text == "abbbb" and done.output_tokens == 6
    assert done.ttft_ms == pytest.approx(100, abs=40)
    assert done.tpt_ms == pytest.approx(200 / 5, abs=12)  # five gaps; the last token ends the answer at once


def test_tokens_that_share_a_chunk_all_count(base_url):
    ((done,), _) = ask(base_url, "bursts")
    assert done.output_tokens == 8
    assert done.tpt_ms == pytest.approx(200 / 7, abs=10)


def test_the_loop_keeps_its_concurrency(base_url):
    _, alone = ask(base_url, *["steady"] * 4)
    _, together = ask(base_url, *["steady"] * 4, concurrency=4)
    assert alone == pytest.approx(4 * 0.3, abs=0.35) and together < alone / 2


@pytest.mark.parametrize(("prompt", "says"), [("refused", "HTTP 429"), ("broken", "ended early"), ("error", "boom")])
def test_failures_are_recorded_and_cost_nobody_else(base_url, prompt, says):
    (failed, fine), _ = ask(base_url, prompt, "steady", concurrency=2)
    assert says in failed.error and failed.tpt_ms is None and failed.ttft_ms is None
    assert fine.error is None and fine.output_tokens == 6


def test_a_server_that_is_not_there_is_a_failed_request():
    ((done,), _) = ask("http://127.0.0.1:9", "steady")
    assert "ConnectError" in done.error


def completion(index, text="x", tpt=10.0, tokens=3, error=None):
    times = [1.0, 1.0 + tpt * (tokens - 1) / 1e3]
    return Completion(index, 0.9, chunk_times_s=times, text=text, output_tokens=tokens, error=error)


def test_measures_equal_values_known_by_hand():
    values = [completion(i, tpt=float(i)).tpt_ms for i in range(1, 101)]
    found = distribution([*values, None])
    assert found.mean == pytest.approx(50.5) and found.p50 == pytest.approx(50.5)
    assert found.p95 == pytest.approx(95.05) and found.p99 == pytest.approx(99.01)
    assert distribution([None]).mean is None
    assert completion(0).ttft_ms == pytest.approx(100)
    assert completion(0, tokens=1).tpt_ms is None
    assert tokens_per_s([completion(0, tokens=6), completion(1, error="x")], 2.0) == 3.0


def test_identical_outputs_are_matched_by_prompt():
    baseline = [completion(0, "a"), completion(1, "b"), completion(2, "c", error="x")]
    ours = [completion(1, "b"), completion(0, "z"), completion(2, "c"), completion(1, error="y")]
    assert identical_frac(ours, baseline) == 0.5
    assert identical_frac([], baseline) is None


def test_ratios_and_the_shape_of_the_json():
    def run(system, tpt, rate):
        spread = distribution([tpt])
        return Run(
            system=system, model="m", concurrency=1, tpt_ms=spread, ttft_ms=spread, output_tokens_per_s=rate,
            requests=1, failed=0, output_tokens=9, exits=None, divergences=None, identical_frac=None,
        )  # fmt: skip

    item = ratio(run("ours", 8.0, 120.0), run("vllm", 10.0, 100.0), [0.8])
    assert (item.tpt_mean, item.tpt_p99, item.throughput) == (0.8, 0.8, 1.2)
    results = Results(command="c", machine={}, runs=[run("vllm", 10.0, None)], ratios=[item])
    shape = json.loads(results.model_dump_json())
    assert shape["schema_version"] == 1
    assert {"command", "machine", "runs", "ratios"} < set(shape)
    assert {"system", "model", "concurrency", "tpt_ms", "ttft_ms", "output_tokens_per_s", "requests", "failed", "exits",
            "divergences", "identical_frac"} < set(shape["runs"][0])  # fmt: skip
    assert {"system", "baseline", "concurrency", "tpt_mean", "tpt_p99", "throughput"} < set(shape["ratios"][0])


def test_prompt_files_of_every_kind(tmp_path):
    path = tmp_path / "p.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [{"prompt": "p"}, {"turns": ["t1", "t2"], "category": "x"}, {"messages": chat}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert [messages[-1]["content"] for messages in load_prompts(path)] == ["p", "t1", "u"]
    assert len(load_prompts(None)) == len(BUILT_IN.read_text().splitlines()) >= 16


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"text": "x"}', "needs one of turns, prompt, messages; got text"),
        ('{"prompt": 3}', "must be a text"),
        ('{"prompt": ""}', "not empty"),
        ('{"turns": []}', "at least one"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
    ],
)
def test_bad_prompt_lines_are_named(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_an_empty_prompt_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no prompts in"):
        load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(("count", "concurrency", "sizes"), [(16, 1, [4, 4, 4, 4]), (16, 16, [16]), (10, 4, [8, 2])])
def test_blocks_cover_every_prompt_once_under_its_own_number(count, concurrency, sizes):
    from apparate_llm.eval.quick import blocks

    prompts = [[{"role": "user", "content": str(i)}] for i in range(count)]
    made = blocks(prompts, concurrency)
    assert [len(part) for _, part in made] == sizes
    numbered = [(first + i, prompt) for first, part in made for i, prompt in enumerate(part)]
    assert numbered == list(enumerate(prompts))


def test_a_part_of_the_prompts_keeps_their_numbers(base_url):
    messages = [[{"role": "user", "content": "steady"}]] * 2
    call = closed_loop(base_url, "m", messages, concurrency=2, max_tokens=9, on_done=lambda done: None, first_index=4)
    done, _ = asyncio.run(call)
    assert sorted(one.prompt_index for one in done) == [4, 5]
