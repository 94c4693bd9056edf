"""Agents choose among the chunks that the candidate view offers."""

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.agents import Adaptive, BeamSearch, BestOfN, RandomAgent, Sampling
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, is_terminal, transition
from mbrl_text_env.types import Budget, BudgetError, Chunk, Usage
from tests.toys import PROMPTS, CountReward, LetterEncoder, OptimalValue

LM = NGramLM("abc", seed=3, concentration=50.0, stop_probability=0.0)
STATE = initial(PROMPTS[0], LM)


def ids(text):
    return tuple(LM.alphabet.index(letter) + 1 for letter in text)


LETTERS = [Chunk(ids(letter), (-1.0 - i,)) for i, letter in enumerate("bac")]


def beam(lm=LM, **options):
    reward = CountReward()
    value = OptimalValue(lm, reward, 4)
    return BeamSearch(lm, reward, value, **{"max_response_tokens": 4, "chunk_tokens": 1, **options})


def test_the_chunk_with_the_best_response_behind_it_is_chosen():
    [choice] = beam().choose([STATE], [LETTERS], Budget(tokens=120))
    assert choice.index == 1
    scores = [completion.score for completion in choice.completions]
    assert scores == pytest.approx([0.75, 1.0, 0.75])
    for chunk, completion in zip(LETTERS, choice.completions, strict=True):
        assert completion.state.response_ids[:1] == chunk.token_ids
        assert is_terminal(completion.state)


def test_equal_candidates_are_looked_at_once():
    twice = [LETTERS[0], LETTERS[1], LETTERS[1], LETTERS[0]]
    [choice] = beam().choose([STATE], [twice], Budget(tokens=120))
    [once] = beam().choose([STATE], [LETTERS[:2]], Budget(tokens=120))
    assert choice.index == once.index == 1
    assert choice.usage.generated_tokens == once.usage.generated_tokens
    assert [choice.completions[i] for i in (0, 1)] == list(once.completions)
    assert choice.completions[2:] == choice.completions[1::-1]


def test_chunks_that_end_the_response_are_scored_as_they_are():
    lm = NGramLM("abc", seed=3, stop_probability=0.5)
    stop = min(lm.stop_token_ids)
    candidates = [Chunk((*ids(text), stop), finish_reason="stop") for text in ("b", "aaa")]
    [choice] = BestOfN(lm, CountReward(), max_response_tokens=6).choose(
        [initial(PROMPTS[0], lm)], [candidates]
    )
    assert choice.index == 1
    assert [c.score for c in choice.completions] == [0.0, 1.0]
    assert choice.usage.generated_tokens == 0
    assert choice.usage.reward_calls == 2


def test_a_small_budget_looks_at_the_likely_chunks_only():
    [choice] = BestOfN(LM, CountReward(), max_response_tokens=4).choose(
        [STATE], [LETTERS], Budget(tokens=7)
    )
    found = [completion is not None for completion in choice.completions]
    assert found == [True, True, False]
    with pytest.raises(BudgetError, match="any of the 3 candidates of prompt"):
        BestOfN(LM, CountReward(), max_response_tokens=4).choose(
            [STATE], [LETTERS], Budget(tokens=2)
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 500),
    tokens=st.integers(4, 60),
    calls=st.integers(1, 9),
    stop=st.sampled_from([0.0, 0.4]),
)
def test_the_budget_holds_for_the_whole_decision(seed, tokens, calls, stop):
    lm = NGramLM("abc", seed=seed, stop_probability=stop)
    agent = BestOfN(lm, CountReward(), max_response_tokens=4)
    states = [initial(prompt, lm) for prompt in PROMPTS[:2]]
    rows = lm.sample(states, 3, 2, seeds=[seed] * 2)
    try:
        choices = agent.choose(states, rows, Budget(tokens=tokens, reward_calls=calls), seed=seed)
    except BudgetError:
        return
    for choice in choices:
        assert choice.usage.generated_tokens <= tokens
        assert choice.usage.reward_calls <= calls
        scores = [-np.inf if c is None else c.score for c in choice.completions]
        assert scores[choice.index] == max(scores)


def test_a_batch_chooses_as_single_states_do():
    states = [initial(prompt, LM) for prompt in PROMPTS]
    rows = [LETTERS] * len(states)
    agent = Adaptive(LM, CountReward(), max_response_tokens=6, chunk_tokens=2)
    together = agent.choose(states, rows, Budget(tokens=60), seed=4)
    alone = [agent.choose([s], [LETTERS], Budget(tokens=60), seed=4)[0] for s in states]
    assert [c.index for c in together] == [c.index for c in alone]
    assert [c.completions for c in together] == [c.completions for c in alone]


def test_agents_that_do_not_search():
    states = [initial(prompt, LM) for prompt in PROMPTS]
    sampled = Sampling(LM).choose(states, [LETTERS] * 5)
    assert [choice.index for choice in sampled] == [0] * 5
    drawn = [
        choice.index
        for seed in range(40)
        for choice in RandomAgent(LM).choose(states, [LETTERS] * 5, seed=seed)
    ]
    assert set(drawn) == {0, 1, 2}
    assert all(choice.usage == Usage() for choice in sampled)


@pytest.mark.parametrize(
    ("state", "candidates"),
    [(STATE, []), (transition(STATE, Chunk((1, 2)), 2), LETTERS)],
)
def test_there_has_to_be_something_to_choose(state, candidates):
    with pytest.raises(ValueError, match="at least one candidate"):
        beam().choose([state], [candidates])


def test_the_candidate_view_is_played():
    env = gym.make(
        "mbrl_text_env/CandidateChunks-v0",
        language_model=LM,
        prompts=PROMPTS,
        reward_model=CountReward(),
        num_candidates=3,
        max_chunk_tokens=1,
        max_response_tokens=4,
        encoder=LetterEncoder(),
    )
    agent, total, ended = beam(), 0.0, False
    env.reset(seed=2)
    chances = []
    while not ended:
        candidates = env.get_wrapper_attr("candidates")
        chances.append(any("a" in LM.decode(c.token_ids) for c in candidates))
        [choice] = agent.choose([env.unwrapped.get_state()], [candidates], Budget(tokens=60))
        _, reward, terminated, truncated, _ = env.step(choice.index)
        total, ended = total + reward, terminated or truncated
    assert total == pytest.approx(np.mean(chances))
