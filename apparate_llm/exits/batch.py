"""What exits, and what prepares them, see of an engine step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apparate_llm.ramps.lookup import TokenIds


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests of the step under way. The arrays are the runner's own: they change with its next step."""

    request_ids: list[str]
    token_ids: NDArray[np.int32]  # [requests, max_model_len]
    num_tokens: NDArray[np.int32]  # [requests] of each text
    num_prompt_tokens: NDArray[np.int32]  # [requests] of them, the prompt's
    num_computed_tokens: NDArray[np.int32]  # [requests] before this step
    first_rows: NDArray[np.int32]  # [requests + 1] of each in the pass, and the number of all rows
    max_model_len: int  # tokens of the context

    @property
    def num_requests(self) -> int:
        return len(self.request_ids)

    def text(self, index: int, end: int) -> TokenIds:
        """The first `end` tokens of a request."""
        return self.token_ids[index, :end]
