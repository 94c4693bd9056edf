"""Rewards made of rewards take functions and names."""

import pytest

from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.rewards.composite.cache import CachedReward
from mbrl_text_env.rewards.composite.combinators import Ensemble, Gate, Product, WeightedSum
from mbrl_text_env.rewards.composite.transforms import (
    Clip,
    LengthPenalty,
    Normalise,
    RepetitionPenalty,
    Threshold,
    TimeLimit,
)
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("ab")


def length(prompt, response):
    return len(response)


MAKERS = {
    "sum": lambda reward: WeightedSum([reward, length], [1, 0]),
    "product": lambda reward: Product([reward]),
    "gate": lambda reward: Gate(reward, lambda prompt, response: 1.0),
    "ensemble": lambda reward: Ensemble([reward, length]),
    "clip": lambda reward: Clip(reward, high=9),
    "threshold": lambda reward: Threshold(reward, 0.1),
    "normalise": Normalise,
    "length": lambda reward: LengthPenalty(reward, 50),
    "repetition": RepetitionPenalty,
    "time": lambda reward: TimeLimit(reward, 60),
    "cache": lambda reward: CachedReward(reward, "scores.sqlite"),
}


def size(prompt, response):
    return len(response) / 10


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("reward", [size, "sentiment"])
def test_it_is_adapted(name, reward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = MAKERS[name](reward)
    assert ("size" if callable(reward) else reward) in made.name
    assert score_responses(made, [PROMPT], ["ab"]).total.shape == (1,)


@pytest.mark.parametrize("name", MAKERS)
def test_none_is_refused_with_what_is_accepted(name):
    with pytest.raises(TypeError, match="Expected a reward, got None"):
        MAKERS[name](None)
