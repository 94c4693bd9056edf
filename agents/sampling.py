"""Agents that sample complete responses: one sample, random tokens, best-of-N, and voting.

Voting over final answers (self-consistency) needs no reward model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mbrl_text_env.agents.base import Agent, Choice, Completion
from mbrl_text_env.agents.driver import MOST_AT_ONCE
from mbrl_text_env.agents.search import Expansion, Planner, Search, affordable, check_target
from mbrl_text_env.language_models.base import prefix_of, stream
from mbrl_text_env.mdp import ChunkRules, transition
from mbrl_text_env.rewards.verifiable.answers import extract_answer, last_number
from mbrl_text_env.types import Budget, Chunk, Ledger, TextState, Usage, check_positive
from mbrl_text_env.values import ValueModel

# The article's N.
_N_WITHOUT_BUDGET = 4
# A budget in seconds is checked between waves.
_MOST_A_WAVE = 16


class Blind(Agent):
    """An agent that chooses among candidates without searching after them."""

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose without searching, at no cost."""
        return [
            Choice(self._index(state, len(row), seed), (None,) * len(row), Usage())
            for state, row in zip(states, candidates, strict=True)
        ]

    def _index(self, state: TextState, count: int, seed: int) -> int:
        """The first candidate: like the others, a sample from the language model."""
        return 0


class Sampling(Blind):
    """Sample one response from the language model: the baseline for every search.

    `params=SamplingParams(temperature=0)` is greedy decoding. No reward model is needed.
    """

    name = "sampling"

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample once."""
        [completion] = await self.complete(state, 1, ledger, seed)
        return completion


class RandomAgent(Blind):
    """Sample tokens uniformly from the vocabulary, at no cost: the weakest baseline."""

    name = "random"

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample tokens until a stop token or the limit."""
        lm, room = self.language_model, self._room(state)
        ids = stream(seed, state, 0).integers(lm.vocab_size, size=room).tolist()
        ended = [length for length, token in enumerate(ids, 1) if token in lm.stop_token_ids]
        ids = ids[: min(ended, default=room)]
        chunk = ChunkRules(lm.vocab_size, lm.stop_token_ids, room).chunk(ids)
        return Completion(transition(state, chunk, self.response_limit(state)))

    def _index(self, state: TextState, count: int, seed: int) -> int:
        return int(stream(seed, state, 0).integers(count))


