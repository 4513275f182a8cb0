"""Tensor parallelism: all ranks run the same draft steps. Rank 0's ramp, clock and memory are the ones that count, and
a failure of one rank is everybody's.

All else that decides (verdicts, budget, policy) is computed alike on every rank from the same logits and from rank
0's clock.

No rank may be left waiting in an exchange that another one, having failed, never enters. So before every exchange all
ranks meet, and say whether they are still with it. Who fails says so at the next meeting, and all leave the work.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.parallel_state import GroupCoordinator

from apparate_llm.ramps.load import Prediction

T = TypeVar("T")


class PeerFailed(Exception):
    """Another rank failed."""


class Peers:
    """The ranks of one model, a single one without tensor parallelism."""

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group
        self.alone = group.world_size == 1

    @property
    def is_first(self) -> bool:
        return self.alone or self.group.rank_in_group == 0

    def meet(self, *, failed: bool = False) -> None:
        """Raises PeerFailed on the ranks that did not fail if one did."""
        if self.alone:
            return
        failures = torch.tensor([int(failed)])
        torch.distributed.all_reduce(failures, op=torch.distributed.ReduceOp.MAX, group=self.group.cpu_group)
        if failures.item() and not failed:
            raise PeerFailed("another rank failed, its own log says why")

    def together(self, work: Callable[[], T]) -> T:
        """`work`, in which all ranks make the same exchanges; where one rank fails, all raise. Not to be nested."""
        if self.alone:
            return work()
        try:
            result = work()
        except PeerFailed:
            raise
        except Exception:
            self.meet(failed=True)
            raise
        self.meet()
        return result

    @contextmanager
    def meeting_in_model(self) -> Iterator[None]:
        """Within, the exchanges that vLLM's layers make are met for, too."""
        if self.alone:
            yield
            return
        self.meet()
        original = self.group.device_communicator
        self.group.device_communicator = cast(DeviceCommunicatorBase, _Meeting(original, self))
        try:
            yield
        finally:
            self.group.device_communicator = original

    def share_floats(self, values: list[float]) -> list[float]:
        """Rank 0's values."""
        if self.alone:
            return values
        self.meet()
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(shared, src=self.group.ranks[0], group=self.group.cpu_group)
        return shared.tolist()

    def share_prediction(self, prediction: Prediction) -> Prediction:
        """Rank 0's tokens and confidences."""
        if self.alone:
            return prediction
        tokens = prediction.token_ids.tolist()  # exact as float64
        shared = self.share_floats([*tokens, *prediction.confidences])
        token_ids = torch.tensor(shared[: len(tokens)]).long()
        return prediction._replace(token_ids=token_ids, confidences=shared[len(tokens) :])

    def share_object(self, value: T) -> T:
        """Rank 0's value, which can be pickled."""
        if self.alone:
            return value
        payload = [pickle.dumps(value) if self.is_first else b""]
        self.meet()
        torch.distributed.broadcast_object_list(payload, src=self.group.ranks[0], group=self.group.cpu_group)
        return value if self.is_first else pickle.loads(payload[0])


class _Meeting:
    """vLLM's device communicator, with a meeting before each of its exchanges."""

    def __init__(self, original: object, peers: Peers) -> None:
        self.original = original
        self.peers = peers

    def __getattr__(self, name: str) -> object:
        attribute = getattr(self.original, name)
        if name not in ("all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "gather", "broadcast"):
            return attribute

        def after_meeting(*args: object, **kwargs: object) -> object:
            self.peers.meet()
            return attribute(*args, **kwargs)

        return after_meeting
