#!/usr/bin/env python3
"""Makes the ramps shipped for the default model (SmolLM2-135M-Instruct): synthesise, collect, train, calibrate.

    python scripts/make_default_ramps.py --model DIR --work DIR --out apparate_llm/assets/smollm2-135m-instruct

The shipped ones took about 25 minutes of synthesis, 8 of collecting and 20 of training a depth, on two cores.
Synthesised text is kept in --work and an interrupted run goes on from there.
"""

import argparse
import json
from pathlib import Path

import torch

from apparate_llm.ramps.checkpoint import VOCABULARY, BaseModelInfo, save_ramps
from apparate_llm.ramps.prepare.collect import collect
from apparate_llm.ramps.prepare.synthesise import synthesise, user_turn_affixes
from apparate_llm.ramps.prepare.train import (
    BaseParts,
    calibrate,
    evaluate_head,
    ramp_vocabulary,
    starts,
    train_head,
)

NUM_ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps the synthesised conversations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500_000, help="answer tokens to synthesise")
    parser.add_argument("--depths", default="0,2")
    parser.add_argument("--ramp-vocab", type=int, default=8192)
    parser.add_argument("--intermediate-size", type=int, default=1536)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--minutes-per-depth", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    conversations = args.work / "conversations.jsonl"
    synthesise_with_vllm(args.model, conversations, args.tokens, args.seed)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    depths = tuple(int(depth) for depth in args.depths.split(","))
    prefix = len(tokenizer(user_turn_affixes(tokenizer)[0])["input_ids"])
    rows = collect(model, conversations, depths=depths, skip_prefix=prefix - 1, max_rows=1_500_000)
    base = BaseParts(
        embedding=model.get_input_embeddings().weight.detach(),
        lm_head=model.get_output_embeddings().weight.detach(),
        norm=model.model.norm.weight.detach(),
        eps=model.config.rms_norm_eps,
    )
    vocabulary = ramp_vocabulary(rows, args.ramp_vocab)
    covered = torch.isin(rows.top_ids[rows.is_answer, 0].long(), vocabulary).float().mean().item()
    print(f"{len(rows.tokens)} rows; ramp vocabulary of {len(vocabulary)} covers {covered:.4f} of the answers")

    tensors = {VOCABULARY: vocabulary}
    calibration: dict[int, list[tuple[float, float]]] = {}
    agreement: dict[str, list[dict[str, float]]] = {}
    record = {}
    for depth in depths:
        head, record = train_head(
            rows,
            base,
            vocabulary,
            depth=depth,
            intermediate_size=args.intermediate_size,
            epochs=args.epochs,
            seed=args.seed,
            time_budget_s=args.minutes_per_depth * 60,
        )
        for name, value in head.state_dict().items():
            if name != "head":
                tensors[f"{depth}.{name}"] = value.bfloat16()
        rounds = evaluate_head(head, rows, base, vocabulary, depth=depth, num_rounds=NUM_ROUNDS)
        calibration[depth] = [calibrate(confidence, agrees) for confidence, agrees in rounds]
        agreement[str(depth)] = [
            {"agreement": round(agrees.float().mean().item(), 4), "rows": len(agrees)} for _, agrees in rounds
        ]
        print(json.dumps({"depth": depth, "held_out": agreement[str(depth)], "calibration": calibration[depth]}))
        save_ramps(
            args.out,
            tensors,
            kind="fused",
            base_model=BaseModelInfo.of(args.model),
            depths=sorted(calibration),
            default_depth=min(calibration),
            ramp_vocab=len(vocabulary),
            intermediate_size=args.intermediate_size,
            calibration=calibration,
            training={
                "script": "scripts/make_default_ramps.py",
                "data": "text written by the model itself",
                "rows": record["rows"],
                "held_out_rows": len(starts(rows, 1, held_out=True)),
                "vocabulary_coverage": round(covered, 4),
                "held_out_agreement": agreement,
                "seed": args.seed,
            },
        )


def synthesise_with_vllm(model: Path, conversations: Path, num_tokens: int, seed: int) -> None:
    from apparate_llm.ramps.prepare.synthesise import count_tokens

    if count_tokens(conversations)[1] >= num_tokens:
        return
    from vllm import LLM

    llm = LLM(
        str(model),
        max_model_len=1024,
        max_num_seqs=128,
        kv_cache_memory_bytes=2 << 30,
        seed=seed,
        enforce_eager=True,
    )
    synthesise(
        llm,
        conversations,
        num_tokens=num_tokens,
        max_prompt_tokens=160,
        max_answer_tokens=256,
        batch=128,
        seed=seed,
    )


if __name__ == "__main__":
    main()
