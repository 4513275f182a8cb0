"""A small OpenAI-compatible server around `generate` of Hugging Face transformers, for the evaluation to compare with.

`python -m apparate_llm.eval.hf_server --model DIR --port N` decodes greedily. With `--early-exit K` the first K blocks
draft and all blocks check (`assistant_early_exit`). One request at a time, in order of arrival.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AliasPath, BaseModel, Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from apparate_llm.flags import OneLineParser, positive
from apparate_llm.launch import port_problem
from apparate_llm.naming import model_name

Step = tuple[str, int, str | None]  # text, tokens of the answer so far (an end token is one), finish reason
Chunk = dict[str, object]  # JSON


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    """Other keys are ignored, as OpenAI servers do."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    stream: bool | None = None
    include_usage: bool = Field(False, validation_alias=AliasPath("stream_options", "include_usage"))
    continuous_usage_stats: bool = Field(False, validation_alias=AliasPath("stream_options", "continuous_usage_stats"))
    ignore_eos: bool = False


class Detokenizer:
    """Text of a growing list of tokens. Keeps back what ends in the middle of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.decode: Callable[[list[int]], str] = partial(
            tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.ids: list[int] = []
        self.start = self.sent = 0  # the tokens between are sent, but decoded again: some tokenizers join with blanks

    def add(self, ids: list[int], *, is_last: bool) -> str:
        self.ids += ids
        known, text = self.decode(self.ids[self.start : self.sent]), self.decode(self.ids[self.start :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not is_last):
            return ""
        self.start, self.sent = self.sent, len(self.ids)
        return text[len(known) :]


class Answer(BaseStreamer, StoppingCriteria):
    """One generation: what it is to do, when to stop, and its tokens on their way from the worker to the event loop."""

    def __init__(self, prompt_ids: list[int], *, max_tokens: int, eos_ids: list[int]) -> None:
        self.prompt_ids, self.max_tokens, self.eos_ids = prompt_ids, max_tokens, eos_ids
        self.stopped = threading.Event()
        self.watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:  # the first call brings the prompt
            self.push(value.flatten().tolist())
        self._saw_prompt = True

    def end(self) -> None:
        """Left to the worker, which also knows of errors."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> Any:
        return torch.full((input_ids.shape[0],), self.stopped.is_set())

    def push(self, item: list[int] | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def stop_on_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.stopped.set()
        self.push(None)

    async def steps(self, tokenizer: Any) -> AsyncIterator[Step]:
        """One for each `put`. Raises what `generate` raised."""
        detokenizer = Detokenizer(tokenizer)
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                num_tokens = len(detokenizer.ids) + len(item)
                finish = "stop" if item[-1] in self.eos_ids else "length" if num_tokens >= self.max_tokens else None
                yield detokenizer.add(item, is_last=finish is not None), num_tokens, finish
        finally:
            self.stopped.set()

    def usage(self, num_tokens: int) -> dict[str, int]:
        num_prompt = len(self.prompt_ids)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}


