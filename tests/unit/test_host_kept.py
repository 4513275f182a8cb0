"""What `tune` has kept, and what is in force for a server, alone or in an evaluation."""

import stat
from dataclasses import replace

import pytest

from apparate_llm.cli import build_parser, spelt_out
from apparate_llm.config import ConfigError, parse_config
from apparate_llm.eval.systems import ModelChoice, early_exits, plain_alike
from apparate_llm.host import chosen, store
from apparate_llm.host.choice import (
    AS_VLLM,
    BIND,
    DEFAULT,
    HUGE_PAGES,
    KERNELS,
    OWN_PROCESS,
    QUEUES,
    RESERVED,
    WORKER,
    Choice,
)
from apparate_llm.host.chosen import WITH_EXITS, choose
from apparate_llm.host.limits import CpuLimits
from apparate_llm.host.options import TUNING_VARIABLE, Tuning, kept_tuning_from
from apparate_llm.host.store import FOLDER, Kept, huge_pages_given, key_of, load, save

FOUR = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=None)
SHARED = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=2.5)
BEST = Choice(threads="all", huge_pages=True, queues="block")
BY_DEFAULT = {BIND: "0,1,2,3", HUGE_PAGES: "1", WORKER: "engine", OWN_PROCESS: "0"}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 4, "torch_dtype": "bfloat16"}')
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPARATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept_for(key, choice: Choice = BEST) -> Kept:
    return Kept(key=key, choice=choice, measured="2026-01-01T00:00:00+00:00", table=[{"ratio": 0.9}])


def test_what_was_kept_is_found_again_and_is_nobody_elses_business(model, cache):
    key = key_of(model, [], FOUR, WITH_EXITS)
    assert load(cache, key) is None
    save(cache, kept_for(key))
    assert load(cache, key) == kept_for(key)
    (file,) = (cache / FOLDER).iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_it_holds_for_this_machine_model_dtype_kind_of_exits_and_these_versions_only(model, cache, monkeypatch):
    key = key_of(model, [], FOUR, WITH_EXITS)
    save(cache, kept_for(key))
    others = [key_of(model, [], SHARED, WITH_EXITS), key_of(model, ["--dtype", "float32"], FOUR, WITH_EXITS)]
    others += [key_of(model, [], FOUR, parse_config({"policy": "off"}))]
    others += [key_of(model, [], FOUR, parse_config({"batch_invariant": False}))]
    others += [
        key_of(model, ["--quantization=awq"], FOUR, WITH_EXITS),
        key_of(model, ["--enforce-eager"], FOUR, WITH_EXITS),
    ]
    for name, value in (("cpu_name", lambda: "another"), ("_version", lambda name: "1.2.3")):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, value)
            others.append(key_of(model, [], FOUR, WITH_EXITS))
    (model / "config.json").write_text('{"hidden_size": 128, "num_hidden_layers": 4, "torch_dtype": "bfloat16"}')
    others.append(key_of(model, [], FOUR, WITH_EXITS))
    assert all(other != key and load(cache, other) is None for other in others)
    same = parse_config({"policy": "static", "accuracy_bound": 0.1, "huge_pages": False})
    assert key_of(model, [], FOUR, same) == key_of(model, [], FOUR, WITH_EXITS)
    assert key_of(model, ["--dtype", "bfloat16"], FOUR, WITH_EXITS) == key_of(
        model, ["--dtype", "auto"], FOUR, WITH_EXITS
    )


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "\xff",
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"queues": "block"', '"queues": "race"'),
        lambda text: text.replace('"measured"', '"when"'),
        lambda text: text.replace('"hidden_size": 64', '"hidden_size": 65'),
    ],
    ids=range(8),
)
def test_a_damaged_file_is_as_none(damage, model, cache):
    key = key_of(model, [], FOUR, WITH_EXITS)
    save(cache, kept_for(key, Choice(queues="block")))
    (file,) = (cache / FOLDER).iterdir()
    before = file.read_text()
    file.write_text(damage if isinstance(damage, str) else damage(before), encoding="latin-1")
    assert file.read_text(encoding="latin-1") != before and load(cache, key) is None
    save(cache, kept_for(key))  # it is written over
    assert load(cache, key) is not None


@pytest.mark.parametrize(
    ("text", "word"),
    [("always [madvise] never\n", "madvise"), ("always madvise [never]\n", "never"), ("", None)],
)
def test_who_has_huge_pages_is_linuxs_word(text, word, tmp_path):
    (tmp_path / "enabled").write_text(text)
    assert huge_pages_given(tmp_path / "enabled") == word
    assert huge_pages_given(tmp_path / "none") is None


