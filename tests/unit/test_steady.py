from apparate_llm.eval.steady import ttft_parts


def test_parts_of_a_wait_for_the_first_token():
    """Steps end at 1.0, 1.1, 1.4 and 1.8: the third reads one prompt, the last two."""
    arrivals = [
        [1.0, 1.1, 1.4, 1.801],
        [1.399, 1.8],  # its prompt was read by the step from 1.1 to 1.4
        [1.8],
        [1.801],
    ]
    asked_in_the_first = ttft_parts([(1.02, 1.399)], arrivals)
    assert {name: round(value) for name, value in asked_in_the_first.items()} == {
        "step_under_way_ms": 80,
        "further_steps_ms": 0,
        "own_step_ms": 299,
        "prompts_in_own_step": 1,
    }
    both = ttft_parts([(1.05, 1.8), (1.4, 1.8)], arrivals)  # one waits for the other's prompt, one for nothing
    assert {name: round(value) for name, value in both.items()} == {
        "step_under_way_ms": 25,
        "further_steps_ms": 150,
        "own_step_ms": 400,
        "prompts_in_own_step": 2,
    }
