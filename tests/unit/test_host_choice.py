"""How a server uses this machine: as variables, as a line, and by what a user says by hand."""

from argparse import ArgumentParser, Namespace

import pytest

from apparate_llm.cli import main
from apparate_llm.config import ConfigError, parse_config
from apparate_llm.host import choice as choice_module
from apparate_llm.host import chosen, options
from apparate_llm.host.choice import (
    AS_VLLM,
    BIND,
    DEFAULT,
    HUGE_PAGES,
    KERNELS,
    OWN_PROCESS,
    QUEUES,
    RESERVED,
    THREADS,
    WORKER,
    Choice,
    environment,
    line,
    variables,
)
from apparate_llm.host.chosen import choose
from apparate_llm.host.limits import CpuLimits
from apparate_llm.host.options import TUNING_VARIABLE, Tuning, add_tuning, num_ranks, tuning_from
from apparate_llm.vllm_flags import normalised

FOUR = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=None)
ALL_CORES = Choice(threads="all")
SHARED = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=2.5)

# ---- as variables


def test_as_vllm_does_nothing_is_set(zentorch):
    assert variables(AS_VLLM, FOUR) == {}


def test_threads_are_bound_to_the_first_cores_as_vllm_binds_them(zentorch):
    assert variables(ALL_CORES, FOUR) == {BIND: "0,1,2,3"}
    assert variables(Choice(threads=3), FOUR) == {BIND: "0,1,2"}
    twice = CpuLimits(num_cpus=4, cores=(2, 3), quota=None)
    assert variables(ALL_CORES, twice) == {BIND: "2,3"}


def test_threads_with_a_share_of_the_time_are_not_bound_to_what_all_others_are_bound_to(zentorch):
    env = variables(ALL_CORES, SHARED)
    assert (env[BIND], env["OMP_NUM_THREADS"], env["KMP_BLOCKTIME"]) == ("nobind", "2", "5")
    enough = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=4.0)
    assert variables(ALL_CORES, enough) == {BIND: "0,1,2,3"}


def test_each_part_has_its_variable(zentorch):
    assert variables(Choice(queues="block"), FOUR) == {QUEUES: "block"}
    assert variables(Choice(worker="engine"), FOUR) == {WORKER: "engine", OWN_PROCESS: "0"}
    assert variables(Choice(huge_pages=True), FOUR) == {HUGE_PAGES: "1"}
    assert variables(Choice(huge_pages=False), FOUR) == {HUGE_PAGES: "0"}
    assert variables(Choice(kernels="stock"), FOUR) == {}, "there are no others"
    zentorch(True)
    assert variables(Choice(kernels="stock"), FOUR) == {KERNELS: "stock"}


def test_zentorchs_passes_are_compiled_into_a_place_of_their_own(zentorch, monkeypatch, tmp_path):
    """vLLM's key for a compiled pass does not say which kernels it calls."""
    zentorch(True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    env = variables(Choice(kernels="zentorch"), FOUR)
    assert env == {KERNELS: "zentorch", "VLLM_CACHE_ROOT": str(tmp_path / "vllm" / "zentorch")}


@pytest.mark.parametrize(
    ("text", "takes"),
    [
        ("vendor_id: AuthenticAMD\nflags: avx512f", True),
        ("vendor_id: AuthenticAMD\nflags: avx2", False),
        ("vendor_id: GenuineIntel\nflags: avx512f", False),
    ],
)
def test_zentorch_is_for_amds_cpus_wherever_it_is_installed(text, takes, monkeypatch, tmp_path):
    """An image may bring it to any machine."""
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(choice_module, "is_cpu_build", lambda: True)
    monkeypatch.setattr(choice_module.importlib.util, "find_spec", lambda name: object())
    assert choice_module.takes_zentorch(tmp_path / "cpuinfo") == takes
    monkeypatch.setattr(choice_module, "takes_zentorch", lambda: takes)
    assert choice_module.has_zentorch() == takes
    assert (choice_module.kernels_text(AS_VLLM) == "stock kernels") == (not takes)


def test_kernels_that_this_cpu_cannot_have_are_refused_without_a_fix_that_is_none(zentorch, monkeypatch):
    monkeypatch.setattr(options, "takes_zentorch", lambda: False)
    monkeypatch.setattr(options, "cpu_name", lambda: "a CPU of Intel's")
    with pytest.raises(ConfigError, match=r"AMD's CPUs with AVX-512 only, got a CPU of Intel's \(allowed: auto or"):
        options.check_tuning(Tuning(kernels="zentorch"), FOUR, [], {}, parse_config({}))


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({BIND: "0"}, [BIND]),
        ({RESERVED: "1"}, [BIND]),
        ({QUEUES: "spin"}, [QUEUES]),
        ({OWN_PROCESS: "1"}, [WORKER, OWN_PROCESS]),
        ({HUGE_PAGES: "0"}, [HUGE_PAGES]),
        ({"SOMETHING": "else"}, []),
    ],
    ids=str,
)
def test_a_variable_set_by_hand_stays_and_what_belongs_to_it_is_not_set(given, left_out, zentorch):
    choice = Choice(threads="all", huge_pages=True, queues="block", worker="engine")
    everything = variables(choice, FOUR)
    assert environment(choice, FOUR, {}) == everything
    assert environment(choice, FOUR, given) == {k: v for k, v in everything.items() if k not in left_out}


