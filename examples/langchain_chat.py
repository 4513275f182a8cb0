"""LangChain with a lossless request. Needs `pip install langchain-openai`.

python examples/langchain_chat.py ["Your question"]
"""

import os
import sys

from langchain_openai import ChatOpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
model = ChatOpenAI(
    model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    temperature=0,
    max_tokens=64,
    extra_body={"vllm_xargs": {"accuracy_bound": 0.0}},
)
for chunk in model.stream(question):
    print(chunk.content, end="", flush=True)
print()