# ---- what is in force


@pytest.fixture
def four_cores(monkeypatch, zentorch):
    monkeypatch.setattr(chosen, "cpu_limits", lambda: FOUR)


def test_without_a_measurement_a_server_has_the_whole_machine_and_with_one_what_was_kept(model, cache, four_cores):
    chosen = choose(Tuning(), model, given={})
    assert (chosen.choice, chosen.environment) == (DEFAULT, BY_DEFAULT) and "not measured here" in chosen.line
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS), Choice(threads=3, queues="block")))
    chosen = choose(Tuning(), model, given={})
    assert chosen.choice == Choice(threads=3, queues="block") and "kept" in chosen.line
    assert chosen.environment == {BIND: "0,1,2", QUEUES: "block"}
    assert choose(Tuning(), model, ["--dtype", "float32"], given={}).choice == DEFAULT
    assert choose(Tuning(), model, config=parse_config({"policy": "off"}), given={}).choice == DEFAULT


def test_off_is_as_vllm_does_and_says_nothing(model, cache, four_cores):
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS)))
    chosen = choose(Tuning(tuning="off"), model, given={})
    assert (chosen.choice, chosen.environment, chosen.line) == (AS_VLLM, {}, None)


def test_parts_by_hand_go_over_all_else(model, cache, four_cores):
    by_hand = Tuning.model_validate({"tuning": "off", "threads": "2", "worker": "engine"})
    chosen = choose(by_hand, model, config=parse_config({"huge_pages": False}), given={})
    assert chosen.environment == {BIND: "0,1", WORKER: "engine", OWN_PROCESS: "0", HUGE_PAGES: "0"}
    assert "threads, worker, huge pages by hand" in chosen.line
    chosen = choose(Tuning.model_validate({"threads": "2"}), model, given={})
    assert chosen.choice == DEFAULT.model_copy(update={"threads": 2})
    assert "threads by hand, else not measured here" in chosen.line
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS)))
    chosen = choose(Tuning.model_validate({"threads": "2"}), model, given={})
    assert chosen.choice == BEST.model_copy(update={"threads": 2}) and "threads by hand, else kept" in chosen.line


@pytest.mark.parametrize(
    ("kept", "by_hand", "variables"),
    [
        ("threads", {"threads": "2"}, {BIND: "0,1"}),
        ("kernels", {"kernels": "stock"}, {KERNELS: "stock"}),
        ("queues", {"queues": "spin"}, {}),
        ("worker", {"worker": "process"}, {}),
        ("huge_pages", {}, {HUGE_PAGES: "0"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_part_that_is_kept_gives_way_to_a_hand(kept, by_hand, variables, model, cache, four_cores, zentorch):
    zentorch(True)
    other = {"threads": 3, "kernels": "zentorch", "queues": "block", "worker": "engine", "huge_pages": True}[kept]
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS), Choice.model_validate({kept: other})))
    assert getattr(choose(Tuning(), model, given={}).choice, kept) == other
    config = parse_config({"huge_pages": False} if kept == "huge_pages" else {})
    assert choose(Tuning.model_validate(by_hand), model, config=config, given={}).environment == variables


@pytest.mark.parametrize(
    ("by_hand", "options", "variables"),
    [
        ({"threads": "2"}, {}, BY_DEFAULT | {BIND: "0,1"}),
        ({"kernels": "stock"}, {}, BY_DEFAULT | {KERNELS: "stock"}),
        ({"worker": "process"}, {}, {BIND: "0,1,2,3", HUGE_PAGES: "1"}),
        ({"worker": "process", "queues": "block"}, {}, {BIND: "0,1,2,3", HUGE_PAGES: "1", QUEUES: "block"}),
        ({}, {"huge_pages": False}, BY_DEFAULT | {HUGE_PAGES: "0"}),
    ],
    ids=str,
)
def test_each_part_of_the_default_gives_way_to_a_hand(by_hand, options, variables, model, cache, four_cores, zentorch):
    zentorch(True)
    config = parse_config(options)
    assert choose(Tuning.model_validate(by_hand), model, config=config, given={}).environment == variables


@pytest.mark.parametrize(("value", "pages"), [("0", False), ("1", True)])
def test_pages_by_a_variable_are_those_of_a_server_with_exits_too(value, pages, model, cache, four_cores):
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS), Choice(huge_pages=not pages)))
    chosen = choose(Tuning(), model, given={HUGE_PAGES: value})
    assert chosen.huge_pages is pages and chosen.environment == {} and f"{HUGE_PAGES}={value}" in chosen.line
    assert choose(Tuning(), model, given={}).huge_pages is not pages


