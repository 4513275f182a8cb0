"""A model of any size with random weights and a tokenizer of its own, built in code: Qwen2's shape."""

from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(folder: Path, *, layers: int, hidden: int, vocabulary: int) -> None:
    """In bfloat16, embeddings tied; `hidden` is a multiple of 128."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=round(hidden * 35 / 6),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2 if hidden % 256 == 0 else 1,
        max_position_embeddings=32768,
        bos_token_id=vocabulary - 3,
        eos_token_id=vocabulary - 1,
        tie_word_embeddings=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer_of(vocabulary).save_pretrained(folder)
    model.save_pretrained(folder)


def tokenizer_of(size: int) -> Any:
    """Bytes, and made-up words of two and four letters up to `size` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    twos = list(product(ascii_lowercase, ascii_lowercase))
    fours = (("".join(a), "".join(b)) for a, b in product(twos, twos))
    merges = list(islice(chain(twos, fours), size - len(letters) - len(SPECIAL)))
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )
