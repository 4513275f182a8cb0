"""What the code promises about itself: walls, arrows, light imports, collected tests, types that see everything."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("api", "eval", "patches")  # inside the package they are links
SOURCES = {"apparate_llm": ROOT / "apparate_llm", **{f"apparate_llm.{n}": ROOT / n for n in LINKED}}
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]

# From the bottom up: what stands in a layer imports from its own and from those above it in this list, never below.
LAYERS = (
    ("core", "config", "renamed", "files", "sse", "argmax", "drawing", "lifeline", "naming"),
    (
        "redact",
        "address",
        "admin",
        "coverage",
        "vllm_flags",
        "machine",
        "launch",
        "flags",
        "progress",
        "log_watch",
        "quiet_log",
    ),
    ("host",),
    ("ramps", "patches"),
    ("controller", "models"),
    ("exits",),
    ("engine",),
    (
        "api",
        "plugin",
        "sealed",
        "gguf_model",
        "default_model",
        "hub",
        "named_model",
        "w8a8",
        "preflight",
        "doctor",
        "replay",
        "chat",
        "serve_lines",
        "serve",
    ),
    ("eval",),
    ("prepare", "tune", "demo", "agreement", "quantize"),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

KNOW_VLLM = ("apparate_llm.engine.", "apparate_llm.models.", "apparate_llm.patches.", "apparate_llm.api.")
# What two modules know of vLLM's model runner, and no other.
PORT = {"apparate_llm.engine.runner", "apparate_llm.engine.batch"}
INSIDE_RUNNER = {"input_batch", "query_start_loc", "attn_groups"}


def modules() -> dict[str, Path]:
    by_name = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            by_name[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return by_name


@cache
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node))


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported, and those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def imports_vllm(source: str) -> bool:
    return any(name.split(".")[0] == "vllm" for node in at_import(ast.parse(source)) for name in imported(node))


def touches_runner(source: str) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr in INSIDE_RUNNER for node in ast.walk(ast.parse(source)))


def place(name: str) -> str:
    """The package, or module beside the packages, that a module is of."""
    return name.split(".")[1]


def arrows() -> set[tuple[str, str]]:
    """(module, module that it imports), within the package."""
    by_name = modules()
    return {(name, other) for name, path in by_name.items() for other in imports_of(path) & by_name.keys() - {name}}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Names of one, the first one also last; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if cycle := visit(other, [*trail, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def graph_of(pairs: set[tuple[str, str]]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, other in pairs:
        graph.setdefault(name, set()).add(other)
    return graph


def test_modules_have_no_cycles():
    assert cycle_in(graph_of(arrows())) == []


def test_packages_have_no_cycles():
    pairs = {(place(name), place(other)) for name, other in arrows() if "apparate_llm" not in (name, other)}
    assert cycle_in(graph_of({(a, b) for a, b in pairs if a != b})) == []


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}}) == []


def test_arrows_point_down():
    upward = []
    for name, other in arrows():
        if "apparate_llm" not in (name, other):
            for part in (place(name), place(other)):
                assert part in LEVELS, f"{part} has no place in LAYERS yet"
            if LEVELS[place(other)] > LEVELS[place(name)]:
                upward.append(f"{name} imports {other}")
    assert upward == []
    assert not any(other.startswith("apparate_llm") for other in imports_of(ROOT / "apparate_llm" / "core.py"))


def test_vllm_is_imported_only_where_it_may_be():
    importers = {name for name, path in modules().items() if imports_vllm(path.read_text())}
    assert {name for name in importers if not name.startswith(KNOW_VLLM)} == set()


@pytest.mark.parametrize(
    "planted",
    [
        "import vllm",
        "import os, vllm.config as settings",
        "from vllm import LLM",
        "try:\n    from vllm.v1 import outputs\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    from vllm.config import VllmConfig",
        "class A:\n    import vllm",
    ],
)
def test_a_planted_import_of_vllm_is_seen(planted):
    assert imports_vllm("import os\n" + planted)


def test_an_import_of_vllm_that_waits_for_a_call_is_none_of_the_module():
    assert not imports_vllm("import vllmish\n\ndef start():\n    import vllm\n    return vllm")


def test_the_inside_of_the_model_runner_is_known_where_it_may_be():
    assert {name for name, path in modules().items() if touches_runner(path.read_text())} == PORT
    outside = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    assert not [path.name for path in outside if touches_runner(path.read_text())]


def test_a_planted_look_into_the_model_runner_is_seen():
    assert touches_runner("def f(runner):\n    return runner.input_batch.req_ids")
    assert not touches_runner("def f(batch):\n    input_batch = batch.ids\n    return input_batch")


def test_importing_us_and_parsing_flags_is_light():
    code = (
        "import sys, apparate_llm, apparate_llm.cli; apparate_llm.cli.build_parser();"
        "print([m for m in ('vllm', 'torch', 'fastapi', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_file_with_tests_is_collected():
    for path in (ROOT / "tests").rglob("*.py"):
        if "\ndef test_" in path.read_text():
            assert path.name.startswith("test_"), path


def test_no_module_is_left_out_of_the_package():
    packages = set(TOOLS["setuptools"]["packages"])
    assert packages == {name for name, path in modules().items() if path.name == "__init__.py"}


def test_a_mistake_across_a_link_is_a_type_error(tmp_path):
    """With the project's own settings, as `make test` runs mypy."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from apparate_llm.eval.client import PlannedRequest\n"
        "from apparate_llm.patches.guard import Patch\n"
        'broken: int = PlannedRequest("not an int", nonsense=3)\n'
        'Patch(file=3, nonsense="x")\n'
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(planted)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    for what in (
        'planted.py:3: error: Unexpected keyword argument "nonsense" for "PlannedRequest"',
        "planted.py:3: error: Incompatible types in assignment",
        'planted.py:4: error: Unexpected keyword argument "nonsense" for "Patch"',
    ):
        assert what in done.stdout


def test_types_are_strict_everywhere():
    assert TOOLS["mypy"]["strict"] and TOOLS["mypy"]["packages"] == ["apparate_llm", "scripts", "tests"]
    assert all((ROOT / "apparate_llm" / name).resolve() == ROOT / name for name in LINKED)
    relaxed = {
        module
        for override in TOOLS["mypy"]["overrides"]
        if override.keys() - {"module", "ignore_missing_imports"}
        for module in override["module"]
    }
    assert not relaxed


def test_the_gate_looks_before_it_tests():
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = ("ruff format --check", "ruff check", "/mypy", "-m pytest")
    at = [done.stdout.rindex(step) for step in steps]
    assert at == sorted(at), done.stdout
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