@pytest.mark.parametrize("flags", [["--tensor-parallel-size", "2"], ["--data-parallel-size=2"]], ids=" ".join)
def test_several_workers_are_bound_by_vllm_itself(flags, model, cache, four_cores):
    assert choose(Tuning(), model, flags, given={}).environment == {}
    for key in (key_of(model, [], FOUR, WITH_EXITS), key_of(model, flags, FOUR, WITH_EXITS)):
        save(cache, kept_for(key, Choice(threads="all", worker="engine")))
        assert choose(Tuning(), model, flags, given={}).environment == {}


def test_a_users_own_executor_keeps_its_worker(model, cache, four_cores):
    flags = ["--distributed-executor-backend", "mp"]
    by_default = choose(Tuning(), model, flags, given={})
    assert by_default.choice == DEFAULT.model_copy(update={"worker": "process"})
    assert not {WORKER, OWN_PROCESS} & by_default.environment.keys()
    for key in (key_of(model, [], FOUR, WITH_EXITS), key_of(model, flags, FOUR, WITH_EXITS)):
        save(cache, kept_for(key, Choice(threads=3, worker="engine")))
    assert choose(Tuning(), model, given={}).choice == Choice(threads=3, worker="engine")
    assert choose(Tuning(), model, flags, given={}).choice == Choice(threads=3)


def test_a_user_without_a_cache_is_served_as_where_nothing_was_measured(model, homeless, four_cores):
    chosen = choose(Tuning(), model, given={})
    assert (chosen.choice, chosen.environment) == (DEFAULT, BY_DEFAULT) and "not measured here" in chosen.line
    assert choose(Tuning(tuning="off"), model, given={}).choice == AS_VLLM


def test_a_profile_of_prepare_uses_the_machine_as_a_server_does(model, cache, four_cores, monkeypatch):
    from apparate_llm.prepare.engine import environment as of_preparation
    from apparate_llm.prepare.servers import used_by_servers

    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS), Choice(threads=3)))
    monkeypatch.delenv(TUNING_VARIABLE)
    for name, value in of_preparation().items():
        monkeypatch.setenv(name, value)
    chosen = used_by_servers(model)
    assert chosen.environment == {BIND: "0,1,2"} and "OMP_NUM_THREADS" not in chosen.given
    monkeypatch.setenv(TUNING_VARIABLE, "off")
    assert used_by_servers(model).environment == {}


# ---- servers of an evaluation


@pytest.fixture
def choice_of(model, monkeypatch):
    """choice_of(*flags): what the servers of `eval quick` have in common."""
    from apparate_llm.eval import systems
    from apparate_llm.eval.plan import option_flags

    monkeypatch.setattr(systems, "cpu_limits", lambda: FOUR)

    def parsed(*flags: str) -> systems.ModelChoice:
        args = build_parser().parse_args(spelt_out(["eval", "quick", str(model), *flags]))
        return systems.tuned(systems.ModelChoice(model, options=tuple(option_flags(args))), kept_tuning_from(args))

    return parsed


def systems_by_name(choice):
    from apparate_llm.eval.systems import systems_of

    names = ["vllm", "vllm-tuned", "off", "ngram", "ngram-tuned", "+threads"]
    return {system.name: system for system in systems_of(names, [], choice)}


def test_plain_vllm_tuned_uses_the_machine_as_our_servers_do(choice_of, cache, four_cores):
    choice = choice_of("--tuning", "auto", "--threads", "3", "--queues", "spin", "--huge-pages", "false")
    systems = systems_by_name(choice)
    for name in ("vllm-tuned", "ngram-tuned"):
        assert systems[name].variables == {BIND: "0,1,2", HUGE_PAGES: "0"}
        assert systems[name].started_by.startswith(f"{BIND}=0,1,2 ")
    command = " ".join(systems["off"].command)
    assert "--tuning auto --threads 3 --queues spin" in command and systems["off"].variables == {}
    assert systems["vllm"].variables == systems["ngram"].variables == {}, "as it starts, whatever ours do"
    assert systems["vllm-tuned"].command == systems["vllm"].command
    assert systems["+threads"].variables == {BIND: "0,1,2,3"}


