import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.language_models import CharTokenizer, PromptTooLongError
from mbrl_text_env.mdp import EpisodeEndedError, InvalidChunkError
from mbrl_text_env.rewards import RewardError
from mbrl_text_env.task import step_texts
from mbrl_text_env.types import Prompt, TextState
from tests.toys import PROMPTS, CountReward, LetterEncoder, StepReward, toy_options

ID = "mbrl_text_env/TextGeneration-v0"


def make(**changes):
    return gym.make(ID, **toy_options(**changes)).unwrapped


def chars(env, text):
    return np.array([" abcde".index(c) if c != "." else 0 for c in text])


MODES = [
    {},
    {"reward": "delta"},
    {"reward": "process", "reward_model": StepReward()},
    {"observation": "tokens"},
    {"observation": "embedding", "encoder": LetterEncoder()},
]


@pytest.mark.parametrize("changes", MODES)
def test_gymnasium_checker_has_nothing_to_say(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**changes))


def test_terminal_reward():
    reward = CountReward()
    env = make(reward_model=reward)
    env.reset(seed=0, options={"prompt": 0})
    assert env.step(chars(env, "ab"))[1:4] == (0.0, False, False)
    _, value, terminated, truncated, info = env.step(chars(env, "a."))
    assert (value, terminated, truncated) == (pytest.approx(2 / 3), True, False)
    assert info == {
        "prompt_id": "ab",
        "prompt": "ab",
        "response": "aba",
        "finish_reason": "stop",
        "chunk_cut": False,
        "score": pytest.approx(2 / 3),
        "score_parts": {"count": pytest.approx(2 / 3)},
    }
    assert reward.calls == [["aba"]]  # scored once


def test_delta_rewards_add_up_to_the_score():
    reward = CountReward()
    env = make(reward="delta", reward_model=reward)
    env.reset(seed=0)
    rewards = [env.step(chars(env, text))[1] for text in ("a", "b", "bb.")]
    assert rewards == [1.0, -0.5, -0.25]
    assert reward.calls == [["a"], ["ab"], ["abbb"]]


def test_process_rewards_are_those_of_the_chunks():
    env = make(reward="process", reward_model=StepReward())
    env.reset(seed=0)
    assert [env.step(chars(env, text))[1] for text in ("aab", "b", "a.")] == [2.0, 0.0, 1.0]


def test_process_rewards_need_a_process_reward_model():
    with pytest.raises(RewardError, match="score_steps"):
        make(reward="process")


def test_the_limit_truncates_and_says_that_it_cut():
    env = make(max_response_tokens=4)
    env.reset(seed=0)
    env.step(chars(env, "aaa"))
    observation, value, terminated, truncated, info = env.step(chars(env, "ab."))
    assert (value, terminated, truncated) == (1.0, False, True)
    assert info["chunk_cut"] is True
    assert info["finish_reason"] == "length"
    assert observation["response"] == "aaaa"


def test_an_empty_response_is_scored():
    env = make()
    env.reset(seed=0)
    _, value, terminated, _, info = env.step([0])
    assert (value, terminated, info["response"]) == (0.0, True, "")


def test_token_observations():
    env = make(observation="tokens")
    observation, _ = env.reset(options={"prompt": "ab"})
    assert observation["prompt_ids"].tolist() == [1, 2, 0]
    assert observation["prompt_length"] == 2
    observation = env.step([3, 4])[0]
    assert observation["response_ids"].tolist() == [3, 4, 0, 0, 0, 0, 0, 0]
    assert observation["response_length"] == 2
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        env.reset(options={"prompt": Prompt.from_text("abcabc")})


def test_embedding_observations_embed_prompt_and_prefix():
    env = make(observation="embedding", encoder=LetterEncoder())
    env.reset(options={"prompt": "ab"})
    observation = env.step([1, 1])[0]
    expected = LetterEncoder().encode(["Prompt: ab\nResponse: aa"])[0]
    assert observation.tolist() == expected.tolist()


def test_reset_chooses_prompts():
    env = make()
    seen = {env.reset(seed=seed)[1]["prompt_id"] for seed in range(40)}
    assert seen == {prompt.id for prompt in PROMPTS}
    for wanted in (PROMPTS[3], "c", 3):
        assert env.reset(options={"prompt": wanted})[1]["prompt_id"] == "c"
    for wrong in ({"prompt": "nobody"}, {"prompt": 99}, {"temperature": 1}):
        with pytest.raises(ValueError, match="options"):
            env.reset(options=wrong)


