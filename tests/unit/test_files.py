"""Who may read what is written: the umask decides, but for files with prompts, answers or keys."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apparate_llm.eval.client import Completion
from apparate_llm.eval.servers import Server
from apparate_llm.eval.store import Block, BlockKey, Store
from apparate_llm.eval.systems import System
from apparate_llm.files import private_folder, replacing, write_atomically
from apparate_llm.prepare.workspace import Workspace
from apparate_llm.sealed import becoming


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=lambda mask: f"umask {mask:03o}")
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_has_the_mode_that_the_umask_gives_it(mask, tmp_path):
    path = tmp_path / "report.json"
    for _ in range(2):  # new, and in the place of another
        write_atomically(path, b"{}")
        assert mode(path) == 0o666 & ~mask
    write_atomically(path, b"{}", private=True)
    assert mode(path) == 0o600
    with replacing(path, private=True) as temporary:
        assert mode(temporary) == 0o600  # while it is written, too
        temporary.write_bytes(b"secret")
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"] and path.read_bytes() == b"secret"


def test_so_has_a_file_of_tensors_whose_library_writes_one_of_its_own(mask, tmp_path):
    path = tmp_path / "ramps.safetensors"
    with replacing(path) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    assert mode(path) == 0o666 & ~mask
    with replacing(path, private=True) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    assert mode(path) == 0o600


def test_a_model_folder_that_is_made_is_for_those_whom_the_umask_lets(mask, tmp_path):
    with becoming(tmp_path / "model") as work:
        (work / "model.safetensors").touch(mode=0o600)
        (work / "config.json").write_text("{}")
    assert mode(tmp_path / "model") == 0o777 & ~mask
    assert {mode(path) for path in (tmp_path / "model").iterdir()} == {0o666 & ~mask}


def test_only_the_owner_can_read_what_a_preparation_keeps(mask, tmp_path):
    workspace = Workspace(tmp_path / "a" / "out")
    with workspace.locked():
        workspace.write("rows-settings", {"user_prompts": ["my secret"]}, {})
        workspace.path("rows").write_bytes(b"in some way of its own")
    assert mode(workspace.out) == 0o777 & ~mask  # ramps and report are for others
    assert mode(workspace.folder) == 0o700
    assert {mode(path) for path in workspace.folder.iterdir()} == {0o600}


def test_a_work_folder_that_others_can_read_is_closed(tmp_path):
    work = tmp_path / "out" / "work"
    (work / "ramps").mkdir(parents=True)
    (work / "rows-settings.json").write_text('{"inputs": {}, "result": {}}')
    (work / "ramps" / "ramps.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.write_text("another's")
    (work / "link").symlink_to(outside)
    for path in (work, work / "ramps"):
        path.chmod(0o755)
    for path in (*work.glob("*.json"), work / "ramps" / "ramps.json", outside):
        path.chmod(0o644)
    Workspace(tmp_path / "out")
    assert mode(work) == mode(work / "ramps") == 0o700
    assert mode(work / "rows-settings.json") == mode(work / "ramps" / "ramps.json") == 0o600
    assert mode(outside) == 0o644


def test_a_private_folder_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "work").symlink_to(tmp_path / "disk")
    private_folder(tmp_path / "work")
    assert mode(tmp_path / "disk") == 0o700


def test_answers_and_logs_of_an_evaluation_are_the_owners(mask, tmp_path):
    store = Store(tmp_path / "out")
    store.open({}, fresh=False)
    done = Completion(prompt_index=0, started_s=0.0, text="an answer")
    store.add(Block(BlockKey(0, 0, 0, "vllm"), [done], 1.0, None, None, None, None, 1.0, 0.0))
    log = store.logs / "vllm.log"
    with Server(System("vllm", (sys.executable, "-c", "0")), log=log, start_timeout_s=9.0):
        assert mode(log) == 0o600
    assert mode(store.folder / "blocks") == mode(store.logs) == 0o700
    assert {mode(path) for path in (store.folder / "blocks").iterdir()} == {0o600}
    assert mode(store.folder / "plan.json") == 0o666 & ~mask
    for path in (store.folder / "blocks", store.logs):
        path.chmod(0o755)
    Store(store.folder).open({}, fresh=False)
    assert mode(store.folder / "blocks") == mode(store.logs) == 0o700
