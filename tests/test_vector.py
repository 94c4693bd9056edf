import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.env import stack_infos
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import EpisodeEndedError, initial
from mbrl_text_env.rewards import RewardError
from mbrl_text_env.types import Prompt
from tests.toys import CountReward, LetterEncoder, StepReward, toy_options

TEXT, CANDIDATES = "mbrl_text_env/TextGeneration-v0", "mbrl_text_env/CandidateChunks-v0"
MODES = [
    {},
    {"reward": "delta", "observation": "tokens"},
    {"reward": "process", "reward_model": StepReward()},
    {"observation": "embedding", "encoder": LetterEncoder()},
]


def candidate_options(**changes):
    options = toy_options(language_model=NGramLM("abcde", seed=1), num_candidates=3, **changes)
    del options["tokenizer"]
    return {"encoder": None, **options}


def singles(env_id, count, mode, options):
    return SyncVectorEnv([lambda: gym.make(env_id, **options)] * count, autoreset_mode=mode)


def assert_equal_runs(vector, reference, actions, steps, mode):
    """Both are stepped with the same actions; all five results are equal at every step."""
    assert data_equivalence(vector.reset(seed=7), reference.reset(seed=7), exact=True)
    for step in range(steps):
        chosen = actions(step)
        ours, theirs = vector.step(chosen), reference.step(chosen)
        assert data_equivalence(ours, theirs, exact=True), f"{ours}\n{theirs}"
        if mode == AutoresetMode.DISABLED and (ours[2] | ours[3]).any():
            mask = ours[2] | ours[3]
            ours = vector.reset(options={"reset_mask": mask})
            theirs = reference.reset(options={"reset_mask": mask})
            assert data_equivalence(ours, theirs, exact=True)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("changes", MODES)
def test_text_vector_equals_singles(mode, changes):
    options = toy_options(**changes)
    vector = gym.make_vec(TEXT, num_envs=5, autoreset_mode=mode, **options)
    reference = singles(TEXT, 5, mode, options)
    vector.action_space.seed(0)
    drawn = [vector.action_space.sample() for _ in range(30)]
    assert_equal_runs(vector, reference, lambda step: drawn[step], 30, mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("encoder", [None, "language_model", LetterEncoder()])
def test_candidate_vector_equals_singles(mode, encoder):
    options = candidate_options(encoder=encoder)
    vector = gym.make_vec(CANDIDATES, num_envs=4, autoreset_mode=mode, **options)
    reference = singles(CANDIDATES, 4, mode, options)
    rng = np.random.default_rng(0)
    drawn = rng.integers(3, size=(30, 4))
    assert_equal_runs(vector, reference, lambda step: drawn[step], 30, mode)


def test_one_reward_call_and_one_model_call_a_step():
    reward, calls = CountReward(), []

    class Counting(NGramLM):
        def sample(self, states, *args, **kwargs):
            calls.append(len(states))
            return super().sample(states, *args, **kwargs)

    options = candidate_options(reward_model=reward)
    options["language_model"] = Counting("abcde", seed=1)
    env = gym.make_vec(CANDIDATES, num_envs=6, autoreset_mode="SameStep", **options)
    env.reset(seed=0)
    for _ in range(10):
        env.step([0] * 6)
    assert calls == [6] * 11
    assert len(reward.calls) <= 10
    assert sum(map(len, reward.calls)) > len(reward.calls)  # batched


def test_seeds():
    env = gym.make_vec(TEXT, num_envs=3, **toy_options())
    _, first = env.reset(seed=5)
    _, second = env.reset(seed=[5, 6, 7])
    assert first["prompt_id"].tolist() == second["prompt_id"].tolist()
    with pytest.raises(ValueError, match="3 seeds"):
        env.reset(seed=[1])


def test_refusals():
    with pytest.raises(ValueError, match="num_envs"):
        gym.make_vec(TEXT, num_envs=0, **toy_options())
    env = gym.make_vec(TEXT, num_envs=2, autoreset_mode="Disabled", **toy_options())
    with pytest.raises(gym.error.ResetNeeded):
        env.step([[1], [1]])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="2 actions"):
        env.step([[1]])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.zeros(2, dtype=bool)})
    env.step([[0], [1]])
    with pytest.raises(EpisodeEndedError, match=r"\[0\].*reset_mask"):
        env.step([[1], [1]])