def test_openmps_number_of_threads_gives_way_with_a_share_of_the_time_as_without(zentorch):
    """Images set it. Where threads are bound vLLM goes over it itself."""
    given = {THREADS: "64", "KMP_BLOCKTIME": "0"}
    for choice, number in ((ALL_CORES, "2"), (Choice(threads=1), "1")):
        env = environment(choice, SHARED, given)
        assert (env[BIND], env[THREADS]) == ("nobind", number) and "KMP_BLOCKTIME" not in env
    by_hand = environment(ALL_CORES, SHARED, given | {BIND: "nobind"})
    assert not {BIND, THREADS} & by_hand.keys(), "who binds none by hand says how many"
    assert environment(ALL_CORES, FOUR, given) == {BIND: "0,1,2,3"}


def test_the_line_says_what_is_in_force(zentorch):
    choice = Choice(threads="all", huge_pages=True, queues="block", worker="process")
    assert line(choice, FOUR, {}, "because") == (
        "Tuned: 4 of 4 threads, stock kernels, huge pages, blocking queues, worker in a process of its own (because)"
    )
    text = line(Choice(threads=3, worker="engine"), FOUR, {BIND: "5", QUEUES: "block"}, "why")
    assert text == (
        f"Tuned: {BIND}=5, stock kernels, huge pages with exits only, {QUEUES}=block, "
        "worker in the engine's process (why)"
    )
    assert "threads as vLLM gives them" in line(AS_VLLM, FOUR, {}, "")
    assert "queues" not in line(Choice(worker="engine"), FOUR, {}, ""), "there are none"


def test_the_default_has_all_cores_and_no_queues(zentorch):
    assert variables(DEFAULT, FOUR) == {
        BIND: ",".join(map(str, FOUR.cores)),
        HUGE_PAGES: "1",
        WORKER: "engine",
        OWN_PROCESS: "0",
    }
    assert variables(AS_VLLM, SHARED) == {}


def test_all_cores_are_never_more_than_there_is_time_for(zentorch):
    little = CpuLimits(num_cpus=4, cores=(0, 1, 2, 3), quota=0.5)
    assert variables(ALL_CORES, little)["OMP_NUM_THREADS"] == "1"
    edited = Choice(threads=99)  # in a file that is kept
    assert variables(edited, SHARED)["OMP_NUM_THREADS"] == "2" and "4 of 4 threads" in line(edited, FOUR, {}, "")


# ---- by hand


def parsed(*flags: str) -> Namespace:
    parser = ArgumentParser()
    add_tuning(parser)
    return parser.parse_args(flags)


def test_what_nobody_says_is_tuned(monkeypatch):
    monkeypatch.delenv(TUNING_VARIABLE)
    tuning = tuning_from(parsed())
    assert tuning.tuning == "auto" and tuning.parts == {} and tuning.flags() == ()
    monkeypatch.setenv(TUNING_VARIABLE, "off")
    assert tuning_from(parsed()).tuning == "off" and tuning_from().tuning == "off"
    assert tuning_from(parsed("--tuning", "auto")).tuning == "auto", "a flag is nearer than a variable"


