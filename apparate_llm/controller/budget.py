"""The accuracy bound as a budget: what may go wrong is paid for before it is emitted."""

from dataclasses import dataclass

from apparate_llm.core import ExitCounts


@dataclass(slots=True)
class AccuracyBudget:
    """Allows a release only if the bound holds even when every exit without a verdict turns out wrong.

    Exits whose request ended before their verdict stay counted as wrong for good.
    """

    accuracy_bound: float  # largest share of divergent tokens among emitted ones, in [0, 1)

    def allows_release(self, counts: ExitCounts, num_pending: int) -> bool:
        """Whether one more exit may be released, `num_pending` more of this step not being in `counts` yet."""
        wrong_at_worst = counts.diverged + counts.unverified + counts.outstanding + num_pending + 1
        return wrong_at_worst <= self.accuracy_bound * (counts.emitted + num_pending + 1)

    def check_integrity(self, counts: ExitCounts) -> None:
        wrong_at_worst = counts.diverged + counts.unverified + counts.outstanding
        allowed = self.accuracy_bound * counts.emitted
        assert wrong_at_worst <= allowed + 1e-9, f"budget overspent: {wrong_at_worst} > {allowed:.3f} ({counts})"
