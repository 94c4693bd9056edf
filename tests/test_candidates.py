import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import EpisodeEndedError, is_terminal
from mbrl_text_env.rewards import RewardError
from mbrl_text_env.values import ValueEstimate
from mbrl_text_env.wrappers import CandidateChunks, CandidateProposer, PotentialShaping
from tests.toys import LetterEncoder, toy_options

ID = "mbrl_text_env/CandidateChunks-v0"


def make(**changes):
    options = {
        "language_model": NGramLM("abcde", seed=1),
        "num_candidates": 3,
        "encoder": None,
        **toy_options(),
        **changes,
    }
    return gym.make(ID, **options)


@pytest.mark.parametrize("encoder", [None, "language_model", LetterEncoder()])
def test_checkers_have_nothing_to_say(encoder):
    env = make(encoder=encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(env, warn=True)
        check_env(env.unwrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Gymnasium asks for unwrapped environments; the rest of its check is run on the view.
        warnings.filterwarnings("ignore", ".*different from the unwrapped version.*")
        check_env(env)


def test_an_action_appends_the_candidate():
    env = make()
    _, info = env.reset(seed=0)
    view = env.get_wrapper_attr("candidates")
    assert [env.unwrapped.task.tokenizer.decode(c.token_ids) for c in view] == [*info["candidates"]]
    chosen = view[2]
    env.step(2)
    assert env.unwrapped.get_state().response_ids == chosen.token_ids


def test_features_of_prefix_and_candidates():
    env = make(encoder=LetterEncoder())
    observation, info = env.reset(options={"prompt": "ab"}, seed=3)
    chunks = env.get_wrapper_attr("candidates")
    assert observation.shape == (1 + 3 * 3 + 4 * 5,)
    assert observation.dtype == np.float32
    assert observation[0] == 0.0
    for k, chunk in enumerate(chunks):
        ends = float(chunk.finish_reason is not None)
        expected = [chunk.logprob / len(chunk), len(chunk) / 3, ends]
        assert observation[1 + 3 * k : 4 + 3 * k].tolist() == pytest.approx(expected)
    texts = ["", *info["candidates"]]
    embedded = LetterEncoder().encode([f"Prompt: ab\nResponse: {text}" for text in texts])
    assert observation[10:].tolist() == embedded.ravel().tolist()


def test_language_model_features():
    env = make(encoder="language_model")
    observation, _ = env.reset(seed=0)
    model = env.get_wrapper_attr("proposer").language_model
    expected = model.features([env.unwrapped.get_state()])[0]
    assert observation[10 : 10 + model.vocab_size].tolist() == expected.tolist()


def test_ended_responses_have_no_candidates():
    env = make(encoder=LetterEncoder())
    env.reset(seed=0)
    ended, info = False, {}
    while not ended:
        observation, _, terminated, truncated, info = env.step(0)
        ended = terminated or truncated
    assert info["candidates"] == ("", "", "")
    assert not observation[1:10].any()
    with pytest.raises(EpisodeEndedError, match="reset"):
        env.step(0)


def test_proposals_follow_from_the_episode_seed():
    env = make()
    first = env.reset(seed=4)[1]["candidates"]
    assert env.reset(seed=4)[1]["candidates"] == first
    others = [env.reset(options={"prompt": "ab"})[1]["candidates"] for _ in range(5)]
    assert len({tuple(texts) for texts in others}) > 1


def test_restored_equals_original():
    env = make(encoder=LetterEncoder())
    env.reset(seed=1)
    env.step(0)
    get_state, set_state = env.get_wrapper_attr("get_state"), env.get_wrapper_attr("set_state")
    snapshot = get_state()
    if is_terminal(snapshot.text_state):
        pytest.skip("the seed's first candidate ends the response")
    expected = env.step(1)
    env.reset(seed=9)
    env.step(2)
    set_state(snapshot)
    assert get_state() == snapshot
    assert data_equivalence(env.step(1), expected, exact=True)
    with pytest.raises(TypeError, match="CandidateState"):
        set_state(snapshot.text_state)


def test_the_ledger_counts_the_proposals():
    env = make()
    env.reset(seed=0)
    chunks = env.get_wrapper_attr("candidates")
    usage = env.get_wrapper_attr("ledger").usage
    assert usage.generated_tokens == sum(len(chunk) for chunk in chunks)
    assert usage.lm_calls == 1


@pytest.mark.parametrize("action", [1, np.uint8(1), np.array(1), np.array([1]), torch.tensor(1)])
def test_integers_of_any_library_are_actions(action):
    env = make()
    env.reset(seed=0)
    chosen = env.get_wrapper_attr("candidates")[1]
    env.step(action)
    assert env.unwrapped.get_state().response_ids == chosen.token_ids


@pytest.mark.parametrize(
    "action", [3, -1, 1.0, "0", None, True, np.array([0, 1]), np.float32(1), torch.tensor(1.0)]
)
def test_invalid_actions(action):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="0 to 2"):
        env.step(action)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_candidates": 0}, "num_candidates"),
        ({"chunk_tokens": 4}, "chunk_tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"encoder": "minilm"}, "encoder"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_it_wraps_text_environments_only():
    with pytest.raises(TypeError, match="TextGenerationEnv"):
        CandidateChunks(gym.make("CartPole-v1"))


def test_sampling_parameters_are_used():
    env = make(params=SamplingParams(temperature=0))
    assert len(set(env.reset(seed=0)[1]["candidates"])) == 1


def test_vector_wrapper_shares_the_proposer():
    options = toy_options(language_model=NGramLM("abcde", seed=1), encoder=None)
    env = gym.make_vec(ID, num_envs=2, **options)
    assert isinstance(env.unwrapped.task, object)
    assert isinstance(env.proposer, CandidateProposer)
    assert env.single_action_space.n == 4


def test_the_real_models_propose(smollm2):
    env = gym.make(ID, language_model=smollm2, num_candidates=2, max_response_tokens=32)
    observation, info = env.reset(seed=0)
    assert observation.shape == (1 + 3 * 2 + 3 * 384,)
    assert all(info["candidates"])
    observation, *_, info = env.step(1)
    assert info["response"]
    assert np.linalg.norm(observation[7 : 7 + 384]) == pytest.approx(1, abs=1e-4)


class Fails:
    """Cannot score while it is armed, nor ever a response with `bad` in it."""

    name = "fails"

    def __init__(self, bad=None):
        self.bad, self.armed = bad, False

    def score(self, prompts, responses):
        if self.armed or (self.bad and any(self.bad in r for r in responses)):
            raise ConnectionError("503")
        return [float(len(r)) for r in responses]


def kept(env):
    get = env.get_wrapper_attr
    return get("get_state")(), get("candidates")


@pytest.mark.parametrize("call", [lambda env: env.step(0), lambda env: env.reset(seed=5)])
def test_what_fails_leaves_the_state(call):
    reward = Fails()
    env = make(prefix_rewards=True, reward_model=reward)
    env.reset(seed=1)
    env.step(1)
    before = kept(env)
    reward.armed = True
    with pytest.raises(RewardError, match="503"):
        call(env)
    assert kept(env) == before
    reward.armed = False
    assert env.step(1)[1] >= 0


def test_a_value_model_that_fails_leaves_the_state():
    class Broken:
        is_fitted = True
        calls = 0

        def predict(self, states):
            self.calls += 1
            if self.calls > 1:
                raise ConnectionError("503")
            return ValueEstimate(np.zeros(len(states)), np.zeros(len(states)))

    env = PotentialShaping(make(), Broken())
    env.reset(seed=1)
    before = kept(env)
    with pytest.raises(ConnectionError):
        env.step(0)
    assert kept(env) == before


def make_vec(mode="SameStep", num_envs=3, **changes):
    options = toy_options(
        language_model=NGramLM("abcde", seed=1), num_candidates=3, encoder=None, **changes
    )
    del options["tokenizer"]
    return gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **options)


@pytest.mark.filterwarnings("ignore:.*An episode ends without a score")
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_a_prefix_that_cannot_be_scored_costs_its_own_environment(mode):
    env = make_vec(
        mode,
        prefix_rewards=True,
        reward_model=Fails("bb"),
        on_reward_error="record",
        failed_reward=-1.0,
    )
    _, infos = env.reset(seed=0)
    failed = 0
    for _ in range(60):
        before = env._failures
        observations, rewards, terminated, truncated, infos = env.step([0, 1, 2])
        done = terminated | truncated
        for i, failure in enumerate(before):
            if failure is not None:
                failed += 1
                assert rewards[i] == -1.0
                assert done[i]
            elif not done[i]:
                assert rewards[i] == 0.0
        told = infos.get("_reward_error", np.zeros(3, bool))
        assert all(told[i] for i, failure in enumerate(env._failures) if failure is not None)
        assert np.isfinite(observations).all()
        if mode == "Disabled" and done.any():
            env.reset(options={"reset_mask": done})
    assert failed
    assert env.unwrapped.num_failed >= failed


def test_a_vector_step_that_fails_leaves_everything():
    reward = Fails()
    env = make_vec("NextStep", prefix_rewards=True, reward_model=reward)
    env.reset(seed=0)
    same = make_vec("NextStep", prefix_rewards=True, reward_model=Fails())
    same.reset(seed=0)
    for number in range(12):
        reward.armed = number % 2 == 1
        if reward.armed:
            states, candidates = env.get_states(), env.candidates
            with pytest.raises(RewardError, match="503"):
                env.step([0, 1, 2])
            assert (env.get_states(), env.candidates) == (states, candidates)
            reward.armed = False
        # The random generators are where they were too.
        assert data_equivalence(env.step([0, 1, 2]), same.step([0, 1, 2]), exact=True)


def test_vector_actions():
    env = make_vec("NextStep", 2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step([0, 0])
    env.reset(seed=0)
    for actions in ([0], [0, 1, 2], 0):
        with pytest.raises(ValueError, match="2 actions"):
            env.step(actions)
    with pytest.raises(ValueError, match="0 to 2"):
        env.step([0, 3])
    env.step(torch.tensor([0, 1]))


def test_the_vector_view_says_its_mode():
    for mode in AutoresetMode:
        env = make_vec(mode)
        assert env.autoreset_mode == mode == env.metadata["autoreset_mode"]
        assert env.num_envs == 3


@pytest.mark.parametrize("shared_memory", [True, False])
def test_worker_processes_do_not_hang(shared_memory):
    # torch's threads exist in this process, and not in the forked ones.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(400, 400) @ torch.randn(400, 400)
        torch.randn(10**6).exp_()
        env = AsyncVectorEnv(
            [lambda: make(encoder=TorchEncoder())] * 2, context="fork", shared_memory=shared_memory
        )
        env.reset(seed=0)
        env.step_async([0, 1])
        observations, *_ = env.step_wait(timeout=60)
        env.close()
    finally:
        torch.set_num_threads(threads)
    assert observations.shape == (2, 14)


class TorchEncoder:
    def encode(self, sentences):
        return np.full((len(sentences), 1), float(torch.ones(10**6).exp().mean()), np.float32)
