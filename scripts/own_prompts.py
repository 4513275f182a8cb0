"""How much seldomer ramps agree on users' prompts than on those a model writes for itself.

    python -m scripts.own_prompts RAMPS --model MODEL --preparation OUT --evaluated FILE [FILE ...] --json FILE

OUT: folder of a preparation with the same depths, of which the test conversations are used; the ramps must not have
been trained on them. FILE: results of `apparate-llm ramps evaluate` with the same ramps. `frac` of each is the
acceptance rate at position 0 there / on the model's own prompts.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from apparate_llm.named_model import model_folder
from apparate_llm.prepare.draft_data import BaseParts
from apparate_llm.prepare.evaluate import Answered, measure, served_ramps
from apparate_llm.prepare.prompts import KINDS
from apparate_llm.prepare.rows import LEAD, TEST, Rows
from apparate_llm.prepare.store import RowStore
from apparate_llm.ramps.checkpoint import BaseModelInfo, check_fits, read_manifest
from apparate_llm.renamed import depth_of_any_evaluation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ramps", type=Path)
    parser.add_argument("--model", help="(default: that of `serve`)")
    parser.add_argument("--preparation", type=Path, required=True)
    parser.add_argument("--evaluated", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, manifest = model_folder(args.model), read_manifest(args.ramps)
    check_fits(manifest, args.ramps, fingerprint=BaseModelInfo.of(model).fingerprint)
    store = RowStore(args.preparation / "work" / "rows")
    depth = manifest.default_depth
    rows = test_rows(store, tuple(sorted({number for number in (depth, *manifest.aux_layers) if number > 0})))
    base = BaseParts.of(model)
    answered = Answered([], {}, int((rows.answer_index > LEAD).sum()), rows, base, rows.final.dtype, [])
    measured = measure(answered, served_ramps(args.ramps, manifest, answered, depth))
    first = measured[0]
    kinds = store.kinds()[rows.conversations[first.rows].long()]
    own = [float(part.agrees.float().mean()) for part in measured]
    summary = {
        "command": shlex.join(["python", "-m", "scripts.own_prompts", *sys.argv[1:]]),
        "model": manifest.base_model.model_dump(),
        "depth": depth,
        "own": {
            "conversations": len(rows.conversations.unique()),
            "rows": len(first.rows),
            "acceptance_rates": own,
            "by_kind": {
                kind: float(first.agrees[kinds == number].float().mean())
                for number, kind in enumerate(KINDS)
                if (kinds == number).any()
            },
        },
        "users": [of_users(path, depth, own[0]) for path in args.evaluated],
    }
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 0


def test_rows(store: RowStore, depths: tuple[int, ...]) -> Rows:
    """Of the test conversations, lead rows included."""
    rows = store.rows(depths=depths)
    chosen = torch.nonzero(rows.split == TEST)[:, 0]
    fields = {name: getattr(rows, name)[chosen] for name in Rows._fields if name != "states"}
    return Rows(**fields, states={depth: value[chosen] for depth, value in rows.states.items()})


def of_users(path: Path, depth: int, own: float) -> dict[str, Any]:
    result = json.loads(path.read_text())
    item = next(item for item in result["depths"] if item["depth"] == depth)
    rate = depth_of_any_evaluation(item)["positions"][0]["acceptance_rate"]
    return {"result": path.name, "prompts": result["prompts"], "acceptance_rate": rate, "frac": rate / own}


if __name__ == "__main__":
    raise SystemExit(main())
