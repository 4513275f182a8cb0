"""Where the tokens of each choice of an answer came from, and what each of them adds to its text."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from vllm.logger import init_logger
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

from apparate_llm.api.answers import Caller, ExitReport
from apparate_llm.exits.token_origins import REPORT_KEY, Origin, TokenReport

logger = init_logger("vllm.apparate")
DIVERGENCES = (Origin.HELD_DIVERGENCE, Origin.RELEASED_DIVERGENCE)
TOKENS_AT_ONCE = 256  # made into text before other requests have their turn: a millisecond
Ask = Callable[..., Awaitable[list[dict[str, TokenReport]]]]


@dataclass(slots=True)
class Choice:
    """What the engine sent of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # in parts
    ends_on_stop_token: bool = False

    def take(self, output: CompletionOutput, is_delta: bool) -> None:
        """output: what is new of it, or all of it so far."""
        if is_delta:
            self.token_ids.extend(output.token_ids)
            self.text.append(output.text)
        else:
            self.token_ids.extend(output.token_ids[len(self.token_ids) :])
            self.text = [output.text]
        self.ends_on_stop_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)


def reporting(
    generate: Callable[[SamplingParams], AsyncGenerator[RequestOutput]],
    prompt: object,
    params: SamplingParams,
    caller: Caller,
    *,
    ask: Ask,
    tokenizer: Callable[[], TokenizerLike | None],
) -> AsyncGenerator[RequestOutput]:
    """`generate(params)` as it is; when it has ended, what exits did in it is added to the caller's reports."""
    key = uuid4().hex
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), REPORT_KEY: key}
    first_index = caller.num_prompts * params.n  # of the request's choices, as vLLM counts those of several prompts
    caller.num_prompts += 1

    async def report(choices: dict[int, Choice], prompt_token_ids: list[int] | None) -> None:
        records = {name: own for engine in await ask("early_exit_report", key) for name, own in engine.items()}
        for request_id, record in records.items():
            number = choice_of(request_id, params.n)
            choice = choices.get(number, Choice())
            texts = await texts_of(choice, tokenizer(), params, prompt_token_ids, embeds_of(prompt))
            caller.reports.append({"index": first_index + number, **report_of(record, texts)})

    async def outputs() -> AsyncGenerator[RequestOutput]:
        choices: dict[int, Choice] = {}
        prompt_token_ids: list[int] | None = None
        async with aclosing(generate(params)) as stream:
            async for output in stream:
                prompt_token_ids = prompt_token_ids or output.prompt_token_ids
                for one in output.outputs:
                    choices.setdefault(one.index, Choice()).take(one, params.output_kind is RequestOutputKind.DELTA)
                yield output
        try:
            await report(choices, prompt_token_ids)
        except Exception:  # the answer itself is whole
            logger.exception("No report of a request's exits")

    return outputs()


def choice_of(request_id: str, n: int) -> int:
    """Which choice of its prompt a request of the engine is: with several, vLLM's ParentRequest puts the number before
    the id that they share."""
    return int(request_id.partition("_")[0]) if n > 1 else 0


def report_of(record: TokenReport, texts: list[str]) -> ExitReport:
    """What the client gets of one choice. record: the engine's; a stop string can have cut off tokens it counted."""
    origins, depths = record["origins"][: len(texts)], record["depths"][: len(texts)]
    assert len(origins) == len(texts), f"{len(texts)} tokens sent, {len(origins)} on record"
    tokens = {origin.value: origins.count(origin.value) for origin in Origin}
    divergences = sum(tokens[origin] for origin in DIVERGENCES)
    used = sorted({depth for depth in depths if depth is not None})
    return {
        "tokens": tokens,
        "divergences": divergences,
        "divergences_at_worst": divergences + tokens[Origin.UNVERIFIED],
        "exits_by_depth": {depth: depths.count(depth) for depth in used},
        "tpt_ms": record["tpt_ms"],
        "origins": origins,
        "texts": texts,
    }


def embeds_of(prompt: object) -> object:
    """Of a prompt that is given as embeddings; None where it has tokens."""
    return prompt.get("prompt_embeds") if isinstance(prompt, dict) and prompt.get("type") == "embeds" else None


async def texts_of(
    choice: Choice,
    tokenizer: TokenizerLike | None,
    params: SamplingParams,
    prompt_token_ids: list[int] | None,
    prompt_embeds: object = None,
) -> list[str]:
    """Of each token what it adds to the choice's text, to the character: a character of several tokens comes with its
    last one, what a stop string cut off with none. By vLLM's own detokenizer, in time by the number of tokens."""
    request: Any = SimpleNamespace(
        request_id="report",
        sampling_params=params,
        prompt_token_ids=None if prompt_embeds is not None else prompt_token_ids,
        prompt_embeds=prompt_embeds,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer if params.detokenize else None, request)
    silent_end = choice.ends_on_stop_token and not params.include_stop_str_in_output
    num_spoken = len(choice.token_ids) - silent_end if isinstance(detokenizer, BaseIncrementalDetokenizer) else 0
    text = "".join(choice.text)
    texts, num_left = [""] * len(choice.token_ids), len(text)
    for number, token_id in enumerate(choice.token_ids[:num_spoken]):
        detokenizer.token_ids.append(token_id)  # where the slower of vLLM's two reads it
        texts[number] = detokenizer.decode_next(token_id)[:num_left]  # type: ignore[attr-defined]
        num_left -= len(texts[number])
        if number % TOKENS_AT_ONCE == TOKENS_AT_ONCE - 1:
            await asyncio.sleep(0)
    if "".join(texts) != text:
        raise RuntimeError(f"{len(texts)} tokens read as {''.join(texts)[-40:]!r}, sent as {text[-40:]!r}")
    return texts
