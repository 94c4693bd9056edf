import itertools

import gymnasium as gym
import numpy as np
import pytest

from mbrl_text_env.env import TextGenerationEnv
from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueModelError
from mbrl_text_env.wrappers import CandidateChunks, KLPenalty, PotentialShaping
from tests.toys import CountReward, FixedValue, toy_options


def small_env():
    """Responses of up to 3 letters out of two: 15 of them, all within reach of enumeration."""
    return TextGenerationEnv(
        prompts=[Prompt.from_text("ab")],
        tokenizer=NGramLM("ab"),
        reward_model=CountReward(),
        max_chunk_tokens=1,
        max_response_tokens=3,
    )


def episodes(env, discount):
    """Discounted return of every sequence of tokens that makes a whole episode."""
    returns = {}
    for length in (1, 2, 3):
        for tokens in itertools.product((0, 1, 2), repeat=length):
            env.reset(seed=0)
            total, ended, played = 0.0, False, 0
            for token in tokens:
                if ended or (token == 0 and played < length - 1):
                    break
                _, reward, terminated, truncated, _ = env.step([token])
                total += discount**played * reward
                ended, played = terminated or truncated, played + 1
            if ended and played == length:
                returns[tokens] = total
    return returns


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_shaping_keeps_every_comparison_of_policies(discount):
    """Every episode's return moves by the same constant: minus the first state's potential."""
    env = small_env()
    plain = episodes(env, discount)
    misleading = FixedValue(
        lambda text: 5.0 - 3 * text.count("a") + 7 * text.count("b"), NGramLM("ab")
    )
    shaped = episodes(PotentialShaping(env, misleading, discount), discount)
    assert len(plain) == 1 + 2 + 4 + 8
    assert {k: shaped[k] - plain[k] for k in plain} == pytest.approx(dict.fromkeys(plain, -5.0))
    best = max(plain.values())
    assert {k for k, v in plain.items() if v == best} == {
        k for k, v in shaped.items() if v == pytest.approx(best - 5.0)
    }


def test_shaping_over_the_candidate_view():
    lm = NGramLM("abcde", seed=1)
    value = FixedValue(len, lm)
    env = PotentialShaping(
        CandidateChunks(TextGenerationEnv(**toy_options()), lm, encoder=None), value
    )
    env.reset(seed=0)
    chunk = env.env.candidates[0]
    _, reward, terminated, _, info = env.step(0)
    expected = 0.0 if terminated else len(lm.decode(chunk.token_ids))
    assert reward == info["unshaped_reward"] + expected


def test_shaping_refuses_what_is_no_value():
    class Unfitted(FixedValue):
        is_fitted = False

    env = PotentialShaping(small_env(), Unfitted(len, NGramLM("ab")))
    env.reset(seed=0)
    with pytest.raises(ValueModelError, match="not fitted"):
        env.step([1])
    with pytest.raises(ValueError, match="discount"):
        PotentialShaping(small_env(), FixedValue(len, None), discount=0)
    with pytest.raises(TypeError, match="TextGenerationEnv"):
        PotentialShaping(gym.make("CartPole-v1"), FixedValue(len, None))


def test_kl_penalty_by_hand():
    reference = TableLM("ab", {"": [0.2, 0.5, 0.3], "a": [0.1, 0.1, 0.8]})
    policy = TableLM("ab", {"": [0.0, 1.0, 0.0], "a": [0.5, 0.25, 0.25]})
    options = toy_options(tokenizer=reference, prompts=[Prompt.from_text("ab")])
    env = KLPenalty(TextGenerationEnv(**options), reference, coefficient=2.0, policy=policy)
    env.reset(seed=0)
    _, reward, _, _, info = env.step([1, 0])
    ratio = np.log(1.0 / 0.5) + np.log(0.5 / 0.1)
    assert info["kl"] == pytest.approx(ratio)
    assert reward == pytest.approx(1.0 - 2.0 * ratio)
    alone = KLPenalty(TextGenerationEnv(**options), reference, coefficient=2.0)
    alone.reset(seed=0)
    assert alone.step([1, 0])[4]["kl"] == pytest.approx(-np.log(0.5) - np.log(0.1))


def test_kl_penalty_estimates_the_divergence():
    """Over episodes drawn from the policy, the mean ratio is the KL divergence by enumeration."""
    policy, reference = NGramLM("ab", order=2, seed=1), NGramLM("ab", order=2, seed=2)
    env = KLPenalty(
        TextGenerationEnv(
            prompts=[Prompt.from_text("ab")],
            tokenizer=policy,
            reward_model=CountReward(),
            max_chunk_tokens=4,
            max_response_tokens=4,
        ),
        reference,
        coefficient=1.0,
        policy=policy,
    )
    env.reset(seed=0)
    start = env.unwrapped.get_state()
    exact = sum(
        p * (np.log(p) - np.log(q))
        for (_, p), (_, q) in zip(
            policy.responses(start, 4), reference.responses(start, 4), strict=True
        )
    )
    ratios = []
    for chunks in policy.sample([start], 4000, 4, seeds=[0]):
        for chunk in chunks:
            env.reset()
            ratios.append(env.step(chunk.token_ids)[4]["kl"])
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert np.mean(ratios) == pytest.approx(exact, abs=4 * error)


def test_kl_penalty_refuses_a_negative_coefficient():
    with pytest.raises(ValueError, match="coefficient"):
        KLPenalty(small_env(), NGramLM("ab"), coefficient=-1)
