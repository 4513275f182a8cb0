"""The page and the tables, from results with known values."""

import re
from base64 import b64decode

import pytest

from apparate_llm.eval.compare import compare
from apparate_llm.eval.figures import Points, figures, system_colors
from apparate_llm.eval.headline import summary_sentence, verdict
from apparate_llm.eval.report import render, sections, write_report
from apparate_llm.eval.tables import DASH, machine_text, number, small, tables
from tests.eval_results import (
    a_ratio,
    a_result,
    a_run,
    cells_of,
    distribution,
    full_result,
    some_points,
    text_of,
    with_exits,
)


def test_the_sentence_tells_gain_cost_and_where_not():
    assert summary_sentence(full_result()) == (
        "Against plain vLLM, lossless takes 23 % less time per token with 1 client (95 % CI 20 to 26) without a "
        "divergence, and shows no clear difference with 16 clients; early-exit (at most 5 % divergences) takes 40 % "
        "less with 1 client (38 to 42) at a cost of 4.1 % divergences (4.5 % at worst), and takes 10 % more with 16 "
        "clients (2 to 18)."
    )


@pytest.mark.parametrize(
    ("tpt", "ci", "says"),
    [
        (0.9, (0.85, 0.95), "faster"),
        (0.9, (0.79, 1.01), "no clear difference"),
        (0.9, (0.8, 1.0), "no clear difference"),
        (1.1, (0.99, 1.2), "no clear difference"),
        (1.1, (1.05, 1.2), "slower"),
        (1.02, (0.9, 0.95), "no clear difference"),  # the ratio lies outside: some requests failed
        (0.9, None, "faster"),
        (1.1, None, "slower"),
        (1.0, None, "no clear difference"),
        (None, None, "not measured"),
    ],
)
def test_a_verdict_needs_the_whole_interval(tpt, ci, says):
    assert verdict(a_ratio("x", tpt=tpt, ci=ci)) == says


def test_without_an_interval_the_sentence_says_so():
    results = a_result([a_run(), with_exits("lossless")], [a_ratio("lossless", tpt=0.9, ci=None)])
    assert "takes 10 % less time per token with 1 client (no CI) without a divergence." in summary_sentence(results)


def test_a_system_without_exits_has_no_cost_in_tokens():
    results = a_result([a_run(), a_run("off")], [a_ratio("off", tpt=0.98, ci=(0.95, 0.995))])
    assert summary_sentence(results) == (
        "Against plain vLLM, off takes 2 % less time per token with 1 client (95 % CI 0.5 to 5)."
    )


def test_many_loads_become_a_range():
    levels = (1, 2, 4, 8)
    runs = [run for n in levels for run in (a_run("vllm", n), with_exits("early-exit", n, divergences=10 * n))]
    ratios = [a_ratio("early-exit", n, 0.6 + n / 25, (0.6 + n / 25 - 0.01, 0.6 + n / 25 + 0.01)) for n in levels]
    assert summary_sentence(a_result(runs, ratios)) == (
        "Against plain vLLM, early-exit (at most 5 % divergences) takes 8 to 36 % less time per token with 1, 2, 4 and "
        "8 clients at a cost of 0.5 to 4 % divergences (0.9 to 4.3 % at worst)."
    )


def test_fixed_length_runs_speak_only_to_warn():
    own = [a_ratio("lossless"), a_ratio("lossless", fixed_length=True, tpt=0.7, ci=(0.69, 0.71))]
    runs = [a_run(), with_exits("lossless"), a_run(fixed_length=True), with_exits("lossless", fixed_length=True)]
    assert "fixed" not in summary_sentence(a_result(runs, own))
    own[1] = a_ratio("lossless", fixed_length=True, tpt=1.2, ci=(1.1, 1.3))
    says = "20 % more with 1 client, fixed length (10 to 30)"
    assert says in summary_sentence(a_result(runs, own))


def test_loads_other_than_clients_are_named():
    load = {"load": "2 requests/s", "concurrency": None}
    results = a_result([a_run(**load), with_exits("lossless", **load)], [a_ratio("lossless", **load)])
    assert "takes 23 % less time per token under 2 requests/s (" in summary_sentence(results)


