"""A trained choice as an agent: the same choices as in the environment, and hard budgets."""

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import checks
from mbrl_text_env.agents.learning import TuningError
from mbrl_text_env.agents.model_free import CandidateAgent, CandidateView, load_policy, play
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, is_terminal
from mbrl_text_env.proposer import FeatureLayout
from mbrl_text_env.types import Budget, Ledger, Prompt
from tests.agents.model_free.choice_worlds import LM, PROMPTS, VIEW, LetterShares, reward
from tests.agents.model_free.test_candidate_policy import greedy, policy


def agent(**options):
    return CandidateAgent(LM, reward(), greedy(), **options)


def test_without_a_budget_it_plays_one_episode():
    found = agent().generate(PROMPTS, seed=3)
    proposer = greedy().view.proposer(LM, reward(), PROMPTS, None)
    states = [initial(prompt, LM) for prompt in PROMPTS]
    ended = play(proposer, greedy().choose, states, [3, 3], [Ledger(), Ledger()])
    for generation, end in zip(found, ended, strict=True):
        assert generation.usage.generated_tokens == 4 * 4 * 2
        # The last chunk's candidates are complete responses, and the best of them is known.
        assert generation.completion.state.response_ids[:6] == end.response_ids[:6]
        assert generation.completion.state == end


def test_it_acts_in_the_candidate_view_as_it_does_alone():
    options = {"num_candidates": 4, "max_chunk_tokens": 2, "max_response_tokens": 8}
    env = gym.make(
        "mbrl_text_env/CandidateChunks-v0", language_model=LM, prompts=PROMPTS,
        reward_model=reward(), encoder=None, prefix_rewards=True, **options,
    )  # fmt: skip
    observation, _ = env.reset(seed=0)
    has_ended = False
    while not has_ended:
        [action] = greedy().choose(observation[None])
        observation, _, terminated, truncated, info = env.step(int(action))
        has_ended = terminated or truncated
    assert info["score"] > 0.5


@settings(deadline=None, max_examples=40)
@given(
    st.integers(8, 120),
    st.sampled_from(["tokens", "flops", "reward_calls"]),
    st.integers(0, 5),
    st.sampled_from([None, "own", "language_model"]),
)
def test_no_budget_is_overspent(size, unit, seed, encoder):
    own = LetterShares() if encoder == "own" else None
    size_of = {None: 0, "own": 2, "language_model": LM.feature_size}[encoder]
    view = CandidateView(**{**VIEW, "encoder": encoder})
    found = policy(FeatureLayout(4, size_of, True), view=view, encoder=own)
    player = CandidateAgent(LM, reward(), found)
    scale = {"tokens": 1, "flops": 500, "reward_calls": 1}[unit]
    budget = Budget(**{unit: size * scale})
    for generation in player.generate(PROMPTS, budget, seed=seed):
        assert budget.after(generation.usage) is not None or (
            getattr(generation.usage, {"tokens": "generated_tokens"}.get(unit, unit))
            <= size * scale
        )
        assert is_terminal(generation.completion.state)
        assert generation.completion.score is not None


def test_more_budget_plays_more_episodes():
    totals = {}
    for tokens in (32, 320):
        found = [
            g for s in range(8) for g in agent().generate(PROMPTS, Budget(tokens=tokens), seed=s)
        ]
        assert all(g.usage.generated_tokens <= tokens for g in found)
        totals[tokens] = sum(g.completion.score for g in found)
    assert totals[320] > totals[32]


def test_side_by_side_equals_alone():
    view = CandidateView(**{**VIEW, "encoder": "own"}, prefix_rewards=False)
    found = policy(FeatureLayout(4, 2), view=view, encoder=LetterShares())
    player = CandidateAgent(LM, reward(), found)
    together = player.generate(PROMPTS, Budget(tokens=100), seed=2)
    alone = [player.generate([prompt], Budget(tokens=100), seed=2)[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.completion == other.completion
        assert one.usage.generated_tokens == other.usage.generated_tokens


def test_its_search_can_be_looked_at():
    [(answer, tree)] = agent().explore(PROMPTS[:1], seed=0)
    first = tree.root.children
    assert sum("chosen" in node.note for node in first) == 1
    assert answer.completion.state == tree.chosen.state


def test_the_contract():
    checks.check_agent(agent(), PROMPTS)


def test_another_model_is_refused(tmp_path):
    other = NGramLM("ab", seed=5)
    other.name = "other"
    with pytest.raises(TuningError, match="language model"):
        CandidateAgent(other, reward(), greedy())
    greedy().save(tmp_path / "p")
    with pytest.raises(TuningError, match="language model"):
        load_policy(tmp_path / "p", other)


def test_the_real_models(smollm2):
    """MiniLM embeds for searches side by side, and its operations are counted."""
    view = CandidateView(2, 8, 16)
    found = policy(
        FeatureLayout(2, 384, True), view=view, language_model_name=None, reward_name=None
    )
    player = CandidateAgent(smollm2, reward(), found)
    prompts = [Prompt.from_text("Praise the sea."), Prompt.from_text("Name a fruit.")]
    found = player.generate(prompts, Budget(tokens=48))
    assert [g.completion.score is not None for g in found] == [True, True]
    for generation in found:
        assert generation.usage.generated_tokens <= 48
        assert generation.usage.value_flops > 1e8
