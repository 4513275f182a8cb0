"""Loads of an evaluation: which prompts are asked when, and for how many tokens."""

import pytest

from apparate_llm.eval.workloads import LEAD_IN_S, closed, poisson, traced
from tests.evaluations import prompts


@pytest.mark.parametrize(("count", "clients", "sizes"), [(16, 1, [2] * 8), (16, 16, [16]), (10, 4, [4, 4, 2])])
def test_blocks_cover_every_prompt_once(count, clients, sizes):
    load = closed(count, clients, max_tokens=9, length="free")
    assert [len(block) for block in load.blocks] == sizes
    assert [ask.prompt_index for block in load.blocks for ask in block] == list(range(count))


def test_varied_lengths_are_the_same_for_all_and_cover_their_range():
    loads = [
        closed(4000, 16, max_tokens=48, length="varied"),
        poisson(4000, 2.0, max_tokens=48, length="varied", seed=0),
    ]
    lengths, others = ([ask.max_tokens for block in load.blocks for ask in block] for load in loads)
    assert lengths == others
    assert set(lengths) == set(range(12, 49)) and sum(lengths) / len(lengths) == pytest.approx(30, rel=0.03)
    assert [load.name for load in loads] == ["16 clients, varied lengths", "2 requests/s, varied lengths"]
    assert not any(load.fixed_length for load in loads)
    assert {len(block) for block in loads[0].blocks} == {16}


def test_poisson_arrivals_have_the_rate_and_are_the_same_again():
    load, again = (poisson(4000, 2.0, max_tokens=9, length="fixed", seed=3) for _ in range(2))
    assert load == again
    assert [ask.prompt_index for block in load.blocks for ask in block] == list(range(4000))
    assert len(load.blocks) == pytest.approx(4000 * 0.5 / 20, rel=0.05)  # slices of 20 s
    assert load.blocks[0][0].at_s == LEAD_IN_S  # what counts begins after the lead-in
    for block in load.blocks:
        times = [ask.at_s for ask in block]
        assert times == sorted(times) and times[0] >= LEAD_IN_S - 1e-6 and times[-1] < LEAD_IN_S + 20 + 1e-6


def test_a_trace_sets_times_and_lengths_and_picks_prompts_of_about_its_size(tmp_path):
    path = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,100,44", "2023-11-16 18:15:50.6805900,2,1000", "2023-11-16 18:15:51,100,3"]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    asked = prompts("x" * 9, "x" * 400, "x" * 380)
    (asks,) = traced(path, asked, scale=0.5, num_requests=10, max_tokens=64).blocks
    assert [ask.at_s - LEAD_IN_S for ask in asks] == pytest.approx([0.0, 2.0, 2.15970], abs=1e-4)
    assert [ask.max_tokens for ask in asks] == [44, 64, 3]
    assert [ask.prompt_index for ask in asks] == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "columns TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,many,2\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-17,1,2\n2023-11-16,1,2\n", ":3: arrivals"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16T00:00,1,2\n2023-11-17T00:00Z,1,2\n", ":3: a time zone"),
        pytest.param(
            f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,{'1' * 200_000},2\n", "cannot read trace", id="long"
        ),
    ],
)
def test_bad_traces_are_named(tmp_path, text, says):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        traced(path, prompts("x"), scale=1.0, num_requests=10, max_tokens=9)


def test_a_trace_may_have_prompts_and_answers_of_any_size(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,{'9' * 400},{'9' * 400}\n2023-11-17,-1,-1\n")
    load = traced(path, prompts("x", "x" * 99), scale=1.0, num_requests=10, max_tokens=9)
    assert [ask.max_tokens for block in load.blocks for ask in block] == [9, 1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trace t.csv --rate 1", "one of --rate and --trace"),
        ("--rate 1 --concurrency 4", "one of --concurrency and --rate"),
        ("--trace t.csv --concurrency 4", "one of --concurrency and --trace"),
        ("--trace t.csv --length fixed", "--length does not go with --trace"),
        ("--trace t.csv --prompt-tokens 9", "--prompt-tokens does not go with --trace"),
        ("--trace-scale 2", "--trace-scale is about a --trace"),
        ("--num-requests 9", "--num-requests is about a --trace"),
        ("--slice-s 9", "--slice-s is about arrivals"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(flags, says):
    from apparate_llm.cli import build_parser
    from apparate_llm.eval.asked_loads import asked_loads

    args = build_parser().parse_args(["eval", "tpt", "--out", "x", *flags.split()])
    with pytest.raises(ValueError, match=says):
        asked_loads(args, prompts("a"))


def test_a_load_that_is_asked_for_again_is_another_one():
    from apparate_llm.cli import build_parser
    from apparate_llm.eval.asked_loads import asked_loads

    args = build_parser().parse_args(["eval", "tpt", "--out", "x", "--concurrency", "1,16,1", "--length", "both"])
    free = ["1 client", "16 clients", "1 client, time 2"]
    assert [load.name for load in asked_loads(args, prompts("a"))] == free * 2
