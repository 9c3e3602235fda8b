"""The loop: contexts enter free lanes, all live hypotheses step together, finished contexts leave.

A step reads the device once: the best continuations of every context. What follows from them is
worked out in plain numbers (`rules`), and goes back as indices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layout import SequenceLayout
from .cache import KeyValuePool, Prefill, Step
from .options import SearchOptions
from .rules import Hypothesis, Search, start
from .scores import Scores

TOKENS_AT_ONCE = 4096  # of contexts that are read together


class Decoding:
    """Decodes contexts with at most `lanes` of them alive.

    Args:
        model: A causal language model of this package: `transformer`, `lm_head`, `config`.
        options: Of the search.
        lanes: Contexts alive at once.
        contexts: Checked ids.
        draws: (contexts, max_new_tokens) uniform numbers, where tokens are sampled.
    """

    def __init__(
        self,
        model: nn.Module,
        options: SearchOptions,
        lanes: int,
        contexts: Sequence[tuple[int, ...]],
        draws: Tensor | None,
    ) -> None:
        self.body, self.options, self.draws = model.transformer, options, draws
        self.device = model.transformer.wte.weight.device
        self.lanes = min(lanes, len(contexts))
        # long contexts first: lanes are as wide as their longest
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        self.waiting = deque(start(i, contexts[i], options) for i in order)
        self.active: list[Search] = []  # lane i is active[i]
        self.results: list[list[int]] = [[] for _ in contexts]
        self.scores = Scores(model.lm_head, model.config.vocab_size)
        config = model.config
        beams, new = options.num_beams, options.max_new_tokens
        layers = [config.of_layer(i) for i in range(config.num_hidden_layers)]
        heads = [(layer.num_attention_heads, layer.head_size) for layer in layers]
        slots = max(map(len, contexts)) + min(beams * new, new + 2 * beams)
        self.pool = KeyValuePool(heads, self.lanes, beams, slots, self.body.wpe.weight)

    def run(self) -> list[list[int]]:
        """The new tokens of every context, in the order given."""
        while self.active or self.waiting:
            stepping = len(self.active)
            hidden = [self._step()] if stepping else []
            hidden += self._admit()
            self.scores.of(torch.cat(hidden))
            self._choose()
            self._retire()
        return self.results

    # ------------------------------------------------------------------ contexts enter and leave

    def _admit(self) -> list[Tensor]:
        """Reads waiting contexts into free lanes; the states of their last tokens, (n, H) each.

        A few at a time: the weights are read from memory once for all that enter together.
        """
        free = self.lanes - len(self.active)
        if self.active and free < self.lanes / 4:
            return []
        hidden = []
        while self.waiting and free:
            group, tokens = [], 0
            while self.waiting and len(group) < free:
                tokens += len(self.waiting[0].context)
                if group and tokens > TOKENS_AT_ONCE:
                    break
                group.append(self.waiting.popleft())
            free -= len(group)
            hidden.append(self._prefill(group))
            self.active += group
        return hidden

    def _prefill(self, group: list[Search]) -> Tensor:
        lengths = torch.tensor([0] + [len(search.context) for search in group])
        offsets = lengths.cumsum(0).int().to(self.device)
        layout = SequenceLayout.packed(offsets, int(lengths.max()), int(lengths.sum()))
        ids = [token for search in group for token in search.context]
        cache = Prefill(self.pool, len(self.active), layout)
        hidden = self._states(self._tensor(ids), layout.position_ids(), layout, cache)
        return hidden[offsets[1:].long() - 1]

    def _retire(self) -> None:
        """Takes finished contexts out; the last lane moves into a gap."""
        for lane in reversed(range(len(self.active))):
            search = self.active[lane]
            if not search.done:
                continue
            self.results[search.number] = search.result
            last = self.active.pop()
            if last is not search:
                self.active[lane] = last
                self.pool.move(len(self.active), lane)
        if not self.active:
            self.pool.width = 0

    # ------------------------------------------------------------------ one token further

    def _step(self) -> Tensor:
        """Feeds the last token of every live hypothesis; their states, (R, H)."""
        tokens, positions, places, slots, parents = [], [], [], [], []
        beams = self.options.num_beams
        for lane, search in enumerate(self.active):
            used = (1 << len(search.context)) - 1
            for hypothesis in search.live:
                used |= hypothesis.slots
            position = len(search.context) + search.length - 1
            for place, hypothesis in enumerate(search.live):
                free = ~used & (used + 1)  # the lowest bit not set
                used |= free
                hypothesis.slots |= free
                slots.append(free.bit_length() - 1)
                tokens.append(hypothesis.tokens[-1])
                places.append(lane * beams + place)
                positions.append(position)
            of_lane = [hypothesis.parent for hypothesis in search.live]
            parents.append(of_lane + [0] * (beams - len(of_lane)))
        self.pool.reserve(max(slots) + 1)
        index = self._tensor([tokens, positions, places, slots])
        cache = Step(self.pool, len(self.active), self._tensor(parents), index[2], index[3])
        return self._states(index[0], index[1], None, cache)

    def _states(
        self, ids: Tensor, positions: Tensor, layout: SequenceLayout | None, cache: Prefill | Step
    ) -> Tensor:
        output = self.body(
            ids, position_ids=positions, layout=layout, cache=cache, return_dict=True,
            output_attentions=False, output_hidden_states=False,
        )  # fmt: skip
        return output.last_hidden_state

    def _choose(self) -> None:
        """Gives every context its best continuations."""
        rows = [(search, item) for search in self.active for item in search.live]
        if self.options.is_beam:
            chosen = self._best_continuations(rows)
        else:
            chosen = self._single_continuations(rows)
        for search, scores, parents, tokens in zip(self.active, *chosen.tolist(), strict=True):
            search.advance(zip(scores, map(int, parents), map(int, tokens), strict=True))

    def _best_continuations(self, rows: list[tuple[Search, Hypothesis]]) -> Tensor:
        """(3, n, c) doubles: S, parent and token of the best c continuations of n contexts."""
        options, scores = self.options, self.scores
        after = options.rules == "transformers"  # its edits come after the normaliser
        log_sums = scores.log_sums() if after or not options.edits_scores else None
        if options.edits_scores:
            scores.edit(rows, log_sums)
        if log_sums is None:
            log_sums = scores.log_sums()
        count, beams = options.num_candidates, options.num_beams
        values, tokens = scores.best(count)  # (R, c) each
        so_far = torch.tensor([item.score for _, item in rows], device=self.device)
        # where a row forbids every token its normaliser is no number
        values = torch.where(values == -torch.inf, values, values - log_sums + so_far[:, None])
        # from rows to (context, place among its live hypotheses), where a context may have fewer
        places = self._tensor([
            lane * beams + place
            for lane, search in enumerate(self.active) for place in range(len(search.live))
        ])  # fmt: skip
        grid = values.new_full((len(self.active) * beams, count), -torch.inf)
        token_grid = tokens.new_zeros(grid.shape)
        grid[places], token_grid[places] = values, tokens
        best = grid.view(len(self.active), -1).topk(count)  # (n, c)
        chosen = token_grid.view(len(self.active), -1).gather(1, best.indices)
        return torch.stack(
            [best.values.double(), (best.indices // count).double(), chosen.double()]
        )

    def _single_continuations(self, rows: list[tuple[Search, Hypothesis]]) -> Tensor:
        """(3, n, 1) doubles: 0, 0 and the token, the best one or a sampled one."""
        if self.options.edits_scores:
            self.scores.edit(rows, None)
        if self.draws is None:
            tokens = self.scores.highest()
        else:
            drawn = torch.stack([self.draws[s.number, s.length] for s, _ in rows])
            tokens = self.scores.sample(drawn.to(self.device), self.options)
        chosen = tokens.double()[None, :, None]
        return torch.cat([torch.zeros_like(chosen).expand(2, -1, -1), chosen])

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, device=self.device)
