"""Stage 1 of ramp preparation: the model writes its own prompts and answers them.

No data set is needed: a prompt is sampled after the chat template's user header, then answered. A short opening
("Summarize", "Translate", ...) leads part of the prompts so that the tasks vary. Finished conversations are appended
to a JSONL file as token ids, one line each, so that an interrupted run goes on where it stopped.
"""

import json
import random
from pathlib import Path

MARKER = "@@apparate-user-text@@"

# Openings of a user's message. An empty one leaves the whole prompt to the model.
OPENINGS = (
    "", "", "", "", "", "",
    "What is", "How do", "Why", "Who", "When was", "Where is", "Can you explain", "Is it",
    "Write a", "Write a short story about", "Write an email to", "Write a Python function that", "Compose a",
    "Summarize the following text:", "Summarize this article:", "Rewrite the following sentence",
    "Translate this German sentence to English:", "Translate the following into French:",
    "Solve this problem step by step:", "A farmer has", "If a train", "Calculate", "John has",
    "Imagine you are", "You are a", "Pretend to be", "Give me", "List", "Compare", "Describe", "Explain",
    "Read the passage and answer the question.", "Answer the question using the following documents:",
    "Extract", "Classify the following", "Design a", "Suggest", "Help me",
)  # fmt: skip

# Share of the answers decoded at each temperature; 0 is greedy decoding, which is also how agreement is measured.
ANSWER_TEMPERATURES = ((0.0, 0.7), (0.4, 0.2), (0.7, 0.1))


def user_turn_affixes(tokenizer) -> tuple[str, str]:
    """Text before and after the user's words in a one-turn chat, the latter up to where the answer starts."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARKER}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(MARKER)
    if not found:
        raise ValueError("the model's chat template does not contain the user's message")
    return before, after


def count_tokens(path: Path) -> tuple[int, int]:
    """(conversations, answer tokens) already in `path`; a half-written last line is cut off."""
    if not path.exists():
        return 0, 0
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) != len(whole):
        path.write_bytes(complete)
    lines = complete.splitlines()
    return len(lines), sum(len(json.loads(line)["answer"]) for line in lines)


def synthesise(
    llm, path: Path, *, num_tokens: int, max_prompt_tokens: int, max_answer_tokens: int, batch: int, seed: int
) -> None:
    """Append conversations to `path` until it holds `num_tokens` answer tokens. `llm` is a `vllm.LLM`."""
    from tqdm import tqdm
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    before, after = user_turn_affixes(tokenizer)
    stop_id = tokenizer(after, add_special_tokens=False)["input_ids"][0]
    done, have = count_tokens(path)
    rng = random.Random(f"{seed}/{done}")
    seen: set[str] = set()
    with tqdm(total=num_tokens, initial=have, unit="tok", desc="synthesise") as bar, path.open("a") as out:
        while have < num_tokens:
            openings = rng.choices(OPENINGS, k=batch)
            written = llm.generate(
                [before + opening for opening in openings],
                SamplingParams(temperature=1.0, max_tokens=max_prompt_tokens, stop_token_ids=[stop_id]),
                use_tqdm=False,
            )
            prompts = []
            for opening, result in zip(openings, written, strict=True):
                text = (opening + result.outputs[0].text).strip()
                if len(text) > 8 and text not in seen:
                    seen.add(text)
                    prompts.append(before + text + after)
            temperatures = rng.choices(*zip(*ANSWER_TEMPERATURES, strict=True), k=len(prompts))
            answers = llm.generate(
                prompts,
                [SamplingParams(temperature=t, max_tokens=max_answer_tokens) for t in temperatures],
                use_tqdm=False,
            )
            for result, temperature in zip(answers, temperatures, strict=True):
                answer = list(result.outputs[0].token_ids)
                record = {"prompt": result.prompt_token_ids, "answer": answer, "temperature": temperature}
                out.write(json.dumps(record, separators=(",", ":")) + "\n")
                have += len(answer)
                bar.update(len(answer))
            out.flush()
