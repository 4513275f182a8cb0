"""Ways to use this machine that are worth measuring."""

from apparate_llm.host.choice import AS_VLLM, Choice, has_zentorch, kernels_text, num_threads
from apparate_llm.host.limits import CpuLimits

WITH_PAGES = ("always", "madvise")  # Linux's words for huge pages that can be had


def of_processes(old: Choice, limits: CpuLimits) -> list[Choice]:
    """First: how many threads compute, and what else runs beside them. `old`, which all are compared with, is not
    among them."""
    like_old = {"kernels": old.kernels, "huge_pages": old.huge_pages}
    numbers: list[int | str | None] = ["all"]
    if limits.threads > 1:  # vLLM keeps one core free, and knows nothing of a share of time
        numbers.append(limits.threads - 1 if limits.is_shared else AS_VLLM.threads)
    candidates = []
    for threads in numbers:
        for queues, worker in (("spin", "process"), ("block", "process"), ("spin", "engine")):
            made = Choice.model_validate(like_old | {"threads": threads, "queues": queues, "worker": worker})
            if (threads == "all" or queues == "spin") and not same(made, old, limits):
                candidates.append(made)
    return candidates


def of_kernels(best: Choice, old: Choice, limits: CpuLimits, *, zentorch: bool) -> list[Choice]:
    """Next, with what was best so far: other kernels."""
    if not zentorch:
        return []
    made = (best.model_copy(update={"kernels": kernels}) for kernels in ("stock", "zentorch"))
    return [one for one in made if not same(one, best, limits) and not same(one, old, limits)]


def of_pages(
    best: Choice, old: Choice, limits: CpuLimits, *, given: str | None, by_exits: bool = False
) -> list[Choice]:
    """Last: other pages. given: who has huge ones, by Linux's word; by_exits: whether servers have them where the
    choice leaves it open."""
    if given not in WITH_PAGES:
        return []
    now = by_exits if best.huge_pages is None else best.huge_pages
    made = best.model_copy(update={"huge_pages": not now})
    return [] if same(made, old, limits) else [made]


def same(one: Choice, other: Choice, limits: CpuLimits) -> bool:
    """Whether both come to the same here."""
    return _in_force(one, limits) == _in_force(other, limits)


def _in_force(choice: Choice, limits: CpuLimits) -> Choice:
    kernels = choice.kernels or ("zentorch" if has_zentorch() else "stock")  # vLLM takes it where it is
    queues = "spin" if choice.worker == "engine" else choice.queues  # then there are none
    update = {"threads": num_threads(choice, limits), "kernels": kernels, "queues": queues}
    return choice.model_copy(update=update)


def name_of(choice: Choice, limits: CpuLimits) -> str:
    """As the table has it."""
    number = num_threads(choice, limits)
    threads = "vLLM's" if number is None else str(number)
    place = "in engine" if choice.worker == "engine" else f"process, {choice.queues}"
    pages = {True: ", huge pages", False: ", small pages", None: ""}[choice.huge_pages]
    return f"{threads} threads, {place}{pages}, {kernels_text(choice)}"


def flags_of(choice: Choice, limits: CpuLimits) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """By which a server of ours is told the choice: of `--tuning`'s group, and of exits' options."""
    flags = ["--tuning", "off", "--queues", choice.queues, "--worker", choice.worker]
    if (number := num_threads(choice, limits)) is not None:
        flags += ["--threads", str(number)]
    if choice.kernels is not None:
        flags += ["--kernels", choice.kernels]
    pages = () if choice.huge_pages is None else ("--huge-pages", str(choice.huge_pages))
    return tuple(flags), pages
