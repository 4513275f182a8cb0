"""The ranks of one model, as exits know them: with tensor parallelism all decide alike, by what rank 0 has."""

from typing import Protocol

from apparate_llm.ramps.load import Prediction


class Ranks(Protocol):
    def share_floats(self, values: list[float]) -> list[float]:
        """Rank 0's values, on every rank."""
        ...

    def share_prediction(self, prediction: Prediction) -> Prediction:
        """Rank 0's tokens and confidences, on every rank."""
        ...
