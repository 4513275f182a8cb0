"""The README's commands and figures are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pytest

from apparate_llm.cli import build_parser, spelt_out
from apparate_llm.config import EarlyExitConfig
from apparate_llm.eval.compare import load_results
from apparate_llm.flags import options_from
from apparate_llm.renamed import depth_of_any_evaluation

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if line.startswith("apparate-llm ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood_as_it_stands(command):
    args, rest = build_parser().parse_known_args(spelt_out(shlex.split(command)[1:]))
    assert rest == []
    if args.command in ("serve", "eval"):  # the others have no options
        options_from(args)


def test_what_contributors_are_told_to_run_is_there():
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)(?:`|  |\n| ARGS)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for script in re.findall(r"scripts\.(\w+)", text):
        assert (ROOT / "scripts" / f"{script}.py").is_file(), script
    for path in re.findall(r"`([\w/]+\.\w+)`", text):
        assert (ROOT / path).exists() or (ROOT / "apparate_llm" / "engine" / path).exists(), path


def test_there_are_commands_of_every_kind():
    assert {command.split()[1] for command in COMMANDS} == {
        "demo",
        "serve",
        "chat",
        "doctor",
        "eval",
        "prepare",
        "ramps",
        "replay",
        "quantize",
    }


def test_the_options_it_names_are_those_of_the_schema():
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| (\S+) \|", README, re.M))
    assert len(rows) == 5
    for name, shown in rows.items():
        default = EarlyExitConfig.model_fields[name.replace("-", "_")].default
        assert shown.strip("`") == ("none" if default in (None, {}) else str(default))


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", BLOCKS, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


RESULTS = ROOT / "docs" / "results"


def test_where_texts_were_measured_all_lossless_ones_are_those_without_exits():
    runs = [run for path in RESULTS.glob("texts-*.json") for run in load_results(path).runs]
    lossless = [run.same_as_off_frac for run in runs if run.system == "lossless"]
    assert len(lossless) >= 6 and set(lossless) == {1.0}


@pytest.mark.parametrize("path", sorted([*RESULTS.glob("ramps-*.json"), *RESULTS.glob("prepare-*.json")]))
def test_acceptance_rates_in_the_docs_are_that_of_the_committed_results(path):
    text = (path.parents[1] / "prepare.md").read_text()
    for item in json.loads(path.read_text())["depths"]:
        item = depth_of_any_evaluation(item)
        rates = " | ".join(f"{part['acceptance_rate']:.3f}" for part in item["positions"])
        assert f"| {item['depth']} | {rates} | {item['accepted_per_step']:.2f} |" in text