class Generator:
    """The model and the one thread that runs it."""

    def __init__(self, model_dir: Path, *, dtype: str = "bfloat16", early_exit: int | None = None) -> None:
        self.name = model_name(model_dir.resolve())
        self.early_exit = early_exit
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self.model.eval()
        self.num_layers: int = self.model.config.num_hidden_layers
        self.max_model_len: int = self.model.config.max_position_embeddings
        config = self.model.generation_config
        eos = config.eos_token_id
        self.eos_ids: list[int] = eos if isinstance(eos, list) else [] if eos is None else [eos]
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = config.max_length = None
        # End tokens are up to each request. A padding token is not needed, and where it is also the end token, drafting
        # without end tokens would mask those of the prompt.
        config.eos_token_id = config.pad_token_id = None
        self.worker = ThreadPoolExecutor(1)

    def prepare(self, body: ChatRequest) -> Answer:
        """Raises ValueError for what this server cannot do."""
        if body.temperature:
            raise ValueError(f"temperature: got {body.temperature}, allowed: 0 (this server decodes greedily)")
        prompt_ids = self._prompt_ids(body.model_dump()["messages"])
        free_tokens = self.max_model_len - len(prompt_ids)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(free_tokens, 1)
        if max_tokens > free_tokens:
            raise ValueError(f"max_tokens: got {max_tokens}, allowed: {max(free_tokens, 0)} after this prompt")
        return Answer(prompt_ids, max_tokens=max_tokens, eos_ids=[] if body.ignore_eos else self.eos_ids)

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # each template refuses in its own way, some by a TypeError
            raise ValueError(f"messages: the chat template refuses ({error})") from None
        return ids

    def generate(self, answer: Answer) -> None:
        """For the worker thread."""
        if answer.stopped.is_set():
            return
        prompt = torch.tensor([answer.prompt_ids])  # [1, num_prompt_tokens]
        try:
            with torch.inference_mode():
                self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=answer.max_tokens,
                    # None ignores them as vLLM does: they come and it goes on. `min_new_tokens` would forbid them.
                    eos_token_id=answer.eos_ids or None,
                    stopping_criteria=StoppingCriteriaList([answer]),
                    streamer=answer,
                    assistant_early_exit=self.early_exit,
                )
            answer.push(None)
        except Exception as error:
            self.model.config.num_hidden_layers = self.num_layers  # an error while drafting leaves it at K
            answer.push(error)


async def events(answer: Answer, steps: AsyncIterator[Step], head: Chunk, body: ChatRequest) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(num_tokens: int, choices: list[Chunk], *, with_usage: bool = body.continuous_usage_stats) -> str:
        chunk = head | {"object": "chat.completion.chunk", "choices": choices}
        return f"data: {json.dumps(chunk | {'usage': answer.usage(num_tokens)} if with_usage else chunk)}\n\n"

    num_tokens = 0
    yield event(0, [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    try:
        async for text, num_tokens, finish in steps:
            yield event(num_tokens, [{"index": 0, "delta": {"content": text}, "finish_reason": finish}])
        if body.include_usage:
            yield event(num_tokens, [], with_usage=True)
    except Exception as error:
        yield f"data: {json.dumps(error_body(error, 500))}\n\n"
    yield "data: [DONE]\n\n"


async def whole(answer: Answer, steps: AsyncIterator[Step], head: Chunk) -> Response:
    """The answer in one piece."""
    try:
        done = [step async for step in steps]
    except Exception as error:
        return JSONResponse(error_body(error, 500), status_code=500)
    _, num_tokens, finish = done[-1] if done else ("", 0, None)
    message = {"role": "assistant", "content": "".join(text for text, _, _ in done)}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": answer.usage(num_tokens)})


def error_body(error: Exception, code: int) -> dict[str, object]:
    return {"error": {"message": str(error), "type": type(error).__name__, "code": code}}


def create_app(generator: Generator) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> None:
        """200: the port opens when the model is loaded."""

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [{"id": generator.name, "object": "model", "owned_by": "huggingface"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        try:
            answer = generator.prepare(body)
        except ValueError as error:
            return JSONResponse(error_body(error, 400), status_code=400)
        answer.watcher = asyncio.create_task(answer.stop_on_disconnect(request))
        generator.worker.submit(generator.generate, answer)
        steps = answer.steps(generator.tokenizer)
        head = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": generator.name}
        if not body.stream:
            return await whole(answer, steps, head)
        return StreamingResponse(events(answer, steps, head, body), media_type="text/event-stream")

    return app


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="hf_server", description="Hugging Face `generate` behind an OpenAI-compatible API.")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=positive, default=8000)
    parser.add_argument("--early-exit", type=int, metavar="K", help="the first K blocks draft (assistant_early_exit)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model: got {args.model}, allowed: a folder with a model (config.json)")
    deepest = AutoConfig.from_pretrained(args.model).num_hidden_layers - 1
    if args.early_exit is not None and not 1 <= args.early_exit <= deepest:
        parser.error(f"--early-exit: got {args.early_exit}, allowed: 1 to {deepest}")
    if problem := port_problem(args.host, args.port):
        parser.error(f"--port: {problem}")
    app = create_app(Generator(args.model, dtype=args.dtype, early_exit=args.early_exit))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