def test_render_and_states():
    env = gym.make_vec(TEXT, num_envs=2, render_mode="ansi", **toy_options())
    env.reset(seed=0)
    env.step([[1], [2]])
    assert [text.splitlines()[1] for text in env.render()] == [
        "Response: a [...]",
        "Response: b [...]",
    ]
    states = env.unwrapped.states
    env.step([[0], [0]])
    observations, _ = env.unwrapped.set_states(states)
    assert observations["response"] == ("a", "b")
    with pytest.raises(ValueError, match="2 states"):
        env.unwrapped.set_states(states[:1])


values = st.one_of(
    st.booleans(), st.integers(-9, 9), st.floats(-1, 1), st.text(max_size=3), st.none(),
    st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from("abc"), values, max_size=3).flatmap(
        lambda row: st.lists(
            st.one_of(st.just({}), st.just(row), st.just({**row, "deep": {"x": 1.0}})),
            min_size=1,
            max_size=4,
        )
    )
)
def test_stack_infos_equals_gymnasium(rows):
    reference = gym.vector.VectorEnv()
    reference.num_envs = len(rows)
    expected = {}
    for i, row in enumerate(rows):
        expected = reference._add_info(expected, row, i)
    assert data_equivalence(stack_infos(rows), expected, exact=True)


class Fussy(StepReward):
    """Cannot score answers to one prompt."""

    def score(self, prompts, responses):
        if any(prompt.text == "c" for prompt in prompts):
            raise ZeroDivisionError("too hard")
        return super().score(prompts, responses)

    def score_steps(self, prompt, steps):
        self.score([prompt], ["".join(steps)])
        return super().score_steps(prompt, steps)


@pytest.mark.filterwarnings("ignore:.*An episode ends without a score")
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("reward", ["terminal", "delta", "process"])
def test_a_response_that_cannot_be_scored_costs_its_episode_alone(reward, mode):
    options = toy_options(reward=reward, reward_model=Fussy(), on_reward_error="record")
    sound = gym.make_vec(
        TEXT, num_envs=5, autoreset_mode=mode, **{**options, "reward_model": StepReward()}
    )
    vector = gym.make_vec(TEXT, num_envs=5, autoreset_mode=mode, **options)
    vector.reset(options={"prompt": 0}, seed=0)
    sound.reset(options={"prompt": 0}, seed=0)
    states = vector.unwrapped.states
    # The fourth of five answers a prompt that cannot be scored.
    hard = Prompt.from_text("c")
    states[3] = initial(hard, options["tokenizer"])
    for env in (vector, sound):
        env.unwrapped.set_states(states)
    (stop,) = options["tokenizer"].stop_token_ids
    actions = [[1, stop]] * 5
    ours, theirs = vector.step(actions), sound.step(actions)
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(ours[1][others], theirs[1][others])
    assert np.isnan(ours[1][3])
    assert ours[2].tolist() == theirs[2].tolist() == [True] * 5
    infos = ours[4]["final_info"] if mode == AutoresetMode.SAME_STEP else ours[4]
    assert infos["_reward_error"].tolist() == [False, False, False, True, False]
    assert "ZeroDivisionError: too hard" in infos["reward_error"][3]
    assert "'c'" in infos["reward_error"][3]
    assert vector.unwrapped.num_failed == 1
    assert sound.unwrapped.num_failed == 0