@dataclass(eq=False, kw_only=True)
class BestOfN(Planner):
    """Sample responses until there are N or the budget is exhausted; keep the best.

    A response is started only if the budget allows it at full length, with its score. Budget that
    short responses leave unused pays for more responses. Sample k does not depend on N, so a larger
    budget never lowers the score. Duplicate responses are scored once.

    With `keep` below 1, samples with low values are pruned: all samples are generated chunk by
    chunk, and after each chunk the fraction `keep` with the highest values continues.

    With a `target`, sampling ends after the wave in which a response reaches it. Waves start with
    one response and double in size.

    Source of the pruning: Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024.
    Deviation: they drop a fraction whenever memory is full; here samples drop after every chunk.

    Args:
        value_model: Ranks the partial samples if `keep` is below 1.
        n: Number of samples. None uses the budget, or 4 (the article's N) without one.
        keep: Fraction of samples that continue after each chunk (`chunk_tokens`), in (0, 1].
        target: Score at which sampling stops; None samples all N.
    """

    name = "best-of-n"

    n: int | None = None
    keep: float = 1.0
    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(n=self.n)
        check_target(self.target)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: expected a number above 0 and up to 1, got {self.keep}.")
        if self.keep < 1 and self.value_model is None:
            raise ValueError(f"keep={self.keep}: pruning needs a value model, got none.")
        if self.keep < 1 and self.target is not None:
            raise ValueError(f"target: expected keep=1.0 with a target, got keep={self.keep}.")

    async def plan(self, search: Search) -> None:
        """Sample in waves, or prune one set of samples."""
        root, wanted = search.tree.root, self.n
        if wanted is None and not search.is_capped:
            wanted = _N_WITHOUT_BUDGET
        if self.keep < 1:
            await self._pruned(search, wanted)
            return
        while (wanted is None or root.samples < wanted) and not search.has_reached(self.target):
            most = _MOST_A_WAVE if self.target is None else min(max(1, root.samples), _MOST_A_WAVE)
            left = most if wanted is None else min(wanted - root.samples, most)
            [row] = await search.expand([Expansion(root, left)])
            if wanted is None or not row:
                return

    def values(self) -> ValueModel | None:
        """The value model, if samples are pruned."""
        return self.value_model if self.keep < 1 else None

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Unpruned samples share only the prompt, so the cache sets no limit."""
        return MOST_AT_ONCE if self.keep == 1 else super()._most_at_once(state, budget)

    async def _pruned(self, search: Search, wanted: int | None) -> None:
        root = search.tree.root
        if wanted is not None and root.samples >= wanted:
            return
        if search.is_capped:
            # Otherwise more samples would start than can finish.
            most = self._affordable(search)
            wanted = most if wanted is None else min(wanted, most)
        assert wanted is not None
        frontier = [root] * max(1, wanted)
        while frontier:
            rows = await search.expand(
                Expansion(node, count, self.chunk_tokens)
                for node, count in Counter(frontier).items()
            )
            drawn = [node for row in rows for node in row if not node.is_terminal]
            # 0.28 x 25 is slightly above 7 in floating point.
            kept = math.ceil(self.keep * len(drawn) - 1e-9)
            # Each node once for each time it was drawn.
            frontier = [best for best in search.ranked(drawn) for _ in range(drawn.count(best))]
            frontier = frontier[:kept]

    def _affordable(self, search: Search) -> int:
        """Number of samples to start if the fraction `keep` continues after each chunk."""
        root = search.tree.root
        full = search.width(root, self.chunk_tokens) or 0
        stages = math.ceil(search.room(root.state) / self.chunk_tokens)
        shares = sum(self.keep**stage for stage in range(stages))
        return int(full * stages / shares)


@dataclass(eq=False, kw_only=True)
class Majority(Blind):
    """Majority voting: sample responses and return the first one with the most frequent answer.

    No reward model is used, so the response has no score. If answers are tied, the one sampled
    first wins. Responses without a final answer have no vote.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
    2023.

    Args:
        n: Number of samples. None uses the budget, or 4 without one.
        extract: How to find the final answer. `"number"` takes the last number, or the whole
            response if there is none. `"response"` takes the whole response. Other words, such as
            `"####"`, `"last line"` or `"\\boxed"`, are those of `rewards.verifiable.answers`. A
            function maps the response text to a hashable value, or to None for no answer.

    Example:
        >>> from mbrl_text_env.language_models import TableLM
        >>> from mbrl_text_env.types import Prompt
        >>> lm = TableLM("13", {"": [0.0, 0.3, 0.7], "1": [1.0, 0, 0], "3": [1.0, 0, 0]})
        >>> Majority(lm, n=99).generate([Prompt.from_text("1")])[0].text
        '3'
    """

    name = "majority"

    n: int | None = None
    extract: str | Callable[[str], Hashable | None] = "number"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(n=self.n)
        if not callable(self.extract) and not (isinstance(self.extract, str) and self.extract):
            raise ValueError(
                "extract: expected a word such as 'number', 'response' or '####', or a function "
                f"of the response text, got {self.extract!r}."
            )

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample up to `n` responses within the budget, then count the votes."""
        found: list[Completion] = []
        usage, start = self.language_model.usage_bound, len(prefix_of(state))
        is_capped = ledger.budget.ends(self.response_usage(state))
        wanted = self.n or (math.inf if is_capped else _N_WITHOUT_BUDGET)
        while left := min(_MOST_A_WAVE, wanted - len(found)):
            # The ledger always affords the first sample, unless its seconds have run out.
            count = affordable(
                ledger, lambda count: usage(start, [self._room(state)] * count), int(left)
            )
            count = count or int(not found)
            if not count:
                break
            first = len(found)
            found += await self.complete(state, count, ledger, seed, first_sample=first)
        return self._winner(found)

    def weight(self, completion: Completion) -> float:
        """Weight of a sample's vote."""
        return 1.0

    def final_answer(self, text: str) -> Hashable | None:
        """Return the final answer in a comparable form; None if there is none."""
        if callable(self.extract):
            return self.extract(text)
        whole = " ".join(text.split()) or None
        if self.extract == "response":
            return whole
        if self.extract == "number":
            number: Fraction | None = last_number(text)
            return whole if number is None else number
        return extract_answer(text, self.extract)

    def _winner(self, found: list[Completion]) -> Completion:
        """Return the sample of highest weight for the winning answer; the first if tied."""
        decode, votes = self.language_model.decode, defaultdict[Hashable, float](float)
        answers = [self.final_answer(decode(each.state.response_ids)) for each in found]
        weights = [self.weight(each) for each in found]
        for answer, weight in zip(answers, weights, strict=True):
            if answer is not None:
                votes[answer] += weight
        if not votes:
            return found[0]
        winner = max(votes, key=votes.__getitem__)
        places = [i for i, answer in enumerate(answers) if answer == winner]
        return found[max(places, key=weights.__getitem__)]


@dataclass(eq=False, kw_only=True)
class WeightedVote(Majority):
    """Majority voting in which each vote is weighted by the sample's length-normalised probability.

    The weight is the exponential of the mean token log-probability (nats) under the language model
    itself: the "weighted sum (normalized)" of Wang et al., 2023. Among samples with the winning
    answer, the one with the highest weight is returned.

    Raises:
        ValueError: The language model returns no log-probabilities with its samples.
    """

    name = "weighted-vote"

    def weight(self, completion: Completion) -> float:
        """Geometric mean of the token probabilities."""
        logprobs = completion.logprobs
        if not logprobs:
            raise ValueError(
                f"{self.name}: expected samples with token log-probabilities, got none from "
                f"{type(self.language_model).__name__}. Use 'majority' instead."
            )
        return math.exp(sum(logprobs) / len(logprobs))
