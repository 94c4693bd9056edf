"""Minari's data sets, with infos."""

import gymnasium as gym
import pytest

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.exchange import from_minari
from mbrl_text_env.mdp import ChunkRules
from mbrl_text_env.spaces import ChunkSpace, UnicodeText
from tests.neighbours.common import CANDIDATES, PADDED, TEXT, VIEW
from tests.toys import toy_options

minari = pytest.importorskip("minari")


@pytest.mark.parametrize(
    ("env_id", "options"),
    [(CANDIDATES, VIEW), (TEXT, PADDED), (TEXT, toy_options(action_format="padded"))],
)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_data_set_with_infos(env_id, options, data_format, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(
        gym.make(env_id, **options),
        record_infos=True,
        data_format=data_format,
    )
    env.action_space.seed(0)
    scores = []
    for seed in range(4):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            ended = terminated or truncated
        scores.append(info["score"])
    env.create_dataset("toy/text-v0", eval_env="CartPole-v1")
    dataset = minari.load_dataset("toy/text-v0")
    assert [sum(e.rewards) for e in dataset.iterate_episodes()] == pytest.approx(scores)
    if env_id == TEXT:
        records = from_minari(dataset, env)
        assert [record.score for record in records] == pytest.approx(scores)
        for record in records:
            state = record.state()
            assert state.finish_reason is not None
            assert record.response == options["tokenizer"].decode(state.response_ids)


def test_spaces():
    from minari.serialization import deserialize_space, serialize_space

    for space in (UnicodeText(7), ChunkSpace(ChunkRules(9, frozenset({0, 3}), 4))):
        assert deserialize_space(serialize_space(space)) == space