def test_a_named_prompt_leaves_later_draws_as_they_are():
    env = make()
    env.reset(seed=1)
    expected = [env.reset()[1]["prompt_id"] for _ in range(5)]
    env.reset(seed=1, options={"prompt": 0})
    assert [env.reset()[1]["prompt_id"] for _ in range(5)] == expected


@pytest.mark.parametrize(
    "action", [[], [9], [0, 1], [1] * 4, 3, "a", [1.5], None, np.zeros((1, 1))]
)
def test_invalid_actions_leave_the_state_alone(action):
    env = make()
    env.reset(seed=0)
    env.step([1])
    before = env.get_state()
    with pytest.raises(InvalidChunkError, match=r"expected|stop token"):
        env.step(action)
    assert env.get_state() == before


def test_step_needs_reset():
    env = make()
    for call in (lambda: env.step([1]), env.get_state):
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            call()
    env.reset(seed=0)
    env.step([0])
    with pytest.raises(EpisodeEndedError, match="reset"):
        env.step([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "train.jsonl"}, "load_prompts"),
        ({"prompts": [5]}, "sequence of Prompt"),
        ({"reward": "dense"}, "reward: expected one of"),
        ({"observation": "pixels"}, "observation: expected one of"),
        ({"max_chunk_tokens": 0}, "at least 1"),
        ({"max_response_tokens": 0}, "at least 1"),
        ({"reward_model": "sentimant"}, "sentiment"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_unknown_render_mode():
    with pytest.raises(ValueError, match="render_mode"):
        make().__class__(**toy_options(), render_mode="video")


def test_a_video_is_recorded_frame_by_frame():
    env = gym.wrappers.RenderCollection(make(render_mode="rgb_array"))
    env.reset(seed=0)
    env.step([1, 2])
    first, second = env.render()
    assert first.shape == second.shape
    assert (first != second).any()


def test_info_keeps_one_shape():
    env = make()
    infos = [env.reset(seed=0)[1], env.step([1])[4], env.step([0])[4]]
    assert infos[-1]["finish_reason"] == "stop"
    assert infos[0]["finish_reason"] == ""
    kinds = [{key: type(value) for key, value in info.items()} for info in infos]
    assert kinds[0] == kinds[1] == kinds[2]
    assert infos[0]["score_parts"].keys() == infos[2]["score_parts"].keys()


@pytest.mark.parametrize("ids", [[1, 2, 6], [1, 2], [1, 2, 0], torch.tensor([1, 0, 3])])
def test_padded_actions(ids):
    env = make(action_format="padded")
    assert env.action_space == gym.spaces.MultiDiscrete([6, 7, 7])
    env.reset(seed=0)
    env.step(ids)
    expected = {3: (1, 0)}.get(int(ids[2]) if len(ids) > 2 else -1)
    stop = len(ids) > 2 and int(ids[2]) == 0
    assert env.unwrapped.get_state().response_ids == (expected or (1, 2, 0)[: 3 if stop else 2])


@pytest.mark.parametrize("ids", [[6, 1, 1], [7, 1, 1], [-1, 1, 1], [1, 1, 1, 1], [1.0, 2.0, 3.0]])
def test_padded_actions_that_are_none(ids):
    env = make(action_format="padded")
    env.reset(seed=0)
    with pytest.raises(InvalidChunkError):
        env.step(np.array(ids))


def test_the_steps_of_a_response_are_the_response():
    tokenizer = Bytes()
    text = "a🙂é\ufffd日!"
    ids = tuple(text.encode())
    for size in (1, 2, 3, 5):
        ends = (*range(size, len(ids), size), len(ids))
        state = TextState(Prompt.from_text("x"), (1,), ids, None, ends)
        steps = step_texts(state, tokenizer)
        assert "".join(steps) == text
        assert len(steps) == len(ends)


class Bytes:
    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_prompt_longer_than_the_context():
    env = make(tokenizer=CharTokenizer("abc", context_length=3))
    with pytest.raises(PromptTooLongError, match="3 tokens of prompt and response"):
        env.reset(options={"prompt": "abc"})


class Faulty:
    name = "faulty"

    def __init__(self, result):
        self.result = result

    def score(self, prompts, responses):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("result", [[float("nan")], [], [1.0, 2.0], ["x"], ZeroDivisionError("oh")])
def test_reward_faults_name_model_prompt_and_response(result):
    env = make(reward_model=Faulty(result))
    env.reset(options={"prompt": "ab"})
    with pytest.raises(RewardError, match=r"faulty.*'ab'.*'b'"):
        env.step([2, 0])
    assert env.get_state().response_ids == ()  # the step did not happen


actions = st.lists(st.integers(0, 10**6), min_size=1, max_size=12)


@settings(max_examples=200)
@given(st.integers(0, len(MODES) - 1), actions, st.integers(0, 11), st.integers(0, 99))
def test_restored_equals_original(mode, seeds, cut, seed):
    """Snapshot, act, act elsewhere, restore, act again: the same, whatever was in between."""
    env = make(**MODES[mode])
    env.reset(seed=seed)
    snapshot, later = None, []
    for place, action_seed in enumerate(seeds):
        if env.get_state().finish_reason:
            break
        if place >= min(cut, len(seeds) - 1):
            snapshot = snapshot or env.get_state()
            env.action_space.seed(action_seed)
            later.append((env.action_space.sample(), None))
            later[-1] = (later[-1][0], env.step(later[-1][0]))
        else:
            env.action_space.seed(action_seed)
            env.step(env.action_space.sample())
    if snapshot is None:
        return
    env.reset(seed=seed + 1)
    env.step([1])
    env.set_state(snapshot)
    assert env.get_state() is snapshot
    for action, expected in later:
        assert data_equivalence(env.step(action), expected, exact=True)


def test_set_state_refuses_what_is_no_state():
    env = make()
    with pytest.raises(TypeError, match="TextState"):
        env.set_state("state")
    long = TextState(PROMPTS[0], (1, 2), (1,) * 9)
    with pytest.raises(ValueError, match="max_response_tokens"):
        env.set_state(long)


def test_set_state_returns_what_reset_would():
    env = make()
    env.reset(options={"prompt": "ab"})
    env.step([1])
    observation, info = env.set_state(env.get_state())
    assert observation == {"prompt": "ab", "response": "a"}
    assert info["response"] == "a"


def test_render(capsys):
    env = make(render_mode="ansi")
    env.reset(options={"prompt": "ab"})
    env.step([1, 0])
    assert env.render() == "Prompt: ab\nResponse: a [stop, score 1.000]\n"
    env = make(render_mode="human")
    env.reset(options={"prompt": "ab"})
    env.step([1, 2])
    assert "ab" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="render mode"):
        make().render()


