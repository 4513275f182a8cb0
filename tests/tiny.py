"""Tiny random models and ramp folders for them, built in a second, used all over the tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps
from apparate_llm.ramps.lookup import MAX_FEATURE_LENGTH
from apparate_llm.ramps.sketch import Sketch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 160
HIDDEN_SIZE = 64
NUM_LAYERS = 4
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tiny_model(folder: Path, *, model_type: str = "llama", seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Path:
    """A random decoder of the given family with a word-level tokenizer; returns `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # large enough weights for a peaked, history-dependent next token
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.6 / parameter.shape[1] ** 0.5)
        # Norm weights away from one, so that a norm with the wrong weight cannot pass unseen.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
    _word_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def make_forgetful(folder: Path) -> Path:
    """Makes a model's next token depend on the newest one alone, so that its texts soon repeat themselves."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name:  # what attention adds
            tensor.zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _word_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
    words += [f"w{number}" for number in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # joins words with blanks
    # As added tokens the words are also found by the tokenizer class that transformers prescribes for a model type.
    tokenizer.add_tokens(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def build_lens_ramps(
    folder: Path, model_dir: Path, *, depth: int, confidence_offset: float = 0.0, others: Sequence[int] = ()
) -> Path:
    """A lens at `depth`, the default, and one at each of `others`. At depth NUM_LAYERS it is a perfect ramp; below, it
    agrees now and then."""
    return _save(folder, model_dir, kind="lens", depth=depth, tensors={}, offset=confidence_offset, others=others)


def build_fused_ramps(folder: Path, model_dir: Path, *, depth: int, seed: int = 0) -> Path:
    """An untrained fused head: runs every part, agrees by chance. Its vocabulary leaves some tokens to lookups."""
    torch.manual_seed(seed)
    h, m = HIDDEN_SIZE, 96
    shapes = {
        "enter_weight": (h, 3 * h),
        "fuse": (h, 3 * h),
        "match": (MAX_FEATURE_LENGTH + 1, h),
        "gate_up": (2 * m, h),
        "down": (h, m),
        "norm": (h,),
        "pointer": (1, h),
    }
    tensors = {f"{depth}.{name}": torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    vocabulary = torch.arange(VOCAB_SIZE - 40)
    return _save(
        folder,
        model_dir,
        kind="fused",
        depth=depth,
        tensors={VOCABULARY: vocabulary, **tensors},
        offset=0.0,
        intermediate_size=m,
        aux_layers=[1, 3],
    )


def _save(
    folder: Path,
    model_dir: Path,
    *,
    kind: str,
    depth: int,
    tensors: dict[str, torch.Tensor],
    offset: float,
    intermediate_size: int = 0,
    aux_layers: Sequence[int] = (),
    others: Sequence[int] = (),
) -> Path:
    info = BaseModelInfo.of(model_dir)
    Sketch.of(model_dir).save(folder)
    tensors = {VOCABULARY: torch.arange(info.vocab_size), **tensors}
    save_ramps(
        folder,
        tensors,
        kind=kind,
        base_model=info,
        depths=sorted([depth, *others]),
        default_depth=depth,
        ramp_vocab=len(tensors[VOCABULARY]),
        intermediate_size=intermediate_size,
        aux_layers=list(aux_layers),
        calibration={depth: [(1.0, offset)] for depth in (depth, *others)},
    )
    return folder