def test_the_baseline_alone_is_not_compared():
    results = a_result([a_run(), a_run("vllm", 4, 70.0)])
    assert summary_sentence(results) == (
        "Only plain vLLM was measured, so nothing can be compared: 60.0 ms per token with 1 client and 70.0 ms per "
        "token with 4 clients."
    )
    assert summary_sentence(a_result([])) == "Nothing was measured."
    assert "Against the baseline" not in render(results, Points())


def test_failed_requests_are_counted():
    runs = [a_run(failed=1), with_exits("lossless", tpt=None, failed=32, output_tokens=0)]
    results = a_result(runs, [a_ratio("lossless", tpt=None, ci=None, tpt_mean_by_repeat=[])])
    assert summary_sentence(results) == (
        "Against plain vLLM, lossless gave no times with 1 client; 33 of 64 requests failed (vllm: 1, lossless: 32)."
    )
    assert "not measured" in render(results, Points())


def test_the_page_loads_nothing():
    results = full_result(notes=["noisy"], skipped={"ngram": "no such flag"})
    page = render(results, some_points(results))
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)|url\(([^)]*)\)|@import""", page)
    assert loaded and all(source.startswith("data:") for source, _ in loaded)
    assert "http" not in page and "<script" not in page and "<link" not in page
    for image, _ in loaded:
        svg = b64decode(image.partition(",")[2]).decode()
        assert not re.findall(r'(?:src|href)="(?!#)[^"]+"', svg) and "@import" not in svg


def test_columns_of_texts_are_left_out_where_none_are_compared():
    results = full_result()
    columns = {section.title: section.columns for section in sections(results)}["Quality"]
    assert "same answers" in columns and "code passed" not in columns  # no prompt has tests
    for run in results.runs:
        run.quality = run.quality and run.quality.model_copy(
            update=dict.fromkeys(("identical_frac", "same_number_frac"))
        )
    left = {section.title: section.columns for section in sections(results)}["Quality"]
    assert [name for name in columns if name not in left] == ["same answers", "same number"]


@pytest.mark.parametrize(
    ("asked", "own", "says"),
    [
        (60, 60, "60 prompts of code, which were in use while this was developed"),
        (30, 30, "30 of the 60 prompts of code, which were in use while this was developed"),
        (30, 1, "30 of the 60 prompts of code, of which 1 was in use while this was developed"),
        (60, 0, "60 prompts of code"),
    ],
)
def test_what_was_asked_is_said_with_the_figures(asked, own, says):
    results = full_result()
    results.settings["prompts"] = {"code": {"size": 60, "asked": asked, "developed_with": own}}
    for shown in (render(results, Points()), " ".join(text_of(tables(results)).split())):
        assert says in shown and ("developed" in shown) == bool(own)
    assert "prompts of" not in text_of(tables(full_result()))  # of old results it is not known


def test_the_share_within_a_target_is_shown_where_there_is_one():
    plain, ours = a_run(), with_exits("target", within_target_frac=0.75)
    (section,) = [one for one in sections(a_result([plain, ours])) if one.title == "Exits"]
    assert dict(zip(section.columns, section.rows[0], strict=True))["within target"] == "75.0 %"
    (section,) = [one for one in sections(full_result()) if one.title == "Exits"]
    assert "within target" not in section.columns


def test_every_figure_of_the_tables_is_on_the_page():
    results = full_result()
    page = render(results, Points())
    by_title = {section.title: section for section in sections(results)}
    assert list(by_title) == ["Against the baseline", "Absolute figures", "Quality", "Exits", "Costs"]
    for section in by_title.values():
        for row in section.rows:
            assert len(row) == len(section.columns)
            assert f"<th>{row[0]}</th>" in page and all(f">{cell}</td>" in page for cell in row[1:])
    assert [
        "1 client",
        "lossless",
        f"0.770 (0.740{DASH}0.800)",
        "faster",
        f"1.14 ({DASH})",
        f"1.02 ({DASH})",
        f"1.03 ({DASH})",
        f"1.28 ({DASH})",
        "0.76 0.78",
    ] in (by_title["Against the baseline"].rows)
    assert ["1 client", "oracle (perfect ramp)", "0.561", *[DASH] * 6] in by_title["Against the baseline"].rows
    assert by_title["Absolute figures"].rows[1] == ["1 client", "lossless", f"45.00 (43.00{DASH}47.00)", "44.50",
        "56.00", "67.00", "209.5", "232.0", "5000", "92.0", "12.3 %", "16.21", "32", "0"]  # fmt: skip
    assert by_title["Quality"].rows[1] == ["1 client", "early-exit", "82 (4.1 %)", "89 (4.5 %)", "5.0 %", "0.00321",
        "43.8 %", "23", "0.876", "0.345", "75.0 %", "50.0 %"]  # fmt: skip
    assert by_title["Exits"].rows[0] == (
        ["1 client", "lossless", "2000", "1682", "633", "29", "0", "500 (25.0 %)", "162 (8.1 %)"]
    )
    assert by_title["Costs"].rows[0] == ["1 client", "vllm", "0.0654", DASH, "30.50", "1.75", "123.4"]


def with_peers():
    """Plain vLLM tuned alike is the baseline, plain vLLM another; one peer is faster than ours, but with 16 clients."""
    runs, ratios = [], []
    for level, peer in ((1, 14.0), (4, 22.8), (16, 70.0)):
        runs += [a_run("vllm-tuned", level, 40.0), a_run("vllm", level, 60.0), with_exits("lossless", level, 20.0)]
        runs[-1].tpt_ms = distribution(24.7 if level == 4 else 20.0)
        runs += [a_run("llama Q4", level, peer), a_run("ngram", level, 30.0)]
    for baseline, share in (("vllm-tuned", 0.5), ("vllm", 0.33)):
        other = {"vllm-tuned": "vllm", "vllm": "vllm-tuned"}[baseline]
        for level in (1, 4, 16):
            ratios += [
                a_ratio(system, level, tpt, (tpt - 0.01, tpt + 0.01), baseline=baseline)
                for system, tpt in (("lossless", share), (other, 0.75), ("llama Q4", share - 0.1))
            ]
    return a_result(runs, ratios, oracle_ratio={"1": 0.561})


def test_each_baseline_has_its_table_and_the_first_comes_first():
    results = with_peers()
    first, second = sections(results)[:2]
    assert (first.title, second.title) == ("Against the baseline", "Against plain vLLM")
    assert "the figure of plain vLLM tuned alike under" in first.note and "of plain vLLM under" in second.note
    assert [row[1:3] for row in first.rows if row[0] == "4 clients"] == [
        ["lossless", f"0.500 (0.490{DASH}0.510)"],
        ["vllm", f"0.750 (0.740{DASH}0.760)"],
        ["llama Q4", f"0.400 (0.390{DASH}0.410)"],
    ]
    assert [row[2] for row in second.rows if row[0] == "1 client"][:1] == [f"0.330 (0.320{DASH}0.340)"]
    speed, to_other = tables(results)[:2]
    assert "ratio: to vllm-tuned" in speed.title and to_other.title.strip() == "Ratios to vllm"
    assert cells_of(speed)[2][-2] == f"0.50 (0.49{DASH}0.51)" and cells_of(speed)[0][-2] == DASH
    assert cells_of(to_other)[0] == ["lossless", "1 client", f"0.33 (0.32{DASH}0.34)", "1.14", "1.02", "1.28"]
    assert max(map(len, text_of(tables(results)).splitlines())) <= 120


def test_what_a_peer_does_better_is_said():
    sentence = summary_sentence(with_peers())
    assert sentence.startswith("Against plain vLLM tuned alike, lossless takes 50 % less time per token")
    assert "; against plain vLLM, lossless takes 67 % less" in sentence
    assert sentence.endswith(
        " llama Q4 is faster than every system with exits with 1 and 4 clients (14.0 against 20.0 ms and 22.8 against "
        "24.7 ms)."
    )
    assert "faster than every" not in summary_sentence(full_result())


def test_texts_that_are_held_against_another_s_are_not_called_plain_vllm_s():
    own, others = ({"identical_frac": share, "quality": quality_with(share)} for share in (0.5, 0.9))
    runs = [a_run("llama"), with_exits("lossless", **own), a_run("ngram", **others)]
    assert not summary_sentence(a_result(runs, [a_ratio("lossless", baseline="llama")])).startswith("Warning")
    assert summary_sentence(a_result(runs, [a_ratio("lossless", baseline="vllm-tuned")])).startswith("Warning")


def test_goodput_is_there_when_it_was_measured():
    without = sections(a_result([a_run()]))[0]
    section = sections(a_result([a_run(), a_run("off", goodput_frac=0.875, goodput_per_s=0.25)]))[0]
    assert section.title == "Absolute figures" and "goodput" not in without.columns
    at = section.columns.index("goodput")
    assert [row[at : at + 2] for row in section.rows] == [[DASH, DASH], ["87.5 %", "0.25"]]


def test_unknown_is_a_dash_and_zero_is_zero():
    assert (number(None), number(0.0), small(None), small(0.0), small(0.000321)) == (
        DASH,
        "0.00",
        DASH,
        "0",
        "0.000321",
    )
    nothing = dict.fromkeys(
        ("output_tokens_per_s", "cpu_s_per_token", "blocks_per_token", "peak_memory_gib", "shared_chunk_frac")
    )
    none = distribution(None)
    results = a_result([a_run(tpt=None, ttft_ms=none, gap_ms=none, e2e_ms=none, **nothing)])
    speed, costs = sections(results)
    assert speed.rows == [["1 client", "vllm", *[DASH] * 10, "32", "0"]]
    assert costs.rows == [["1 client", "vllm", *[DASH] * 4, "123.4"]]


def test_what_users_named_is_escaped():
    name = '<b onload="x">[red]&'
    results = a_result(
        [a_run(), with_exits(name)],
        [a_ratio(name)],
        notes=["<i>"],
        skipped={"<s>": "<u>"},
        machine={"cpu": "<cpu>", "cores": 1},
        command="<c>",
    )
    page = render(results, some_points(results))
    for text in ("<b onload", "<i>", "<s>", "<u>", "<cpu>", "<c>"):
        assert text not in page
    assert "&lt;b onload=&#34;x&#34;&gt;[red]&amp;" in page
    assert "[red]" in text_of(tables(results)) and "[red]" in text_of(compare(results, results, ("[b]a", "b")))


def test_there_is_a_figure_for_everything_measured():
    results = full_result()
    made = figures(results, some_points(results))
    assert [figure.caption for figure in made] == [
        "Time per output token by number of clients, with 95 % CI",
        "Throughput and time per output token, by load",
        "Time per output token of the requests, 1 client",
        "Gaps between tokens, 1 client",
        "Divergences as the tokens went by, 1 client",
        "Time per output token of the requests, 16 clients",
        "Gaps between tokens, 16 clients",
        "Divergences as the tokens went by, 16 clients",
        "Tokens that left early, by depth",
    ]
    drawn = [b64decode(figure.image.partition(",")[2]).decode() for figure in made]
    colors = system_colors(results)
    assert len(set(colors.values())) == 3
    for svg in drawn[:4]:
        assert all(color in svg and f">{system}<" in svg for system, color in colors.items())
    assert ">chat<" in drawn[4] and ">code<" in drawn[4] and ">accuracy bound<" in drawn[4]
    assert ">depth 9<" in drawn[-1] and ">lossless, 1 client<" in drawn[-1]


def test_the_same_points_make_the_same_file():
    results = a_result([a_run()])
    assert figures(results, some_points(results)) == figures(results, some_points(results))


def test_nothing_measured_draws_nothing():
    assert figures(a_result([]), Points()) == []
    failed = a_result([a_run(tpt=None, output_tokens_per_s=None)])
    assert figures(failed, Points()) == []
    render(a_result([]), Points())


def test_figures_cope_with_odd_runs():
    """One request, no interval, arrivals by time, dollar signs, more systems than colours."""
    runs = [a_run(f"$s_{i}$", tpt=50.0 + i, tpt_ms=distribution(50.0)) for i in range(10)]
    runs.append(a_run("vllm", load="2 requests/s", concurrency=None))
    results = a_result(runs)
    made = figures(
        results, Points(tpt_ms={("vllm", "2 requests/s", False): [1.0]}, gap_ms={("other", "x", True): [1.0]})
    )
    assert [figure.caption for figure in made] == [
        "Throughput and time per output token, by load",
        "Time per output token of the requests, 2 requests/s",
    ]
    assert ">$s_1$<" in b64decode(made[0].image.partition(",")[2]).decode()


def test_the_report_is_written_whole(tmp_path):
    results = a_result([a_run()])
    path = write_report(tmp_path / "new", results, Points())
    assert path.read_text() == render(results, Points())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_quota_of_cpu_time_is_part_of_the_machine():
    """64 cores of a host say nothing of a container that has the time of two."""
    machine = {"cpu": "EPYC", "cores": 64, "cpu_quota": 2.5}
    results = a_result([a_run()], machine=machine)
    says = "EPYC, 64 cores, time of 2.5 CPUs"
    assert says in text_of(tables(results)) and says in render(results, some_points(results))
    assert machine_text({"cpu": "EPYC", "cores": 2}) == "EPYC, 2 cores" and machine_text({}) == f"{DASH}, {DASH} cores"


def test_console_tables_fit_and_tell_the_same():
    speed, exits, answers = tables(full_result())
    assert cells_of(speed)[1] == ["lossless", "1 client", "45.00", "44.50", "56.00", "67.00", "210", "16.2", "0",
        f"0.77 (0.74{DASH}0.80)", "0.76 0.78"]  # fmt: skip
    assert cells_of(speed)[0][-2:] == [DASH, ""]
    assert cells_of(exits)[1] == (
        ["early-exit", "1 client", "2000", "1682", "633", "29", "7", "82 (4.1 %)", "89 (4.5 %)", "0.00321"]
    )
    assert "code passed" not in [column.header for column in answers.columns]  # nobody knows
    assert cells_of(answers)[1][2:] == ["43.8 %", "23", "0.876", "0.345", "75.0 %", "50.0 %"]
    assert len(tables(a_result([a_run()]))) == 1


def test_console_tables_fit_a_narrow_console():
    """Many clients, long names, four repeats: all of it is shown in 120 columns."""
    load = {"load": "128 clients, time 2", "concurrency": 128, "fixed_length": True}
    runs = [a_run(**load, tpt=1234.5), with_exits("hf-early-exit", **load, tpt=1234.5, output_tokens=123456)]
    results = a_result(runs, [a_ratio("hf-early-exit", **load, tpt_mean_by_repeat=[0.75, 0.76, 0.77, 0.78])])
    shown = [*tables(results), *compare(results, a_result([]), ("a" * 99, "b"))]
    text = text_of(shown)
    assert max(map(len, text.splitlines())) <= 120 and "\N{HORIZONTAL ELLIPSIS}" not in text
    assert all(word in text for word in ("hf-early-exit", "1234.50", "123456", "accepted", "(0.740", "TTFT"))


def quality_with(identical_frac):
    return with_exits("x").quality.model_copy(update={"identical_frac": identical_frac})


def test_lossless_exits_with_fewer_of_the_baselines_texts_than_ngram_are_warned_of_first():
    def results(lossless, ngram, concurrency=4):
        own = {"identical_frac": lossless, "quality": quality_with(lossless)}
        others = {"identical_frac": ngram, "quality": quality_with(ngram)}
        runs = [a_run("vllm", concurrency), with_exits("lossless", concurrency, **own)]
        return a_result([*runs, a_run("ngram", concurrency, **others)], [a_ratio("lossless", concurrency)])

    sentence = summary_sentence(results(0.58, 0.975))
    assert sentence.startswith(
        "Warning: lossless has plain vLLM's very text less often than vLLM's ngram speculation with 4 clients "
        "(58 % of the answers). Against plain vLLM, "
    )
    assert not summary_sentence(results(0.975, 0.975)).startswith("Warning")
    assert not summary_sentence(results(None, 0.975)).startswith("Warning")
