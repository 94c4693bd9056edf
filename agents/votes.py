"""Votes over final answers (self-consistency): a choice among samples without a reward model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction

from mbrl_text_env.agents.base import Completion
from mbrl_text_env.agents.sampling import Blind
from mbrl_text_env.agents.search import affordable
from mbrl_text_env.language_models.base import prefix_of
from mbrl_text_env.rewards.verifiable.answers import extract_answer, last_number
from mbrl_text_env.types import Ledger, TextState, check_positive

# The article's number of samples, as for best-of-N.
_N_WITHOUT_BUDGET = 4
# A cap on seconds is looked at between waves.
_MOST_A_WAVE = 16


@dataclass(eq=False, kw_only=True)
class Majority(Blind):
    """Sample responses; answer with the first one whose final answer is the most frequent.

    No reward model is needed or asked: the answer has no score, as that of `Sampling`; comparisons
    score it. Of final answers that are equally frequent, the one that was drawn first is taken;
    responses without a final answer have no vote. In the candidate view it takes the first
    candidate.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
    2023.

    Args:
        n: Samples; None takes as many as the budget allows, or 4 without one.
        extract: Where the final answer stands. `"number"`: the last number, or, where there is
            none, the whole response; `"response"`: the whole response, for answers that are lists
            or several numbers; any other word as in `rewards.verifiable.answers`, such as `"####"`,
            `"last line"` or `"\\boxed"`. Or a function from the response's text to something that
            can be compared, or None.

    The other arguments are those of every `Agent`.

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
