"""Records of a toy language model, shared by the tests of the value models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from mbrl_text_env.agents.values import (
    EmbeddingValue,
    HiddenStateValue,
    PrefixRewardValue,
    StackedValue,
)
from mbrl_text_env.fitting.report import Samples
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import FloatArray, Prompt, TextState
from tests.toys import CountReward, LetterEncoder

LM = NGramLM("abcde", order=2, seed=1)
LENGTHS = (2, 4, 8)
TOKENS = 12
PROMPTS = [Prompt.from_text("abcde"[i % 5] + "abcde"[i // 5 % 5] + "ab"[i % 2]) for i in range(24)]


class PaidReward(CountReward):
    """`CountReward` that says what it takes: as many operations as there are characters."""

    name = "paid"

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        return np.asarray([float(len(response)) for response in responses])

    def flops_bound(self) -> float:
        return float(TOKENS)


def complete(prompt: Prompt, samples: int, seed: int = 0, tokens: int = TOKENS) -> list[TextState]:
    """Whole responses of the toy language model."""
    state = initial(prompt, LM)
    [chunks] = LM.sample([state], samples, tokens, seeds=[spawn_seed(seed, 1)])
    return [transition(state, chunk, tokens) for chunk in chunks]


def toy_records(
    reward: RewardModel | None = None,
    prompts: Sequence[Prompt] = PROMPTS,
    samples: int = 6,
    seed: int = 0,
) -> list[Record]:
    """Scored responses with their tokens and log-probabilities."""
    reward = reward or CountReward()
    records = []
    for prompt in prompts:
        state = initial(prompt, LM)
        [chunks] = LM.sample([state], samples, TOKENS, seeds=[spawn_seed(seed, 1)])
        for chunk in chunks:
            after = transition(state, chunk, TOKENS)
            text = LM.decode(after.response_ids)
            scores = score_responses(reward, [prompt], [text])
            records.append(
                Record.from_state(
                    after, response=text, score=float(scores.total[0]), rewards=scores.parts_of(0),
                    reward_name=reward.name, agent="sampling", language_model=LM.name, seed=seed,
                    logprobs=chunk.logprobs,
                )
            )  # fmt: skip
    return records


def prefixes() -> list[TextState]:
    """States to predict: empty, short, long, ended, with and without log-probability."""
    found = [initial(PROMPTS[0], LM)]
    for i, record in enumerate(toy_records(samples=1, seed=9)[:6]):
        size = len(record.response_ids)
        found += [record.prefix_state(min(n, size)) for n in (1 + i % 3, 5, TOKENS)]
    bare = found[-2]
    return [*found, TextState(bare.prompt, bare.prompt_ids, bare.response_ids)]


def make_values(records: Sequence[Record] | None = None) -> dict[str, object]:
    """One of every kind, ready to predict."""
    records = toy_records(PaidReward()) if records is None else records
    reward, encoder, lengths = PaidReward(), LetterEncoder(), {"lengths": LENGTHS}
    return {
        "embedding": EmbeddingValue(LM, encoder).fit(records),
        "prefix": PrefixRewardValue(reward, LM),
        "calibrated": PrefixRewardValue(reward, LM, **lengths).fit(records),
        "hidden": HiddenStateValue(LM, **lengths).fit(records),
        "ridge": StackedValue(LM, reward, **lengths).fit(records),
    }


def written(
    prompt: str, response: str, score: float, *, logprobs: Sequence[float] = (), **changes: object
) -> Record:
    """A record of a response and a score that a test made up."""
    reward = str(changes.pop("reward_name", "count"))
    asked = Prompt.from_text(prompt)
    ids = LM.encode_prompt(Prompt.from_text(response)) if response else ()
    record = Record.from_state(
        TextState(asked, LM.encode_prompt(asked), ids, "length"),
        response=response, score=score, rewards={reward: score}, reward_name=reward,
        agent="sampling", language_model=LM.name, seed=0, logprobs=logprobs,
    )  # fmt: skip
    return replace(record, **changes)  # type: ignore[arg-type]


def state_of(response: str, prompt: str = "abc", logprob: float | None = None) -> TextState:
    """A state that a test made up."""
    asked = Prompt.from_text(prompt)
    ids = LM.encode_prompt(Prompt.from_text(response)) if response else ()
    return TextState(asked, LM.encode_prompt(asked), ids, logprob=logprob)


def samples(
    inputs: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Samples:
    """Prefixes as numbers; all of length 0 and each of a prompt of its own unless it is said."""
    count = len(np.asarray(scores))
    return Samples(
        np.asarray(inputs, dtype=float).reshape(count, -1),
        np.asarray(scores, dtype=float),
        np.asarray(np.zeros(count) if lengths is None else lengths, dtype=np.int64),
        np.asarray(np.arange(count) if groups is None else groups, dtype=np.int64),
    )