@pytest.mark.filterwarnings("ignore:.*An episode ends without a score")
@pytest.mark.parametrize("reward", ["delta", "process"])
def test_an_episode_without_a_score_ends_there(reward):
    options = toy_options(reward=reward, reward_model=Fussy(), prompts=[Prompt.from_text("c")])
    vector = gym.make_vec(TEXT, num_envs=2, on_reward_error="record", **options)
    vector.reset(seed=0)
    _, rewards, terminated, truncated, _ = vector.step([[1], [2]])
    assert np.isnan(rewards).all()
    assert truncated.all()
    assert not terminated.any()
    _, rewards, terminated, truncated, infos = vector.step([[1], [2]])
    assert (rewards.tolist(), truncated.any()) == ([0.0, 0.0], False)
    assert infos["response"].tolist() == ["", ""]


def test_failures_are_raised_where_asked_for_and_change_nothing():
    options = toy_options(reward="delta", reward_model=Fussy(), prompts=[Prompt.from_text("c")])
    vector = gym.make_vec(TEXT, num_envs=2, **options)
    vector.reset(seed=0)
    before = vector.unwrapped.states
    with pytest.raises(RewardError, match=r"too hard.*on_reward_error='record' and failed_reward"):
        vector.step([[1], [2]])
    assert vector.unwrapped.states == before
    with pytest.raises(ValueError, match=r"'record', 'raise'.*'ignore'"):
        gym.make_vec(TEXT, num_envs=2, on_reward_error="ignore", **options)


def test_a_failure_is_warned_of():
    options = toy_options(reward="delta", reward_model=Fussy(), prompts=[Prompt.from_text("c")])
    vector = gym.make_vec(TEXT, num_envs=1, on_reward_error="record", **options)
    vector.reset(seed=0)
    with pytest.warns(RuntimeWarning, match="ends without a score.*too hard"):
        vector.step([[1]])


@pytest.mark.filterwarnings("ignore:.*An episode ends without a score")
def test_the_reward_of_an_episode_without_a_score_is_the_users():
    options = toy_options(reward_model=Fussy(), prompts=[Prompt.from_text("c")])
    recorded = {"on_reward_error": "record", "failed_reward": -2.0, "autoreset_mode": "SameStep"}
    vector = gym.make_vec(TEXT, num_envs=2, **recorded, **options)
    normal = gym.wrappers.vector.NormalizeReward(vector)
    normal.reset(seed=0)
    for _ in range(4):
        assert np.isfinite(normal.step([[0], [1]])[1]).all()
    assert vector.unwrapped.num_failed == 4
    plain = gym.wrappers.vector.NormalizeReward(gym.make_vec(TEXT, num_envs=2, **options))
    plain.reset(seed=0)
    with pytest.raises(RewardError, match="failed_reward"):
        plain.step([[0], [1]])
    for bad in ({"failed_reward": 0.0}, {**recorded, "failed_reward": float("inf")}):
        with pytest.raises(ValueError, match="failed_reward"):
            gym.make_vec(TEXT, num_envs=2, **{**bad, **options})


def test_a_prompt_that_cannot_be_shown_leaves_everything():
    options = toy_options(observation="tokens", max_prompt_tokens=3)
    vector = gym.make_vec(TEXT, num_envs=2, **options)
    vector.reset(seed=0)
    states = vector.unwrapped.states
    with pytest.raises(ValueError, match="larger max_prompt_tokens"):
        vector.reset(options={"prompt": Prompt.from_text("abcde")})
    assert vector.unwrapped.states == states


def test_frames():
    env = gym.make_vec(TEXT, num_envs=2, render_mode="rgb_array", **toy_options())
    env.reset(seed=0)
    before = env.render()
    env.step([[1, 1], [2]])
    after = env.render()
    assert [frame.shape for frame in after] == [(480, 640, 3)] * 2
    assert all((one != other).any() for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("shared_memory", [True, False])
def test_worker_processes_show_the_same(shared_memory):
    make = lambda: gym.make(TEXT, **toy_options())  # noqa: E731
    env = AsyncVectorEnv([make] * 2, context="fork", shared_memory=shared_memory)
    try:
        reference = SyncVectorEnv([make] * 2)
        for one in (env, reference):
            one.reset(seed=3)
        for actions in ([[1], [2, 3]], [[1, 1], [0]], [[2], [3]]):
            assert data_equivalence(env.step(actions), reference.step(actions), exact=True)
    finally:
        env.close()
