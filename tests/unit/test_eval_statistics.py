from apparate_llm.eval.client import Chunk, Completion
from scripts.tpt_parts import parts


def answer(started_s: float, *at_s: float) -> Completion:
    chunks = [Chunk(second, number, number) for number, second in enumerate(at_s, 1)]
    return Completion(0, started_s, chunks, output_tokens=len(chunks))


def test_time_in_which_others_got_their_first_token_is_that_of_prompts():
    early, late = answer(0.0, 0.1, 0.12, 0.52, 0.54), answer(0.05, 0.471, 0.491)  # both get a token at 0.52 s
    (prompts, generation, ttft_ms), other = parts([early, late, Completion(1, 0.0)])
    assert abs(prompts - 400 / 3) < 1e-6 and abs(generation - 40 / 3) < 1e-6 and ttft_ms == 100
    assert other[0] == 0.0, "a request's own first token is no wait for its next"
    (_, of_others, _), *more = parts([early], [late])
    assert abs(of_others - generation) < 1e-6 and not more, "others that do not count are others, too"
    together = list(parts([answer(0.0, 0.1, 0.12), answer(0.0, 0.1, 0.12)]))
    assert [part[0] for part in together] == [0.0, 0.0], "prompts of one step"
