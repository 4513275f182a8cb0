import functools
import json
import re
import time
import uuid
from pathlib import Path

import psutil
import pytest

from apparate_llm.eval import code_check
from apparate_llm.eval.code_check import check_tests, code_in, code_passes

PROMPTS = Path(code_check.__file__).parent / "prompts"
DOUBLE = "def double(x):\n    return 2 * x\n"
IN_NAMESPACES = "import os\nassert os.getpid() == 2"
TESTS = "assert double(4) == 8\n"


passes = functools.partial(code_passes, timeout_s=30.0)  # a busy machine is no failure


@functools.cache
def asserts_of(name: str) -> dict[str, str]:
    """Prompt -> its tests, of those that have any."""
    records = map(json.loads, (PROMPTS / f"{name}.jsonl").read_text().splitlines())
    return {record["prompt"]: record["tests"] for record in records if "tests" in record}


def answers() -> list[tuple[str, bool, str]]:
    """(prompt, is right, answer)"""
    text = (Path(__file__).parent / "code_answers.md").read_text()
    examples = []
    for kind, start, answer in re.findall(r"^## (right|wrong): (.*?)$(.*?)(?=^## |\Z)", text, re.M | re.S):
        (prompt,) = (prompt for prompt in asserts_of("code") if prompt.startswith(start))
        examples.append((prompt, kind == "right", answer))
    return examples


@pytest.fixture(params=["namespaces", "no namespaces"])
def either_way(request, monkeypatch):
    """Also where the kernel refuses namespaces; this flag it refuses everywhere."""
    if request.param == "no namespaces":
        monkeypatch.setattr(code_check, "_NAMESPACES", 1)


@pytest.mark.parametrize(
    "answer",
    [
        DOUBLE,
        f"```python\n{DOUBLE}```",
        f"```\n{DOUBLE}```",
        f"Here you are:\n\n```Python\n{DOUBLE}```\n\nIt doubles a number. Output:\n\n```\n8\n```\n",
        f"```py\n{DOUBLE}",
        f"Sure!\n```python3 title=double.py\n{DOUBLE}\n",
        f"1. A function:\n\n   ```python\n   {DOUBLE.replace('    ', '       ')}   ```\n",
        f"First:\n```bash\npip install x\n```\nthen:\n```python\n{DOUBLE}```",
        f"```\npip install x\n```\nthen:\n```python\n{DOUBLE}```",
        f"```python\n{DOUBLE}```\nWrong would be\n```python\ndef double(x): return x\n```",
        f"````python\r\n{DOUBLE}````",
    ],
)
def test_code_is_found_in_an_answer(answer):
    assert passes(answer, TESTS)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot do that.",
        "```python",
        f"```javascript\n{DOUBLE}```",
        "```python\ndef double(x):\n    return 2 *\n```",
        "```python\ndef double(x):\n",
        f"```python\ndef double(x): return x\n```\n```python\n{DOUBLE}```",
        "def double(x): return x * x",
        "def double(*a): return None",
        f"{DOUBLE}\nx = undefined",
        f"{DOUBLE}\x00",
        f"{DOUBLE}\ud800",
    ],
)
def test_an_answer_without_code_that_works_fails(answer):
    assert not code_passes(answer, TESTS)


def test_which_block_is_the_code():
    assert code_in("no fence") == "no fence"
    assert code_in("```js\n1\n```") is None
    assert code_in("```\n1\n```\n```python\n2\n```") == "2\n"
    assert code_in("```sh\n1\n```\n```\n2\n```\n```\n3\n```") == "2\n"


@pytest.mark.parametrize(
    "end",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys\ndef double(x): sys.exit(0)",
    ],
)
def test_a_program_that_ends_before_its_tests_fails(end):
    assert not code_passes(DOUBLE + end, TESTS)
    assert not code_passes(DOUBLE, f"{end}\n{TESTS}\ndouble(4)")


def test_an_endless_loop_is_stopped_in_time(either_way):
    start = time.monotonic()
    assert not code_passes(DOUBLE + "while True: pass", TESTS, timeout_s=0.7)
    assert not code_passes(DOUBLE + "import time; time.sleep(60)", TESTS, timeout_s=0.7)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "bomb",
    [
        "x = bytearray(3 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 26))",
        "def f(): return f()\nf()",
        "with open('big', 'wb') as file: file.write(bytes(64 << 20))",
    ],
)
def test_memory_stack_and_files_are_limited(bomb):
    assert not code_passes(DOUBLE + bomb, TESTS)


def test_a_program_cannot_have_many_processes():
    if not passes("", IN_NAMESPACES):
        pytest.skip("no namespaces here: the limit is that of all processes of the user")
    code = """
import os, time
def forks():
    for _ in range(100):  # no more: a machine without the limit is not to suffer
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
"""
    refused = """
try:
    forks()
except BlockingIOError:
    pass
else:
    raise AssertionError
"""
    assert passes(code, refused)
    assert not code_passes(code + "forks()", "pass")


