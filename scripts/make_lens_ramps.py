#!/usr/bin/env python3
"""Makes a `lens` ramp folder for a model: its own final norm and lm_head at one depth, nothing trained.

    python -m scripts.make_lens_ramps --model DIR --depth 12 --out DIR

Useful for checkpoints trained to exit early (LayerSkip, FREE). The ramp vocabulary is the lowest token ids: a BPE
vocabulary is numbered by merges, the most frequent first.
"""

import argparse
from pathlib import Path

import torch

from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps
from apparate_llm.ramps.sketch import Sketch


def make_lens_ramps(model: Path, out: Path, *, depth: int, ramp_vocab: int) -> None:
    info = BaseModelInfo.of(model)
    if not 0 < depth < info.num_hidden_layers:
        raise SystemExit(f"--depth must be between 1 and {info.num_hidden_layers - 1}, got {depth}")
    Sketch.of(model).save(out)
    size = min(ramp_vocab, info.vocab_size)
    save_ramps(
        out,
        {VOCABULARY: torch.arange(size)},
        kind="lens",
        base_model=info,
        depths=[depth],
        default_depth=depth,
        ramp_vocab=size,
        intermediate_size=0,
        calibration={depth: [(1.0, 0.0)]},
        training={"script": "scripts/make_lens_ramps.py"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--ramp-vocab", type=int, default=8192)
    args = parser.parse_args()
    make_lens_ramps(args.model, args.out, depth=args.depth, ramp_vocab=args.ramp_vocab)


if __name__ == "__main__":
    main()
