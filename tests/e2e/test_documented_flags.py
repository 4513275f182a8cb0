"""vLLM's own server, started with the flags that docs/reference.md has."""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import httpx

from apparate_llm.config import parse_config
from apparate_llm.engine.vllm_args import vllm_args
from apparate_llm.eval.servers import free_port
from tests.e2e.conftest import TINY_FLAGS, running

KEYS = {"mine": "sk-mine", "theirs": "sk-theirs"}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
BOSS = hashlib.sha256(b"sk-boss").hexdigest()


def documented_command(model: Path, ramps: Path, port: int) -> list[str]:
    tenants = {
        "mine": {"api_keys_sha256": [DIGESTS["mine"]]},
        "theirs": {"early_exit": 0, "api_keys_sha256": [DIGESTS["theirs"]]},
    }
    options = {"ramps": str(ramps), "policy": "static", "tenants": tenants}
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    for name, value in vllm_args(parse_config(options), "LlamaForCausalLM").items():
        command += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else value]
    return [*command, *TINY_FLAGS, "--host", "127.0.0.1", "--port", str(port), "--api-key", *KEYS.values()]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask_for_40(base_url: str, model: Path, key: str, **xargs) -> httpx.Response:
    body = {"model": str(model), "prompt": "w1 w2", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    asked = body | {"vllm_xargs": xargs}
    return httpx.post(f"{base_url}/v1/completions", json=asked, headers=bearer(key), timeout=60)


def status_for(base_url: str, key: str) -> httpx.Response:
    return httpx.get(f"{base_url}/early_exit/status", headers=bearer(key))


def change_with(base_url: str, key: str) -> int:
    """The status code."""
    headers = bearer(key) | {"X-Forwarded-For": "127.0.0.1"}
    return httpx.patch(f"{base_url}/early_exit/config", json={"accuracy_bound": 0.02}, headers=headers).status_code


def test_plain_vllm_with_the_documented_flags_serves_exits_too(tiny_llama, lens_ramps, tmp_path):
    """No hidden dependence on our command: vLLM's own server module and flags only; here with API keys, each of
    its own tenant."""
    port = free_port()
    command = documented_command(tiny_llama, lens_ramps(depth=4), port)
    environment = {"VLLM_PLUGINS": "apparate", "APPARATE_ADMIN_KEY": "sk-boss", "VLLM_LOGGING_LEVEL": "INFO"}
    with running(command, port, tmp_path / "log", **environment) as base_url:
        ask, status = partial(ask_for_40, base_url, tiny_llama), partial(status_for, base_url)
        assert ask("sk-mine").json()["usage"]["completion_tokens"] == 40
        accepted = status("sk-boss").json()["counts"]["accepted"]
        assert accepted > 20
        assert ask("sk-theirs").json()["usage"]["completion_tokens"] == 40
        counted = status("sk-boss").json()
        assert counted["counts"]["accepted"] == accepted
        assert counted["tenants"]["mine"]["emitted"] == counted["tenants"]["theirs"]["emitted"] == 40
        assert not any(key in json.dumps(counted) for key in (*KEYS.values(), DIGESTS["mine"]))
        seen = status("sk-theirs").json()
        assert list(seen["tenants"]) == ["theirs"] and seen["counts"]["emitted"] == 40
        assert "mine" not in json.dumps(seen)
        refused = ask("sk-theirs", early_exit_tenant="mine")
        assert refused.status_code == 400 and "requests with this API key are theirs" in refused.text
        assert ask("sk-none").status_code == status("sk-none").status_code == 401
        assert httpx.get(f"{base_url}/early_exit/events").status_code == 401
        assert httpx.patch(f"{base_url}/early_exit/config", content=b"{").status_code == 401
        assert httpx.get(f"{base_url}/early_exit/").status_code == 200  # it asks for the key itself
        changed = [change_with(base_url, key) for key in ("sk-mine", "sk-none", "sk-boss")]
        assert changed == [403, 401, 200]
    log = (tmp_path / "log").read_text()
    assert f"Options changed by admin key {BOSS[:8]} from 127.0.0.1: accuracy_bound 0.01 -> 0.02" in log
    assert "non-default args" in log  # with our tenants in them
    assert not [secret for secret in ("sk-", BOSS, *DIGESTS.values()) if secret in log]