def ends(mark: str) -> bool:
    """Whether no process has this text in its command, soon."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(mark in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("then", ["", "while True: pass", "raise ValueError"])
def test_what_a_program_started_ends_with_it(then, either_way):
    mark = f"86399.{uuid.uuid4().int}"
    started = f"import subprocess\nchild = subprocess.Popen(['sleep', '{mark}'])\nassert child.poll() is None\n{then}"
    assert code_passes(DOUBLE + started, TESTS, timeout_s=1 if then else 30) == (not then)
    assert ends(mark)


def test_a_process_that_left_the_group_ends_with_its_namespace():
    if not passes("", IN_NAMESPACES):
        pytest.skip("no namespaces here")
    mark = f"86399.{uuid.uuid4().int}"
    code = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\nwhile True: pass"
    assert not code_passes(code, "pass", timeout_s=1)
    assert ends(mark)


def test_big_output_does_not_block(either_way):
    assert passes(DOUBLE + "import sys\nfor _ in range(300): print('x' * 100_000); print('y', file=sys.stderr)", TESTS)
    assert passes(DOUBLE + "import os; os.system('head -c 3000000 /dev/zero')", TESTS)


def test_a_program_has_no_input_environment_packages_or_files_of_ours(monkeypatch, either_way):
    monkeypatch.setenv("SECRET", "x")
    tests = """
import os, sys
assert "SECRET" not in os.environ and not os.listdir() and "site" not in sys.modules
for name in ("numpy", "apparate_llm"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name)
try:
    input()
except EOFError:
    pass
open("mine", "w").write("x")
assert sys.stdin.read() == ""
"""
    assert passes("", tests)


def test_a_program_has_no_network_where_there_are_namespaces():
    if not passes("", IN_NAMESPACES):
        pytest.skip("no namespaces here")
    tests = """
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
except OSError:
    pass
else:
    raise AssertionError
"""
    assert passes("", tests)


def test_nothing_stays_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(code_check.tempfile, "tempdir", str(tmp_path))
    assert passes("import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')", "assert os.path.exists('a/b')")
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_no_main_module_and_its_threads_are_not_waited_for(either_way):
    code = DOUBLE + "if __name__ == '__main__': raise ValueError\n"
    assert passes(code + "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", TESTS)
    assert passes("from __future__ import annotations\n" + DOUBLE, TESTS)


def test_a_check_finds_the_function_whatever_its_name():
    tests = "def check(f):\n    assert f(4) == 8\nassert any_defined(check)"
    helper = "import math\nfrom os import getcwd\ndef helper(): return helper()\ndef stop(x): raise SystemExit\n"
    assert passes(helper + DOUBLE.replace("double", "twice"), tests)
    assert passes("import functools\n@functools.lru_cache\n" + DOUBLE, tests)
    assert not code_passes(helper, tests)
    assert not code_passes("", "def check(f):\n    pass\nassert any_defined(check)")  # not the tests' own functions


@pytest.mark.parametrize("tests", ["", "\n", "# nothing", "assert (", "assert 1\0"])
def test_tests_that_check_nothing_are_refused(tests):
    with pytest.raises(ValueError, match="tests"):
        code_passes(DOUBLE, tests)
    with pytest.raises(ValueError, match="tests"):
        check_tests(tests)


def test_a_python_that_cannot_start_is_no_failed_answer(monkeypatch):
    code_check._check_python.cache_clear()
    monkeypatch.setattr(code_check.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="/bin/false"):
        code_passes(DOUBLE, TESTS)


@pytest.mark.parametrize(("prompt", "right", "answer"), answers())
def test_tests_of_a_code_prompt_tell_right_from_wrong(prompt, right, answer):
    assert code_passes(answer, asserts_of("code")[prompt], timeout_s=30 if right else 1) == right


@pytest.mark.parametrize("prompt", asserts_of("code"))
def test_a_function_that_does_nothing_fails_the_tests_of_a_code_prompt(prompt):
    mine = [answer for asked, right, answer in answers() if asked == prompt and right]
    assert mine, "no answer in code_answers.md"
    names = re.findall(r"^(?:def|class) (\w+)", code_in(mine[0]) or "", re.M) or re.findall(r"^(\w+) =", mine[0], re.M)
    nothing = "".join(f"def {name}(*args, **kwargs): return None\n" for name in ["f", *names])
    assert not code_passes(nothing, asserts_of("code")[prompt])


@pytest.mark.parametrize("prompt", asserts_of("copy"))
def test_tests_of_a_code_editing_prompt_tell_its_reference_from_its_code(prompt):
    records = map(json.loads, (PROMPTS / "copy.jsonl").read_text().splitlines())
    (reference,) = (record["reference"] for record in records if record["prompt"] == prompt)
    tests = asserts_of("copy")[prompt]
    assert passes(reference, tests) and not code_passes(prompt, tests)


def test_enough_built_in_prompts_have_tests():
    assert len(asserts_of("code")) >= 25 and len(asserts_of("copy")) == 6
    for tests in (*asserts_of("code").values(), *asserts_of("copy").values()):
        check_tests(tests)
