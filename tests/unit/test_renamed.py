"""Names of earlier versions: still taken, with a warning, and used by nothing of ours."""

import json
import logging
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from apparate_llm import renamed
from apparate_llm.cli import build_parser, main
from apparate_llm.config import (
    LIVE_OPTIONS,
    ConfigError,
    EarlyExitConfig,
    RequestOptions,
    parse_config,
    parse_live,
    parse_request_options,
)
from apparate_llm.controller.adaptive import AdaptivePolicy
from apparate_llm.controller.costs import CostModel
from apparate_llm.core import Exit, ExitCounts
from apparate_llm.eval.compare import load_results
from apparate_llm.eval.plan import option_flags
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.systems import ModelChoice, early_exits
from apparate_llm.exits.histograms import Distributions
from apparate_llm.flags import options_from
from apparate_llm.prepare.costs import ProfiledCosts
from apparate_llm.prepare.evaluate import DepthResult
from apparate_llm.prepare.schedule import point
from apparate_llm.prepare.train import TrainSettings
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.ramps.checkpoint import MANIFEST, read_manifest
from apparate_llm.vllm_flags import normalised
from tests.eval_results import a_ratio, a_result, a_run
from tests.tiny import build_fused_ramps

ROOT = Path(__file__).parents[2]
OLD_VALUES = {"waiting_weight": 0.5, "max_rows": 8, "class_metrics": False, "state": "none"}


@pytest.fixture(autouse=True)
def warned_of_nothing(monkeypatch):
    monkeypatch.setenv(renamed.WARNED_VARIABLE, "")


def test_every_old_name_stands_for_one_there_is():
    assert set(renamed.OPTIONS.values()) <= set(EarlyExitConfig.model_fields)
    assert set(renamed.REQUEST_FIELDS.values()) <= set(RequestOptions.model_fields)
    assert not set(renamed.OPTIONS) & set(EarlyExitConfig.model_fields)


@pytest.mark.parametrize(("old", "value"), OLD_VALUES.items())
def test_an_old_option_is_taken_and_told_of_once(caplog, old, value):
    new = renamed.OPTIONS[old]
    caplog.set_level(logging.WARNING, logger="vllm.apparate")
    logging.getLogger("vllm.apparate").addHandler(caplog.handler)
    try:
        assert parse_config({old: value}) == parse_config({old: value}) == parse_config({new: value})
    finally:
        logging.getLogger("vllm.apparate").removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {
        f"{old} is called {new} now; the old name goes with version 0.3"
    }
    assert parse_config({old: value, new: value}) == parse_config({new: value})
    flag = ["--" + old.replace("_", "-"), str(value)]
    args = build_parser().parse_args(["serve", *flag])
    assert options_from(args) == parse_config({new: value})
    assert options_from(args, {new: value}) == options_from(args, {old: value}) == parse_config({new: value})
    assert option_flags(args) == ["--" + new.replace("_", "-"), str(value)]
    assert flag[0] not in build_parser().format_help()


@pytest.mark.parametrize("old", [old for old, new in renamed.OPTIONS.items() if new in LIVE_OPTIONS])
def test_an_old_option_changes_while_serving(old):
    config = parse_config({})
    value = OLD_VALUES[old]
    assert parse_live({old: value}, config) == parse_config({renamed.OPTIONS[old]: value})


