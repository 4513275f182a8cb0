"""Shadow evaluation: what the ramps that are not in use would have said, on states that the verification pass has
anyway."""

from time import perf_counter

import torch

from apparate_llm.exits.draft import Drafter
from apparate_llm.exits.ranks import Ranks
from apparate_llm.exits.step_clock import StepClock
from apparate_llm.ramps.load import Proposals
from apparate_llm.ramps.lookup import TokenIds, lookup_feature

COST_FRAC = 0.01  # of the time that goes by
MAX_ROWS = 4


class Shadow:
    """Compares all ramps' tokens of the first draft step with the full model's, at positions after an accepted held
    exit: there the pass has the newest token's auxiliary hidden state and the final state of the token before it."""

    def __init__(self, drafter: Drafter, depths: tuple[int, ...], clock: StepClock, peers: Ranks) -> None:
        """depths: of the verification pass's auxiliary hidden states."""
        self.drafter = drafter
        self.clock = clock
        self.peers = peers
        self.depths = depths
        self._due_s = 0.0

    def ramp_states(self, aux: list[torch.Tensor]) -> list[torch.Tensor]:
        """The auxiliary hidden states that the ramps read, out of all the verification pass gives."""
        return [aux[self.depths.index(depth)] for depth in self.drafter.ramps.aux_layers]

    def maybe_run(
        self, sampled_token_ids: list[list[int]], num_drafts: list[int], final: torch.Tensor, aux: list[torch.Tensor]
    ) -> None:
        """After a verification pass; num_drafts: held exits it checked, per request."""
        if self.clock.now_s < self._due_s:
            return
        batch = self.drafter.model.batch()
        rows, texts, targets = [], [], []
        for index, checked in enumerate(sampled_token_ids):
            end = int(batch.num_tokens[index])
            newest_row = int(batch.first_rows[index + 1]) - 1 - num_drafts[index]
            for accepted in range(1, len(checked)):
                rows.append(newest_row + accepted)
                texts.append(batch.text(index, end - len(checked) + accepted))
                targets.append(checked[accepted])
        if not rows:
            return
        began_s = perf_counter()
        self._compare(rows[:MAX_ROWS], texts[:MAX_ROWS], targets[:MAX_ROWS], final, aux)
        (took_s,) = self.peers.share_floats([perf_counter() - began_s])
        self._due_s = self.clock.now_s + took_s / COST_FRAC

    def _compare(
        self,
        rows: list[int],
        texts: list[TokenIds],
        targets: list[int],
        final: torch.Tensor,
        aux: list[torch.Tensor],
    ) -> None:
        policy, before, embed = self.drafter.policy, [row - 1 for row in rows], self.drafter.model.embed
        newest = torch.tensor([int(text[-1]) for text in texts])
        tokens, lengths = torch.tensor([lookup_feature(text) for text in texts]).unbind(1)
        proposals, newest_states = Proposals(tokens, lengths, embed(tokens)), embed(newest)
        states = [state[before] for state in self.ramp_states(aux)]
        agrees = {}
        for depth, ramps in self.drafter.ramp_sets.items():
            hidden = aux[self.depths.index(depth)][rows] if depth else newest_states
            state = ramps.head.enter(final[before], states)
            given = proposals if ramps.head.reads_lookup else None
            prediction = ramps.predict(hidden, state, given, draft_step=0)
            agrees[depth] = [
                token == target for token, target in zip(prediction.token_ids.tolist(), targets, strict=True)
            ]
        agrees = self._shared(agrees)
        for depth in agrees.keys() - {policy.depth}:
            for active, other in zip(agrees[policy.depth], agrees[depth], strict=True):
                policy.on_shadow(depth, active, other)

    def _shared(self, agrees: dict[int, list[bool]]) -> dict[int, list[bool]]:
        """Rank 0's, by depth: two of a ramp's scores may be as good as equal, and ranks differ in which is larger."""
        values = iter(self.peers.share_floats([float(agree) for each in agrees.values() for agree in each]))
        return {depth: [next(values) == 1.0 for _ in each] for depth, each in agrees.items()}
