"""What the code promises about itself: arrows, light imports, collected tests."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"apparate_llm": ROOT / "apparate_llm", **{f"apparate_llm.{n}": ROOT / n for n in ("api", "eval", "patches")}}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_modules_have_no_cycles():
    found = modules()
    graph = {name: imports_of(path) & found.keys() - {name} for name, path in found.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"cycle: {' -> '.join((*trail, name))}"
        if name not in state:
            state[name] = 1
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            state[name] = 2

    for name in sorted(graph):
        visit(name, ())


def test_arrows_point_down():
    """core < controller, ramps < models < engine < api, eval, preparation, commands."""
    rank = {
        "best": 0,
        "core": 0,
        "config": 0,
        "coverage": 0,
        "files": 0,
        "lifeline": 0,
        "machine": 0,
        "sse": 0,
        "controller": 1,
        "ramps": 1,
        "patches": 1,
        "models": 2,
        "engine": 3,
    }

    def level(name: str) -> int:
        parts = name.split(".")
        return rank.get(parts[1], 4) if len(parts) > 1 else 0

    for name, path in modules().items():
        for other in imports_of(path):
            if other.startswith("apparate_llm."):
                assert level(other) <= level(name), f"{name} imports {other}"
    assert not any(other.startswith("apparate_llm") for other in imports_of(ROOT / "apparate_llm" / "core.py"))


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
    import tomllib

    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert packages == {name for name, path in modules().items() if path.name == "__init__.py"}
