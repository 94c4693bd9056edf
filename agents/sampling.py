"""Agents that sample complete responses: one, random tokens, the best of N, and votes.

Votes over final answers (self-consistency) choose among samples without a reward model.
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

# The article's number.
_N_WITHOUT_BUDGET = 4
# A cap on seconds is looked at between waves.
_MOST_A_WAVE = 16


class Blind(Agent):
    """Chooses among candidates without a look at what is behind them."""

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose without searching, for nothing."""
        return [
            Choice(self._index(state, len(row), seed), (None,) * len(row), Usage())
            for state, row in zip(states, candidates, strict=True)
        ]

    def _index(self, state: TextState, count: int, seed: int) -> int:
        """The first: a sample from the language model like the others."""
        return 0


class Sampling(Blind):
    """One response from the language model: the baseline that every search has to beat.

    `params=SamplingParams(temperature=0)` is greedy decoding. No reward model is needed.
    """

    name = "sampling"

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample once."""
        [completion] = await self.complete(state, 1, ledger, seed)
        return completion


class RandomAgent(Blind):
    """Random tokens, uniform over the vocabulary: the least that any agent can do, for nothing."""

    name = "random"

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Draw tokens until a stop token or the limit."""
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
    """Sample responses until there are N or the budget allows no more; keep the best.

    A response is only begun if it could be finished and scored at its longest. What short responses
    leave over is spent on more of them. Sample k of a prompt is the same whatever N is, so a larger
    budget never gives a lower score. A response that was drawn before is not scored again.

    With `keep` below 1 hopeless samples are pruned: all of them are drawn chunk by chunk, and after
    each chunk the share `keep` with the highest values goes on.

    With a `target` sampling ends with the wave in which a response scores as much. Waves begin with
    one response and double.

    Source of the pruning: Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024.
    Deviation: there a share is dropped whenever memory is full, here after every chunk.

    Args:
        value_model: Says which samples are hopeless where `keep` is below 1.
        n: N; None takes as many as the budget allows, or 4 (the article's number) without one.
        keep: Share of the samples that goes on after each chunk (`chunk_tokens`), above 0.
        target: The score from which on a response is good enough; None draws all of them.
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
            raise ValueError(f"keep: expected a share above 0 and up to 1, got {self.keep}.")
        if self.keep < 1 and self.value_model is None:
            raise ValueError(f"keep={self.keep}: expected a value model to prune by, got none.")
        if self.keep < 1 and self.target is not None:
            raise ValueError(f"Expected keep=1.0 with a target, got keep={self.keep}.")

    async def plan(self, search: Search) -> None:
        """Sample one wave after the other, or one set of samples that is pruned."""
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
        """The value model, where there is pruning."""
        return self.value_model if self.keep < 1 else None

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Samples that are not pruned have nothing in common but the prompt."""
        return MOST_AT_ONCE if self.keep == 1 else super()._most_at_once(state, budget)

    async def _pruned(self, search: Search, wanted: int | None) -> None:
        root = search.tree.root
        if wanted is not None and root.samples >= wanted:
            return
        if search.is_capped:
            # More would be begun than can be finished.
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
            # 0.28 x 25 is a little above 7 in floating point.
            kept = math.ceil(self.keep * len(drawn) - 1e-9)
            # As often as they were drawn.
            frontier = [best for best in search.ranked(drawn) for _ in range(drawn.count(best))]
            frontier = frontier[:kept]

    def _affordable(self, search: Search) -> int:
        """How many samples can be begun if a share of them goes on after each chunk."""
        root = search.tree.root
        full = search.width(root, self.chunk_tokens) or 0
        stages = math.ceil(search.room(root.state) / self.chunk_tokens)
        shares = sum(self.keep**stage for stage in range(stages))
        return int(full * stages / shares)


@dataclass(eq=False, kw_only=True)
class Majority(Blind):
    """Sample responses; answer with the first one whose final answer is the most frequent.

    No reward model is needed or asked: the answer has no score. Of final answers that are equally
    frequent, the one that was drawn first is taken; responses without one have no vote.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
    2023.

    Args:
        n: Samples; None takes as many as the budget allows, or 4 without one.
        extract: Where the final answer stands. `"number"`: the last number, or, where there is
            none, the whole response; `"response"`: the whole response; any other word as in
            `rewards.verifiable.answers`, such as `"####"`, `"last line"` or `"\\boxed"`. Or a
            function from the response's text to something that can be compared, or None.

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
                "extract: expected a word such as 'number', 'response' or '####', or a function of "
                f"the response's text, got {self.extract!r}."
            )

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample as often as wanted and allowed, and count the votes."""
        found: list[Completion] = []
        usage, start = self.language_model.usage_bound, len(prefix_of(state))
        is_capped = ledger.budget.ends(self.response_usage(state))
        wanted = self.n or (math.inf if is_capped else _N_WITHOUT_BUDGET)
        while left := min(_MOST_A_WAVE, wanted - len(found)):
            # The ledger affords the first one, by contract, but for seconds that have passed.
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
        """How much a sample's vote counts."""
        return 1.0

    def final_answer(self, text: str) -> Hashable | None:
        """The final answer of a response, for comparison; None where it has none."""
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
        """Of the answer with the most votes, the sample that counts most; the first of equals."""
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
    """`Majority` in which each sample counts with its probability, normalised by its length.

    That is the exponential of the mean log-probability (nats) of its tokens under the language
    model itself, the "weighted sum (normalized)" of Wang et al., 2023. Of the samples with the
    winning answer, the one that counts most is taken.

    Raises:
        ValueError: The language model gives no log-probabilities with its samples.
    """

    name = "weighted-vote"

    def weight(self, completion: Completion) -> float:
        """The sample's probability a token: the geometric mean."""
        logprobs = completion.logprobs
        if not logprobs:
            raise ValueError(
                f"{self.name}: expected samples with the log-probabilities of their tokens, got "
                f"none from {type(self.language_model).__name__}. Use 'majority'."
            )
        return math.exp(sum(logprobs) / len(logprobs))
