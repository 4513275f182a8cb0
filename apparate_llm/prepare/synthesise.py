"""Stages synthesise and collect: the model writes its own prompts and answers them while its inner states are recorded.

Work goes by groups of conversations. Group g depends on (seed, g), its size and the groups before it only; its rows are
one file, so a run that was killed goes on with the first missing group.
"""

import math
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from apparate_llm.prepare.capture import Capture
from apparate_llm.prepare.chat import MIN_PROMPT_TOKENS, ChatFormat
from apparate_llm.prepare.rows import Conversation, is_held_out, rows_of, save_rows
from apparate_llm.prepare.topics import CODE_OPENINGS, OPENINGS, PASSAGE_TASKS, SYSTEM_PROMPTS

Messages = list[dict[str, str]]
KINDS = ("open", "code", "passage", "user")  # of a prompt; the last are the user's own

# Decoding temperature of each group's answers in turn: mostly greedy, which is also how agreement is measured.
TEMPERATURES = (0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.8, 0.0)
PASSAGE_SHARE = 0.3  # of the prompts ask about a text that the model wrote earlier
CODE_SHARE = 0.3  # of the other prompts open like a programmer's
USER_SHARE = 1 / 3  # of a group, while prompts given by the user last
SYSTEM_SHARE = 0.3  # have another system prompt than the chat template's own
MIN_PASSAGE_TOKENS = 96
MIN_PROMPT_CHARACTERS = 8


class Synthesiser:
    def __init__(
        self,
        llm: Any,
        folder: Path,
        *,
        depths: tuple[int, ...],
        user_prompts: list[Messages],
        group_size: int,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.llm = llm
        self.folder = folder
        self.capture = Capture(llm, depths=depths)
        self.group_size = group_size
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.seed = seed
        self.tokenizer = llm.get_tokenizer()
        self.chat = ChatFormat(
            self.tokenizer,
            max_model_len=llm.llm_engine.model_config.max_model_len,
            max_answer_tokens=max_answer_tokens,
            say=say,
        )
        self.user_prompts = [ids for _, ids in self.chat.render_all(user_prompts)[0]]
        self.seen: set[str] = set()
        self.passages: list[str] = []
        self.num_answers = self.num_answer_tokens = 0
        for path in group_files(folder):
            self._remember(texts_of(path))

    def write_group(self, number: int, size: int) -> int:
        """Make group `number` of up to `size` conversations and leave it on disk; returns its answer tokens."""
        rng = random.Random(f"{self.seed}/{number}")
        kinds, prompts = self._prompts(rng, size)
        torch.manual_seed(rng.getrandbits(32))
        temperature = TEMPERATURES[number % len(TEMPERATURES)]
        found = generate_rows(
            self.llm, self.capture, prompts, temperature=temperature, max_tokens=self.max_answer_tokens
        )
        self.capture.clear()
        kinds = [kind for kind, answer in zip(kinds, found, strict=True) if answer is not None]
        answers = [answer for answer in found if answer is not None]
        if not answers:
            raise RuntimeError(f"the model answered none of {len(prompts)} prompts")
        self._remember([(item.prompt, item.answer) for item in answers])
        flat = {
            "kinds": torch.tensor([KINDS.index(kind) for kind in kinds], dtype=torch.int8),
            "prompt_ids": torch.tensor([token for item in answers for token in item.prompt], dtype=torch.int32),
            "prompt_lengths": torch.tensor([len(item.prompt) for item in answers], dtype=torch.int32),
            "answer_ids": torch.tensor([token for item in answers for token in item.answer], dtype=torch.int32),
            "answer_lengths": torch.tensor([len(item.answer) for item in answers], dtype=torch.int32),
        }
        save_rows(group_file(self.folder, number), rows_of(answers), flat)
        return len(flat["answer_ids"])

    def group_size_for(self, num_tokens: float) -> int:
        """Conversations likely to hold `num_tokens` answer tokens, at most a whole group."""
        mean_answer = self.num_answer_tokens / self.num_answers if self.num_answers else self.max_answer_tokens / 2
        return math.ceil(min(self.group_size, num_tokens / mean_answer))

    def _remember(self, group: list[tuple[list[int], list[int]]]) -> None:
        for number, (prompt, answer) in enumerate(group):
            self.num_answers += 1
            self.num_answer_tokens += len(answer)
            self.seen.add(self.tokenizer.decode(prompt))
            if len(answer) >= MIN_PASSAGE_TOKENS and not is_held_out(number):
                self.passages.append(self.tokenizer.decode(answer, skip_special_tokens=True).strip())

    # ---- prompts

    def _prompts(self, rng: random.Random, size: int) -> tuple[list[str], list[list[int]]]:
        """Kinds and token ids of up to `size` different prompts, chat template included."""
        mine = (("user", ids) for ids in self.user_prompts if self._is_new(ids))
        found = list(islice(mine, max(1, int(USER_SHARE * size))))
        texts = []
        if self.passages:
            for _ in range(int(PASSAGE_SHARE * (size - len(found)))):
                before, after = self._affixes(rng)
                task = rng.choice(PASSAGE_TASKS).replace("{}", rng.choice(self.passages))
                texts.append(("passage", before + task + after))
        texts += self._written_prompts(rng, size - len(found) - len(texts))
        found += [(kind, self.chat.encode(text)) for kind, text in texts]
        kinds, prompts = [], []
        for kind, ids in found:
            if self._is_new(ids):
                self.seen.add(self.tokenizer.decode(ids))
                kinds.append(kind)
                prompts.append(ids)
        return kinds, prompts

    def _is_new(self, ids: list[int]) -> bool:
        """Whether a prompt fits in the context and was not answered yet."""
        fits = MIN_PROMPT_TOKENS <= len(ids) <= self.chat.longest
        return fits and self.tokenizer.decode(ids) not in self.seen

    def _written_prompts(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        from vllm import SamplingParams

        if not count:
            return []
        affixes = [self._affixes(rng) for _ in range(count)]
        kinds = ["code" if rng.random() < CODE_SHARE else "open" for _ in range(count)]
        openings = [rng.choice(CODE_OPENINGS if kind == "code" else OPENINGS) for kind in kinds]
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=self.max_prompt_tokens,
                **self.chat.stops(after),
            )
            for _, after in affixes
        ]
        heads = [
            {"prompt_token_ids": self.chat.start(before + opening)}
            for (before, _), opening in zip(affixes, openings, strict=True)
        ]
        torch.manual_seed(rng.getrandbits(32))
        written = self.llm.generate(heads, params, use_tqdm=False)
        self.capture.clear()
        texts = []
        for kind, (before, after), opening, result in zip(kinds, affixes, openings, written, strict=True):
            text = (opening + result.outputs[0].text).strip()
            if len(text) >= MIN_PROMPT_CHARACTERS:
                texts.append((kind, before + text + after))
        return texts

    def _affixes(self, rng: random.Random) -> tuple[str, str]:
        return self.chat.affixes(rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None)


