"""An answer as it is made, and how long its tokens took.

python examples/stream.py ["Your question"]
"""

import os
import sys
import time

from openai import OpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Write a Python function that reverses a list."
url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
began_s = time.monotonic()
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    max_tokens=128,
    stream=True,
    stream_options={"include_usage": True},
)

arrivals_s: list[float] = []
num_tokens = 0
for chunk in stream:
    for choice in chunk.choices:
        if choice.delta.content:
            arrivals_s.append(time.monotonic())
            print(choice.delta.content, end="", flush=True)
    if chunk.usage is not None:
        num_tokens = chunk.usage.completion_tokens

if arrivals_s:
    first_ms = 1000 * (arrivals_s[0] - began_s)
    each_ms = 1000 * (arrivals_s[-1] - arrivals_s[0]) / max(num_tokens - 1, 1)
    print(f"\n\nfirst token after {first_ms:.0f} ms, then {each_ms:.1f} ms for each of {num_tokens}")