def test_each_part_is_set_by_hand_and_told_on():
    tuning = tuning_from(parsed("--tuning", "off", "--threads", "2", "--queues", "block", "--worker", "auto"))
    assert tuning.parts == {"threads": 2, "queues": "block"}
    flags = dict(zip(tuning.flags()[::2], tuning.flags()[1::2], strict=True))
    assert flags == {"--tuning": "off", "--threads": "2", "--queues": "block", "--worker": "auto"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tuning", "yes"], "--tuning: must be auto, off or again, got 'yes'"),
        (["--threads", "0"], "--threads: must be auto or a whole number of at least 1, got '0'"),
        (["--threads", "many"], "--threads: must be auto or a whole number of at least 1, got 'many'"),
        (["--kernels", "onednn"], "--kernels: must be auto, stock or zentorch, got 'onednn'"),
        (["--queues", "fast"], "--queues: must be auto, spin or block, got 'fast'"),
        (["--worker", "thread"], "--worker: must be auto, process or engine, got 'thread'"),
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_one_line_that_says_what_is_allowed(flags, says, capsys):
    assert main(["serve", *flags]) == 2
    assert capsys.readouterr().err == f"apparate-llm: error: {says}\n"


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv(TUNING_VARIABLE, "on")
    with pytest.raises(ConfigError, match=f"{TUNING_VARIABLE}: must be auto, off or again, got 'on'"):
        tuning_from(parsed())


@pytest.mark.parametrize("value", ["on", "again"])
@pytest.mark.parametrize("command", [["prepare", "--out"], ["ramps", "verify"]], ids=" ".join)
def test_prepare_says_at_its_start_what_its_servers_cannot_do(value, command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(TUNING_VARIABLE, value)
    assert main([*command, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == f"apparate-llm: error: {TUNING_VARIABLE}: must be auto or off, got '{value}'\n"


@pytest.mark.parametrize(
    ("parts", "flags", "given", "says"),
    [
        ({"threads": 5}, [], {}, r"--threads: at most 4 here \(4 cores\), got 5"),
        ({"threads": 2}, [], {BIND: "0"}, f"--threads and {BIND}=0 both say it"),
        ({"threads": 2}, [], {RESERVED: "0"}, f"--threads and {RESERVED}=0 both say it"),
        ({"threads": 2}, ["--tensor-parallel-size", "2"], {}, "--threads: vLLM binds the threads of several workers"),
        ({"worker": "engine"}, ["--data-parallel-size=2"], {}, "--worker engine: one worker is wanted"),
        ({"worker": "engine"}, ["--distributed-executor-backend", "mp"], {}, "contradicts --distributed-exec.* mp"),
        ({"worker": "process"}, [], {OWN_PROCESS: "0"}, f"--worker and {OWN_PROCESS}=0 both say it"),
        ({"queues": "spin"}, [], {QUEUES: "block"}, f"--queues spin contradicts {QUEUES}=block"),
        ({"kernels": "stock"}, [], {KERNELS: "zentorch"}, f"--kernels stock contradicts {KERNELS}=zentorch"),
        ({"worker": "process"}, [], {WORKER: "engine"}, f"--worker process contradicts {WORKER}=engine"),
        ({}, [], {QUEUES: "fast"}, f"{QUEUES}: must be spin or block, got 'fast'"),
        ({}, [], {HUGE_PAGES: "yes"}, f"{HUGE_PAGES}: must be 0 or 1, got 'yes'"),
        ({"kernels": "zentorch"}, [], {}, "--kernels zentorch: the package zentorch is not installed"),
    ],
    ids=str,
)
def test_what_this_machine_does_not_allow_is_said(parts, flags, given, says, zentorch):
    with pytest.raises(ConfigError, match=says):
        options.check_tuning(Tuning.model_validate(parts), FOUR, flags, given, parse_config({}))


def test_pages_by_hand_and_by_a_variable_must_agree():
    config = parse_config({"huge_pages": False})
    options.check_tuning(Tuning(), FOUR, [], {HUGE_PAGES: "0"}, config)
    with pytest.raises(ConfigError, match=f"--huge-pages false contradicts {HUGE_PAGES}=1"):
        options.check_tuning(Tuning(), FOUR, [], {HUGE_PAGES: "1"}, config)


def test_a_vllm_for_gpus_has_no_such_parts(monkeypatch, tmp_path):
    for module in (options, chosen):
        monkeypatch.setattr(module, "is_cpu_build", lambda: False)
    assert choose(Tuning(), tmp_path).environment == {}
    with pytest.raises(ConfigError, match="--queues is about vLLM's CPU backend"):
        choose(Tuning(queues="block"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ([], 1),
        (["-tp", "2"], 2),
        (["--tensor-par", "2", "-dp=3"], 6),
        (["--pipeline_parallel_size=2"], 2),
        (["-tp", "two"], 1),
    ],
    ids=str,
)
def test_workers_are_counted_by_vllms_flags_in_any_spelling(flags, ranks):
    assert num_ranks(normalised(flags)) == ranks