def generate_rows(
    llm: Any,
    capture: Capture,
    prompts: list[list[int]],
    *,
    temperature: float,
    max_tokens: int,
    show_progress: bool = False,
) -> list[Conversation | None]:
    """Answer every prompt (token ids): the conversations with what the capture recorded, None for an empty answer."""
    from vllm import SamplingParams

    capture.clear()
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=temperature, max_tokens=max_tokens),
        use_tqdm=show_progress,
    )
    return [
        capture.take(result.request_id, prompt, list(result.outputs[0].token_ids))
        if result.outputs[0].token_ids
        else None
        for prompt, result in zip(prompts, results, strict=True)
    ]


def group_file(folder: Path, number: int) -> Path:
    return folder / f"group-{number:05d}.safetensors"


def group_files(folder: Path) -> list[Path]:
    """Finished groups, without a gap."""
    files: list[Path] = []
    while (path := group_file(folder, len(files))).is_file():
        files.append(path)
    return files


def texts_of(path: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of a group's conversations."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        parts = []
        for kind in ("prompt", "answer"):
            lengths = file.get_tensor(f"{kind}_lengths").tolist()
            parts.append([part.tolist() for part in file.get_tensor(f"{kind}_ids").split(lengths)])
    return list(zip(*parts, strict=True))


def answer_tokens(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return int(file.get_slice("answer_ids").get_shape()[0])


def synthesise(
    synthesiser: Synthesiser, *, num_tokens: float, deadline: Callable[[], bool], on_tokens: Callable[[int], None]
) -> int:
    """Groups until there are `num_tokens` answer tokens or `deadline()` says it is time; returns the tokens there are.
    `on_tokens` gets each finished group's."""
    files = group_files(synthesiser.folder)
    total = sum(answer_tokens(path) for path in files)
    number = len(files)
    while total < num_tokens and not (number and deadline()):
        made = synthesiser.write_group(number, synthesiser.group_size_for(num_tokens - total))
        total, number = total + made, number + 1
        on_tokens(made)
    return total


def kinds_of(path: Path) -> list[str]:
    """What kind of prompt each of a group's conversations has."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return [KINDS[number] for number in file.get_tensor("kinds").tolist()]