def test_a_file_of_flags_may_go_by_old_names_and_the_command_line_wins(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("waiting_weight: 0.5\nclass_metrics: false\nstate:\n")
    from_file = normalised(["--config", str(file)])
    assert options_from(build_parser().parse_args(["serve", *from_file])) == parse_config(
        {"ttft_weight": 0.5, "tenant_metrics": False}
    )
    given = normalised(["--config", str(file), "--ttft-weight", "0"])
    assert options_from(build_parser().parse_args(["serve", *given])).ttft_weight == 0.0


def test_a_system_s_own_option_wins_over_the_common_one_by_either_name(tiny_llama):
    choice = ModelChoice(tiny_llama, options=("--max-rows", "4"))
    command = early_exits("wide", choice, "--max-batch-tokens", "8", "--state", "file").command
    assert command[command.index("--max-batch-tokens") :][:2] == ("--max-batch-tokens", "8")
    assert command[command.index("--controller-state") :][:2] == ("--controller-state", "file")
    assert "--max-rows" not in command and command.count("--controller-state") == 1


def test_old_and_new_that_say_different_things_are_refused():
    with pytest.raises(ConfigError, match="early_exit: max_rows: the old name of max_batch_tokens, which says"):
        parse_config({"max_rows": 1, "max_batch_tokens": 2})
    tenants = parse_config({"tenants": {"a": {}, "b": {}}})
    with pytest.raises(ConfigError, match="vllm_xargs: early_exit_class: the old name of early_exit_tenant"):
        parse_request_options({"early_exit_class": "a", "early_exit_tenant": "b"}, tenants)
    with pytest.raises(ConfigError, match="--max-batch-tokens 1 and max_batch_tokens 2 of --additional-config"):
        options_from(build_parser().parse_args(["serve", "--max-rows", "1"]), {"max_batch_tokens": 2})


def test_a_tenants_file_and_a_request_may_go_by_the_old_names(tmp_path):
    file = tmp_path / "tenants.toml"
    file.write_text("[batch]\nearly_exit = 0\n")
    config = options_from(build_parser().parse_args(["serve", "--classes", str(file)]))
    assert config.tenants["batch"].early_exit == 0
    assert parse_config({"classes": {"batch": {"early_exit": 0}}}) == config
    for name in ("early_exit_class", "early_exit_tenant"):
        assert parse_request_options({name: "batch"}, config).early_exit_tenant == "batch"


def learned_policy() -> AdaptivePolicy:
    policy = AdaptivePolicy(depth=0, depths=(0,), num_layers=30, max_exits=4)
    for _ in range(3):
        policy.on_decode_step(1, 2, 20.0)
        policy.on_draft_step(0, 1, 1.0)
    policy.start(1)
    return policy


def test_what_a_controller_of_version_0_1_learned_is_taken_up():
    learned, fresh = learned_policy(), learned_policy()
    fresh.costs = CostModel(30)
    state = json.loads(json.dumps(learned.state()))
    old = {
        {new: old for old, new in renamed.CONTROLLER_STATE.items()}.get(name, name): item
        for name, item in state.items()
    }
    assert {"completion", "rounds"} <= old.keys() and not {"completion", "rounds"} & state.keys()
    fresh.restore(old)
    assert fresh.costs == replace(learned.costs, slowdown=1.0) and fresh.state() == learned.state()


def test_the_status_has_the_old_names_beside_the_new():
    counts = ExitCounts(verification_passes=7, draft_steps=5, accepted_divergences=2, released_divergences=1)
    worker = {
        "depth": 0,
        "counts": counts.as_dict(),
        "distributions": Distributions().as_dict(),
        "controller": learned_policy().status(),
        "tenants": {"fast": {"emitted": 9, "divergences": 3}},
    }
    status = renamed.beside_old_names(worker)
    assert status["depth"] == 0 and status["counts"]["completion_passes"] == 7 and status["counts"]["rounds"] == 5
    assert [status["counts"][f"{which}diverged"] for which in ("", "accepted_", "released_")] == [3, 2, 1]
    assert status["tenants"] == {"fast": {"emitted": 9, "divergences": 3, "diverged": 3}}
    for part, names in renamed.STATUS.items():
        assert status[part] == {**worker[part], **{old: worker[part][new] for new, old in names.items()}}
        assert not set(names.values()) & worker[part].keys()
    off = {**worker, "controller": {}}  # of a policy that learns nothing
    assert renamed.beside_old_names(off)["controller"] == {}


def test_calibrations_of_prompt_lookup_have_their_old_names_beside():
    policy = learned_policy()
    for greedy in (True, False):
        policy.on_verdict(Exit(9, 1, 0, 0, 0.9, greedy, lookup_length=12), True)
    both = renamed.beside_old_names({"controller": policy.status()})["controller"]["calibration"]
    assert set(both) == {*renamed.CALIBRATIONS, *renamed.CALIBRATIONS.values()}
    assert all(both[old] == both[new] for new, old in renamed.CALIBRATIONS.items())


def test_counts_of_stored_blocks_go_by_the_new_names(tmp_path):
    store = Store(tmp_path / "evaluation")
    store.open({}, fresh=True)
    figures = {"wall_s": 1.0, "cpu_s": None, "energy_j": None, "peak_memory_gib": None, "probe_ms": 1.0}
    old = {"held": 3, "rounds": 5, "completion_passes": 7, "diverged": 1, "copied": 2}
    for number, counts in enumerate((old, None)):
        key = BlockKey(0, 0, number, "lossless")
        store.add(Block(key=key, completions=[], counts=counts, stolen_frac=0.0, **figures))
    new = {"held": 3, "draft_steps": 5, "verification_passes": 7, "divergences": 1, "lookup_exits": 2}
    assert [block.counts for block in store.blocks()] == [new, None]
    assert renamed.counts_of_any_version({**new, "rounds": 5}) == new  # a server tells both


def test_the_records_of_an_older_preparation_are_used(tmp_path):
    workspace, settings = Workspace(tmp_path), repr(TrainSettings(depth=0, aux_layers=(1, 3)))
    old_settings = settings.replace("aux_layers", "inner").replace("step_weights", "round_weights")
    assert "inner=(1, 3)" in old_settings and "round_weights=(" in old_settings
    old = {"validation_tokens_per_cycle": 1.5, "train_tokens_per_cycle": 1.6, "settings": old_settings}
    workspace.write("train-0-lap-0", {"settings": old_settings, "after": None}, old)
    trained = workspace.read("train-0-lap-0", {"settings": settings, "after": None})
    assert trained == {"validation_accepted_per_step": 1.5, "train_accepted_per_step": 1.6, "settings": settings}
    assert point(trained) == 1.5
    measured = {"held_out_tokens_per_cycle": 1.4, "agreement": [0.7, 0.6], "ceiling": {"copy_agreement": 0.2}}
    workspace.write("measure-0", {"trained": old}, measured)
    measured = workspace.read("measure-0", {"trained": trained})
    ceiling = {"lookup_agreement": 0.2}
    assert measured == {"held_out_accepted_per_step": 1.4, "acceptance_rates": [0.7, 0.6], "ceiling": ceiling}
    kinds = dict.fromkeys(("completion", "pass", "prompt", "round"), 0.1)
    costs = {"completion_ms": {"1": 20.0}, "round_ms": {"0": {"1": 1.5}}, "spread_frac": kinds}
    workspace.write("profile", {"heads": {0: old | {"agreement": [0.7, 0.6]}}}, costs)
    profiled = workspace.read("profile", {"heads": {0: trained | {"acceptance_rates": [0.7, 0.6]}}})
    assert profiled["error_frac"] == dict.fromkeys(("verify", "pass", "prompt", "draft_step"), 0.1)
    known = ProfiledCosts.of(profiled, 0)
    assert (known.pass_ms(1, 1, 0), known.draft_step_ms(1)) == (20.0, 1.5)


def test_an_older_preparation_with_other_settings_is_another_one(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write("train-0-lap-0", {"settings": "TrainSettings(depth=0, inner=(1, 3))"}, {})
    assert workspace.read("train-0-lap-0", {"settings": "TrainSettings(depth=0, aux_layers=(1, 2))"}) is None


def test_ramps_of_version_0_1_are_read_and_shown(tmp_path, tiny_llama, capsys):
    manifest = build_fused_ramps(tmp_path, tiny_llama, depth=2) / MANIFEST
    old = json.loads(manifest.read_text())
    old["inner"] = old.pop("aux_layers")
    old["training"] = {"depths": {"2": {"held_out_agreement": [0.712], "held_out_calibration_error": 0.034}}}
    manifest.write_text(json.dumps(old))
    current = read_manifest(tmp_path)
    assert current.aux_layers == [1, 3] and "aux_layers" in current.model_dump() and "inner" not in current.model_dump()
    assert main(["ramps", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "position 0" in shown and "0.712" in shown and "0.034" in shown


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("ramps-*.json")), ids=lambda path: path.name)
def test_evaluations_of_ramps_by_older_versions_are_read(path):
    for old in json.loads(path.read_text())["depths"]:
        result = DepthResult.model_validate(renamed.depth_of_any_evaluation(old))
        assert renamed.depth_of_any_evaluation(result.model_dump()) == result.model_dump()
        assert [part.position for part in result.positions] == [0, 1, 2, 3]
        assert [part.acceptance_rate for part in result.positions] == [part["agreement"] for part in old["rounds"]]
        assert result.accepted_per_step == old["tokens_per_cycle"]
        for category, rates in old["by_category"].items():
            assert list(result.by_category[category].values()) == list(rates.values())
            assert list(result.by_category[category]) == ["0", "1", "2", "3"]


# What a processor does to a sum.
VERB = r"(?:a lone|another way|differently|in another|in bfloat16|(?:in )?its own way|off|to|up|down)\b"
# Words that the code and the pages had for what the field calls otherwise.
RETIRED = (
    r"\bknobs?\b",  # option
    r"\bcompletion pass",  # verification pass
    r"\bcopy feature\b|\bcopy_(agreement|lengths)\b|\bcopies(\(|_of\b)",  # lookup feature
    r"\bnum_rows(: int\b(?! \|)|, (ms|vocab)\b|=(\d|self\b|(num_)?rows\b))",  # num_tokens, of a batch
    r"\._?num_rows\b|\bnum_decode_rows\b",
    r"\b(room|reach|reaches)\b(, \w+)* *[*+]?=(?!=)|\bclass Room\b|\broom_for_\w+",  # free_slots, joint_acceptance
    r"\bVerb\.(RELEASE|HOLD|STOP)\b|\bclass Verb\b|\bverbs *=|\.offered\b|_num_offered\b|\bwas offered\b",  # decision
    r"[\"`.]copied\b|\bcopied *=(?!=)|\bexits? (is|are|was|were|may be) copied\b",  # prompt lookup
    r"\bexit_?\.match\b|\bmatch=\d|\bLONG(EST)?_MATCH\b|\blong(est)?( \w+)? match(es)?\b|\bMOST_COUNTED\b",  # n-gram
    r"\btexts? (is|are) followed\b(?! by)|\b_not_followed\b|\bFOLLOWED_EVERY\b|\b_follows\(",
    r"\binner states?\b",  # auxiliary hidden states
    r"\brequest class(es)?\b",  # tenant
    r"\b_?judge_\w+|\w+_JUDGED\b|\bmay_accept\b|\.accepts\(|\baccepts=|def accepts\b|\brecord_verdicts\b",  # verify_*
    r"\bverdicts_of_sampling\b|\b_may_pass\b|\bledger\.(checked|record)\b|\bgreedy\.check\(",
    r"\bcompletion_(ms|pass|passes|seconds)\b",  # verify_ms, verification pass
    r"\brounds?_(?!robin)\w+|\w+_rounds?\b",  # draft step
    rf"(?<!way )(?<! it )\brounds?\b(?!\(|-| {VERB})",  # draft step; position, of an exit in its engine step
    r"\bper[ _]cycle\b",  # accepted tokens per step
    r"\bread_cycles\b",  # read_steps
    r"\bnum_inner\b|\.inner\b|\binner(=|: )",  # aux_layers
    r"\bdiffering\b|tokens that differ\b(?! from)|count(s|ed)? as wrong|exits? wrongly|\w*diverged\b",  # divergence
    r"\b(found|told|said)\b *(:[^=\n]*)?[-+|:]?=(?!=)",  # by content: paths, matches, records
    r"\bfor (\w+, )?(found|told|said) in\b|\b(found|told|said)\[|\bdef _?(found|told|said)\b|\((found|told|said)[,:)]",
    r"\bspreads? *=(?!=)|\bspread_frac\b",  # histogram, error_frac
    r"\bfor_serving\b|\bPackedHead\b",  # quantised_head
    r"\bstock_\w+|\bstock (one|ones|platform)\b|\b(errors_told|found_version|_price_nano)\b",  # original, own
    r"\bpaces?\b",  # slowdown
    r"(?<!\.)\bprices?\b(?!: float)",  # cost; not of the product in an answer
    r"\bnever stop",  # closed loop
    r"\blengths? of (their|its|a) own\b",  # varied output lengths
    r"\b(go|goes|going|went|out of)\s+(in )?step\b",  # synchronised
    r"\bdear(er|est|ly)?\b",  # expensive
    r"\bby turns\b|\btak(e|es|ing) turns\b",  # interleaved
)


def test_results_of_old_evaluations_have_the_new_names_of_systems(tmp_path):
    for old, new in {
        "bounded 0.05": "early-exit-0.05",
        "epsilon=0.01": "early-exit-0.01",
        "idle": "ramps-only",
    }.items():
        results = a_result([a_run("vllm"), a_run(old)], [a_ratio(old)])
        results.systems = {old: "command"}
        results.settings |= {"bounds": {old: 0.05}, "knobs": [], "systems": [old]}
        (tmp_path / "results.json").write_text(results.model_dump_json())
        again = load_results(tmp_path)
        assert [run.system for run in again.runs] == ["vllm", new] and again.ratios[0].system == new
        assert list(again.systems) == list(again.settings["bounds"]) == again.settings["systems"] == [new]
        assert again.settings["options"] == [] and "knobs" not in again.settings
    mine = a_result([a_run("vllm"), a_run("idle")], [a_ratio("idle")])  # a name that the user gave
    (tmp_path / "results.json").write_text(mine.model_dump_json())
    assert [run.system for run in load_results(tmp_path).runs] == ["vllm", "idle"]
    for name in ("vllm", "lossless", "static 0.05", "my own"):
        assert renamed.system_of_old(name) == name


def test_nothing_of_ours_goes_by_an_old_name():
    """Neither flags, nor options, nor metrics, nor words; of options only what is no word of its own."""
    words = [rf"--{old.replace('_', '-')}(?![\w-])" for old in renamed.OPTIONS]
    words += [rf"\b{old}\b" for old in (*renamed.OPTIONS, *renamed.REQUEST_FIELDS) if "_" in old]
    words += [rf"apparate:{old}(?:_total|_sum|_count|_bucket)?\b" for old in renamed.METRICS.values()]
    retired = re.compile("|".join([*words, f"(?i:{'|'.join(RETIRED)})"]))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("no checkout")
    past = ("CHANGELOG.md", "renamed.py", "test_renamed.py", "test_metrics.py", "test_access_tenants.py")
    hits = []
    for file in map(ROOT.joinpath, listed):
        is_past = file.name in past or "results" in file.parts or "assets" in file.parts
        if is_past or file.suffix not in (".py", ".md", ".html", ".json", ".yml", ".toml") or not file.exists():
            continue
        hits += [f"{file.relative_to(ROOT)}: {hit[0]}" for hit in retired.finditer(file.read_text(errors="replace"))]
    assert not hits