def test_gym_make_without_arguments_writes_with_the_real_tokenizer():
    env = gym.make(ID)
    observation, info = env.reset(seed=0)
    assert observation["prompt"]
    assert observation["response"] == ""
    tokenizer = env.unwrapped.task.tokenizer
    ids = tokenizer.tokenizer("What a wonderful day!")["input_ids"]
    _, value, terminated, _, info = env.step([*ids, *tokenizer.stop_token_ids])
    assert terminated
    assert info["response"] == "What a wonderful day!"
    assert value == info["score"] > 0.5  # VADER likes it
    env = gym.make(ID, reward_model="0.5*sentiment+0.5*relevance")
    env.reset(seed=0)
    assert set(env.step([*ids, 2])[4]["score_parts"]) == {"sentiment", "relevance"}


def test_a_character_shared_by_two_chunks_belongs_to_the_second():
    """The real tokenizer splits rare characters into bytes; no step's text loses one."""
    reward = StepReward("Ж")
    env = gym.make(ID, reward_model=reward, reward="process").unwrapped
    env.reset(seed=0)
    ids = env.task.tokenizer.tokenizer("aЖ")["input_ids"]
    assert len(ids) >= 3
    rewards = [env.step([token])[1] for token in ids]
    assert rewards == [0.0] * (len(ids) - 1) + [1.0]


def test_the_context_ends_a_response_too():
    env = make(tokenizer=CharTokenizer("abcde", context_length=5))
    env.reset(options={"prompt": "ab"})
    _, _, terminated, truncated, info = env.step([1, 2, 3])
    assert (terminated, truncated, info["response"]) == (False, True, "abc")


def test_a_prompt_is_named_by_a_numpy_index_and_not_by_a_truth_value():
    env = make()
    expected = env.reset(options={"prompt": 1})[1]["prompt_id"]
    assert env.reset(options={"prompt": np.int64(1)})[1]["prompt_id"] == expected
    with pytest.raises(ValueError, match="options"):
        env.reset(options={"prompt": True})
