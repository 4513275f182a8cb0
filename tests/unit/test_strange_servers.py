"""Servers that answer by HTTP and are none of OpenAI's, or none with exits: told in one line, or a failed request."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from apparate_llm.cli import main
from apparate_llm.eval.client import PlannedRequest, run_block
from apparate_llm.eval.servers import Server
from apparate_llm.eval.systems import System, prefix_cache_of, systems_of, tells_of_exits
from tests.fake_server import FakeTransport, in_virtual_time

HTML = "<!doctype html><title>All pages are this one</title>"


@contextmanager
def serving(text: str) -> Iterator[str]:
    """Base URL of a server that has this text everywhere, whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("text", [HTML, "[]", "3", "{}", '{"counts": 3}'])
def test_what_is_no_status_is_of_a_server_without_exits(text):
    with serving(text) as url:
        assert not tells_of_exits(url) and prefix_cache_of(url) == "warm"


def test_a_status_with_counts_is_of_one_with_exits_unless_it_is_a_tenants():
    for more, expected in (({}, True), ({"tenant": "a"}, False), ({"class": "a"}, False)):
        with serving(json.dumps({"counts": {"held": 1}, **more})) as url:
            assert tells_of_exits(url) is expected


@pytest.mark.parametrize("text", [HTML, "[]", "{}", '{"data": []}', '{"data": [{}]}', '{"data": 3}'])
def test_a_server_that_names_no_model_is_said_to_be_none(text, tmp_path, capsys):
    with serving(text) as url:
        server = Server(System("other", base_url=url), log=tmp_path / "log", start_timeout_s=1.0)
        with pytest.raises(RuntimeError, match="other is no OpenAI-compatible server: /v1/models says "):
            server.model_name()
        for command in ("chat", "demo"):
            assert main([command, "--url", url]) == 1
            error = capsys.readouterr().err
            assert "is no OpenAI-compatible server: " in error and "Traceback" not in error


CHUNKS = ["hello", "3", "[]", "null", "{}", '{"choices": [{}]}', '{"choices": [{"delta": null}]}', '{"choices": 3}']


@pytest.mark.parametrize("chunk", [*CHUNKS, '{"usage": 3, "choices": []}', '{"usage": {"completion_tokens": "x"}}'])
def test_a_stream_of_other_things_is_a_failed_request(chunk):
    async def stream(body):
        yield f"data: {chunk}\n\n"

    call = run_block(
        "http://fake",
        "m",
        [[{"role": "user", "content": "a"}]],
        [PlannedRequest(0, 9)],
        concurrency=1,
        transport=FakeTransport(stream),
    )
    (done,) = in_virtual_time(call).completions
    assert done.error and done.tpt_ms is None


def test_a_prompt_that_cannot_be_sent_is_a_failed_request():
    asks = [PlannedRequest(0, 9), PlannedRequest(1, 9)]
    messages = [[{"role": "user", "content": text}] for text in ("half \ud83d", "steady")]
    call = run_block("http://fake", "m", messages, asks, concurrency=1, transport=FakeTransport())
    first, second = in_virtual_time(call).completions
    assert first.error.startswith("UnicodeEncodeError: ") and second.error is None


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chat_says_that_a_stream_is_none_of_openais(chunk, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda: "hello")
    with serving(f"data: {chunk}\n\n") as url:
        assert main(["chat", "--url", url, "--model", "m"]) == 1
    error = capsys.readouterr().err
    assert f"{url} is no OpenAI-compatible server: {chunk}" in error and error.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1"])
def test_a_port_that_is_none_is_bad_input(port, tiny_llama, tmp_path, capsys):
    url, out = f"http://localhost:{port}", str(tmp_path / "out")
    for argv in (
        ["chat", "--url", url],
        ["demo", "--url", url],
        ["eval", "tpt", str(tiny_llama), "--out", out, "--systems", "vllm", "--base-url", f"a={url}"],
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "a port is 1 to 65535" in error and error.count("\n") == 1


def test_a_name_that_is_no_files_is_refused_before_anything_starts(tiny_llama, tmp_path, capsys):
    for flag in ("a/b=--policy off", "a" * 101 + "=--policy off"):
        argv = ["eval", "tpt", str(tiny_llama), "--out", str(tmp_path / "out"), "--systems", "vllm", "--system", flag]
        assert main(argv) == 2
        assert "a system's name has no slash and 100 letters at most" in capsys.readouterr().err
    with serving("{}") as url:
        from apparate_llm.eval.systems import ModelChoice

        assert systems_of([], [f"a/b={url}"], ModelChoice(tiny_llama))[0].name == "a/b"  # has no log of ours
