from apparate_llm.controller.depth import CHECK_EVERY, LEAST_SAMPLES, DepthChoice


def choose(choice: DepthChoice, rates: dict[int, float], steps: int = CHECK_EVERY) -> int:
    for _ in range(steps):
        chosen = choice.choose(rates.__getitem__)
    return chosen


def shadowed(choice: DepthChoice, depth: int, samples: int = LEAST_SAMPLES) -> DepthChoice:
    for i in range(samples):
        choice.observe(depth, i % 2 == 0, i % 4 != 0)  # active 0.5, the other 0.75
    return choice


def test_a_ramp_that_promises_clearly_more_takes_over():
    choice = shadowed(DepthChoice(active=0), 2)
    assert choice.relative(2, 0.4) > 0.55
    assert choice.relative(0, 0.4) == 0.4
    assert choose(choice, {0: 1.0, 2: 1.2}) == 2
    assert choice.relative(0, 0.4) == 0.4, "what was measured beside the old ramp is forgotten"


def test_a_little_more_or_too_few_samples_is_not_enough():
    assert choose(shadowed(DepthChoice(active=0), 2), {0: 1.0, 2: 1.04}) == 0
    assert choose(shadowed(DepthChoice(active=0), 2, LEAST_SAMPLES - 1), {0: 1.0, 2: 9.0}) == 0
    assert choose(shadowed(DepthChoice(active=0), 2), {0: 1.0, 2: 9.0}, CHECK_EVERY - 1) == 0


def test_two_equal_ramps_do_not_take_turns():
    choice, switches, active = DepthChoice(active=0), 0, 0
    for step in range(20 * CHECK_EVERY):
        other = 2 - choice.active
        choice.observe(other, step % 2 == 0, step % 2 == 0)
        noisy = {0: 1.0 + 0.02 * (step % 3), 2: 1.02 - 0.02 * (step % 2)}
        chosen = choice.choose(noisy.__getitem__)
        switches, active = switches + (chosen != active), chosen
    assert switches == 0
