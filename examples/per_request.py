"""One question asked in four ways: a bound, a target, or no exits for this request alone. Its report says where each
token came from.

python examples/per_request.py ["Your question"]
"""

import os
import sys
from collections import Counter

from openai import OpenAI

WAYS = {
    "as the server is set": {},
    "lossless": {"accuracy_bound": 0.0},
    "exact while 20 ms per token are met": {"tpt_target_ms": 20.0},
    "without exits": {"early_exit": 0},
}

question = sys.argv[1] if len(sys.argv) > 1 else "Write a Python function that reverses a list."
url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id

for way, fields in WAYS.items():
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        extra_body={"vllm_xargs": {**fields, "early_exit_report": 1}},
    )
    (report,) = answer.model_extra["early_exit"]
    origins = Counter(report["origins"])
    print(f"--- {way}: " + ", ".join(f"{number} {origin}" for origin, number in origins.most_common()))
    print(f"divergences, exits without a verdict included: {report['divergences_at_worst']}")
    tokens = zip(report["texts"], report["origins"], strict=True)
    print("".join(text if origin == "checked" else f"[{text}]" for text, origin in tokens), end="\n\n")
