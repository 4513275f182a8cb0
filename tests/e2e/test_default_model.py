"""`apparate-llm serve` with nothing named: the embedded model, its shipped ramps, and exits that hit."""

import httpx
import openai

from apparate_llm.default_model import NAME, is_complete


def test_the_default_model_serves_with_useful_exits_within_the_bound(serve, tmp_path):
    flags = ("--enforce-eager", "--max-model-len", "1024")
    with serve(*flags, APPARATE_CACHE=str(tmp_path)) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Explain to a child why the sky is blue."}],
            temperature=0,
            max_tokens=96,
        )
        counts = httpx.get(f"{base_url}/early_exit/status").json()["counts"]
    assert is_complete(tmp_path / NAME)
    assert "light" in answer.choices[0].message.content
    assert counts["diverged"] <= 0.01 * counts["emitted"] and counts["fallbacks"] == 0
    assert counts["emitted"] == answer.usage.completion_tokens
    assert counts["accepted"] / counts["emitted"] > 0.2, "the shipped ramps no longer fit the default model"