def test_where_ours_are_as_vllm_does_plain_vllm_tuned_is_on_all_cores(choice_of, cache, four_cores):
    systems = systems_by_name(choice_of())
    assert systems["vllm-tuned"].variables == systems["ngram-tuned"].variables == {BIND: "0,1,2,3"}
    assert systems["vllm"].variables == systems["off"].variables == {}


@pytest.mark.parametrize("value", ["true", "false"])
def test_without_tuning_pages_by_hand_are_no_tuning(value, choice_of, cache, four_cores):
    choice = choice_of("--tuning", "off", "--huge-pages", value)
    assert (choice.used, choice.alike) == (AS_VLLM, {})
    assert plain_alike(choice).name == "vllm"
    assert systems_by_name(choice)["vllm-tuned"].variables == {BIND: "0,1,2,3"}
    assert f"--huge-pages {value}" in " ".join(early_exits("ours", choice, "--policy", "off").command)


@pytest.mark.parametrize(
    ("flags", "pages"), [((), "1"), (("--huge-pages", "true"), "1"), (("--huge-pages", "false"), "0")], ids=str
)
def test_where_nothing_was_measured_plain_vllm_has_the_whole_machine_too(
    flags, pages, choice_of, cache, four_cores, monkeypatch
):
    monkeypatch.delenv(OWN_PROCESS)
    choice = choice_of("--tuning", "auto", *flags)
    assert choice.used == DEFAULT.model_copy(update={"huge_pages": pages == "1"})
    assert plain_alike(choice).name == "vllm-tuned"
    systems = systems_by_name(choice)
    assert systems["vllm-tuned"].variables == systems["ngram-tuned"].variables == BY_DEFAULT | {HUGE_PAGES: pages}
    assert systems["vllm"].variables == systems["ngram"].variables == systems["off"].variables == {}
    own = " ".join(early_exits("ours", choice, "--policy", "off").command)
    assert "--tuning auto" in own and " ".join(flags) in own


def test_servers_without_exits_go_by_what_is_kept_for_them(choice_of, model, cache, four_cores):
    save(cache, kept_for(key_of(model, [], FOUR, parse_config({"policy": "off"})), Choice(threads=2)))
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS), Choice(threads=3)))
    assert plain_alike(choice_of("--tuning", "auto")).variables == {BIND: "0,1,2"}
    assert plain_alike(choice_of("--tuning", "auto", "--policy", "off")).variables == {BIND: "0,1"}


def test_the_threads_of_several_workers_are_bound_by_vllm(choice_of, cache, four_cores):
    choice = replace(choice_of(), vllm_flags=("--tensor-parallel-size", "2"))
    assert systems_by_name(choice)["vllm-tuned"].variables == {RESERVED: "0"}


def test_ours_are_compared_with_plain_vllm_that_uses_the_machine_alike(choice_of, model, cache, four_cores):
    assert (plain_alike(choice_of()).name, plain_alike(choice_of()).variables) == ("vllm", {})
    save(cache, kept_for(key_of(model, [], FOUR, WITH_EXITS)))
    alike = plain_alike(choice_of("--tuning", "auto"))
    assert alike.name == "vllm-tuned"
    assert alike.variables == {BIND: "0,1,2,3", HUGE_PAGES: "1", QUEUES: "block"}


def test_a_system_may_have_parts_of_its_own(model, cache, four_cores):
    choice = ModelChoice(model, tuning=("--tuning", "off", "--threads", "2"))
    command = " ".join(early_exits("mine", choice, "--policy", "off", "--threads", "4", "--worker", "engine").command)
    assert "--tuning off --threads 4 --worker engine" in command
    with pytest.raises(ConfigError, match="--worker: must be auto, process or engine, got 'none'"):
        early_exits("mine", choice, "--policy", "off", "--worker", "none")


def test_an_evaluation_does_not_measure_first(choice_of, cache, four_cores):
    for value in ("again", "yes"):
        with pytest.raises(ConfigError, match=f"--tuning: must be auto or off, got '{value}'"):
            choice_of("--tuning", value)
    with pytest.raises(ConfigError, match="--tuning: must be auto or off, got 'again'"):
        early_exits("mine", choice_of(), "--policy", "off", "--tuning", "again")


@pytest.mark.parametrize("kind", ["quick", "tpt", "drift", "steady"])
def test_the_help_of_an_evaluation_has_the_values_that_it_takes(kind, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["eval", kind, "--help"])
    shown = capsys.readouterr().out
    assert "--tuning {auto,off}" in shown and "again: measure" not in " ".join(shown.split())
