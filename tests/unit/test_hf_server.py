import asyncio
import json
import shutil
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from apparate_llm.eval.hf_server import Detokenizer, Generator, create_app, main
from apparate_llm.sse import event_data
from tests.tiny import MODEL_TYPES

MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
WITH_USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def serving(generator):
    server = uvicorn.Server(uvicorn.Config(create_app(generator), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def generator(tiny_llama):
    return Generator(tiny_llama, dtype="float32")


@pytest.fixture(scope="module")
def client(generator):
    with serving(generator) as client:
        yield client


def direct(model_dir, max_tokens):
    """What `generate` itself answers: tokens, text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, max_new_tokens=max_tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


def body(max_tokens=20, **others):
    return {"model": "any", "messages": MESSAGES, "temperature": 0, "max_tokens": max_tokens} | others


def ask(client, *args, **kwargs):
    return client.post("/v1/chat/completions", json=body(*args, **kwargs)).raise_for_status().json()


def stream(client, *args, **kwargs):
    """The chunks of a stream, which must end as it should."""
    with client.stream("POST", "/v1/chat/completions", json=body(*args, stream=True, **kwargs)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = list(event_data(response.iter_bytes()))
    assert chunks.pop() == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(chunks):
    return "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"])


@contextmanager
def at_each_pass(generator, call):
    hook = generator.model.register_forward_pre_hook(call, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def end_token_at(model_dir, copy, position):
    """A copy of the model whose end token is the one it says at a position; returns how many tokens come."""
    ids, _ = direct(model_dir, position + 1)
    shutil.copytree(model_dir, copy)
    settings = copy / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [2, ids[-1]]}))
    return ids.index(ids[-1]) + 1


def test_the_server_names_its_model(client, tiny_llama):
    assert client.get("/health").status_code == 200
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [tiny_llama.name]


def test_streamed_whole_and_direct_answers_are_the_same(client, tiny_llama):
    ids, text = direct(tiny_llama, 20)
    whole, chunks = ask(client), stream(client)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == "length"
    assert whole["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26}
    assert text_of(chunks) == text and len(chunks) == 1 + len(ids)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 20 + ["length"]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_counts_every_token_as_it_comes(client):
    chunks = stream(client, stream_options=WITH_USAGE)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(21), 20]
    assert all(chunk["usage"]["total_tokens"] == chunk["usage"]["completion_tokens"] + 6 for chunk in chunks)
    assert chunks[-1]["choices"] == []
    last_only = stream(client, stream_options={"include_usage": True})
    assert [chunk for chunk in last_only if "usage" in chunk] == last_only[-1:]


@pytest.mark.parametrize("early_exit", [None, 2])
def test_an_end_token_counts_and_ends_the_answer_unless_ignored(tiny_llama, tmp_path, early_exit):
    num_tokens = end_token_at(tiny_llama, tmp_path / "model", 7)
    with serving(Generator(tmp_path / "model", dtype="float32", early_exit=early_exit)) as client:
        done = ask(client)
        assert done["usage"]["completion_tokens"] == num_tokens and done["choices"][0]["finish_reason"] == "stop"
        assert text_of(stream(client)) == done["choices"][0]["message"]["content"] == direct(tmp_path / "model", 20)[1]

        whole, chunks = ask(client, ignore_eos=True), stream(client, ignore_eos=True, stream_options=WITH_USAGE)
        assert whole["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == 20
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert text_of(chunks) == whole["choices"][0]["message"]["content"] == direct(tiny_llama, 20)[1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_early_exits_change_no_token(tiny_models, model_type):
    ids, text = direct(tiny_models[model_type], 40)
    for early_exit in (1, 3):
        with serving(Generator(tiny_models[model_type], dtype="float32", early_exit=early_exit)) as client:
            chunks = stream(client, 40, stream_options=WITH_USAGE)
            assert text_of(chunks) == text and chunks[-1]["usage"]["completion_tokens"] == len(ids)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts) and len(counts) <= len(ids) + 2


def test_a_pass_that_accepts_several_tokens_is_one_chunk(tiny_llama, tmp_path):
    # The last block adds nothing to the embedding it gets: three blocks say what four do.
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for part in (model.model.layers[-1].self_attn.o_proj, model.model.layers[-1].mlp.down_proj):
            part.weight.zero_()
        model.lm_head.weight.mul_(20)  # surer than the threshold a draft goes on with
    shutil.copytree(tiny_llama, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with serving(Generator(tmp_path / "model", dtype="float32")) as client:
        text = ask(client, 64, ignore_eos=True)["choices"][0]["message"]["content"]
    with serving(Generator(tmp_path / "model", dtype="float32", early_exit=3)) as client:
        chunks = stream(client, 64, ignore_eos=True, stream_options=WITH_USAGE)
    assert text_of(chunks) == text
    assert len(chunks) < 20 and chunks[-1]["usage"]["completion_tokens"] == 64


def test_requests_are_served_one_after_the_other(generator, client):
    lengths, answers = [], {}

    def slow_pass(_, __, inputs):
        lengths.append(inputs["input_ids"].shape[1])
        time.sleep(0.01)

    def run(words):
        answers[words] = stream(client, 10, messages=[{"role": "user", "content": words}])

    with at_each_pass(generator, slow_pass):
        threads = [threading.Thread(target=run, args=(words,)) for words in ("w1 w2", "w3")]
        threads[0].start()
        while not lengths:
            time.sleep(0.001)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert lengths == [4, *[1] * 9, 3, *[1] * 9]  # a prompt and nine tokens, then the other's
    assert [len(chunks) for chunks in answers.values()] == [11, 11]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_makes_room_for_the_next(generator, client, streamed):
    passes = []

    def slow_pass(*_):
        passes.append(1)
        time.sleep(0.01)

    async def leave():
        long = body(400, stream=streamed, ignore_eos=True)
        async with httpx.AsyncClient(base_url=client.base_url) as leaving:
            # One that runs and one that waits.
            requests = [asyncio.create_task(leaving.post("/v1/chat/completions", json=long)) for _ in range(2)]
            while len(passes) < 5:
                await asyncio.sleep(0.01)
            for request in requests:
                request.cancel()

    with at_each_pass(generator, slow_pass):
        asyncio.run(leave())
        assert ask(client, 5)["usage"]["completion_tokens"] == 5
    assert len(passes) < 200


@pytest.mark.parametrize("early_exit", [None, 2])
def test_the_server_goes_on_after_an_error_in_the_model(tiny_llama, early_exit):
    generator = Generator(tiny_llama, dtype="float32", early_exit=early_exit)
    passes = iter(range(1000))

    def fail_late(*_):
        if next(passes) >= 8:
            raise RuntimeError("boom")

    with serving(generator) as client:
        with at_each_pass(generator, fail_late):
            *before, last = stream(client)
            assert last["error"]["message"] == "boom" and len(before) > 1
            failed = client.post("/v1/chat/completions", json=body())
            assert failed.status_code == 500 and failed.json()["error"]["message"] == "boom"
        assert ask(client)["choices"][0]["message"]["content"] == direct(tiny_llama, 20)[1]


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"temperature": 0.7}, 400, "temperature: got 0.7, allowed: 0"),
        ({"max_tokens": 507}, 400, "max_tokens: got 507, allowed: 506 after this prompt"),
        ({"messages": [{"role": "user", "content": "w1 " * 600}], "max_tokens": None}, 400, "allowed: 0 after"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user"}]}, 422, "content"),
        ({"max_tokens": 0}, 422, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(client, change, status, message):
    refused = client.post("/v1/chat/completions", json=body() | change)
    assert refused.status_code == status and message in refused.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "the chat template refuses (Roles must alternate)"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses (can only concatenate str"),
        (None, "the chat template refuses (Cannot use chat template"),
    ],
)
def test_messages_that_the_template_refuses_are_a_callers_fault(generator, client, monkeypatch, template, reason):
    monkeypatch.setattr(generator.tokenizer, "chat_template", template)
    refused = client.post("/v1/chat/completions", json=body())
    assert refused.status_code == 400 and reason in refused.json()["error"]["message"]


def test_only_messages_are_needed_and_unknown_keys_do_no_harm(client):
    bare = {"messages": MESSAGES, "ignore_eos": True, "stream_options": None, "cat": 1}
    assert client.post("/v1/chat/completions", json=bare).json()["usage"]["total_tokens"] == 512
    assert ask(client, None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_text_never_ends_inside_a_character():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé 🙂b")
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([token], is_last=False) for token in ids]
    assert pieces == ["a", "", "é", " ", "", "", "", "🙂", "b"]
    assert detokenizer.add(ids[1:2], is_last=True) == "\ufffd"  # nothing is kept for ever


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--early-exit", "4"], "--early-exit: got 4, allowed: 1 to 3"),
        (["--early-exit", "0"], "--early-exit: got 0, allowed: 1 to 3"),
        (["--model", "/nowhere"], "--model: got /nowhere, allowed: a folder with a model"),
        (["--port", "0"], "must be a whole number of at least 1, got '0'"),
        (["--port", "65536"], "cannot listen on port 65536: a port is 0 to 65535"),
    ],
)
def test_a_bad_start_is_one_line_and_exit_code_2(tiny_llama, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tiny_llama), *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_port_in_use_is_told_before_the_model_is_read(tiny_llama, client, capsys):
    port = client.base_url.port
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tiny_llama), "--port", str(port)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
