"""Folders of learned rewards: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mbrl_text_env.rewards import register, score_responses
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.learning.features import EmbeddingFeatures
from mbrl_text_env.rewards.learning.learned import LearnedReward, fit_reward
from mbrl_text_env.rewards.registry import make
from mbrl_text_env.types import Prompt
from tests.rewards.learning.test_fitting import BLAME, PRAISE, LetterEncoder, letters, pairs_of

PROMPT = Prompt.from_text("Tell me about snow.")
TEXTS = ["I love snow.", "", "日本 🙂", "I hate it. " * 100]


@pytest.fixture(scope="module")
def fitted():
    return fit_reward(pairs_of(PRAISE, BLAME), features=letters(), data_name="praise")


@pytest.fixture
def folder(fitted, tmp_path):
    fitted.save(tmp_path / "reward")
    return tmp_path / "reward"


def load(folder):
    return LearnedReward(folder, encoder=LetterEncoder())


def score(reward):
    return score_responses(reward, [PROMPT] * len(TEXTS), TEXTS).total


class TestRoundTrip:
    @pytest.mark.parametrize("statistics", [True, False])
    def test_scores_are_equal(self, tmp_path, statistics):
        features = letters(use_statistics=statistics)
        reward = fit_reward(pairs_of(PRAISE, BLAME), features=features, name="mine")
        reward.save(tmp_path / "a")
        again = load(tmp_path / "a")
        np.testing.assert_array_equal(score(again), score(reward))
        assert np.ptp(score(again)) > 0
        assert (again.name, repr(again.report_)) == ("mine", repr(reward.report_))
        again.save(tmp_path / "b")
        for file in ("reward.json", "head.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_minilm_needs_no_encoder(self, minilm, tmp_path):
        reward = fit_reward(pairs_of(PRAISE, BLAME), features=EmbeddingFeatures())
        reward.save(tmp_path / "reward")
        register("learned-in-a-test", LearnedReward, argument="FOLDER", replace=True)
        again = make(f"learned-in-a-test:{tmp_path / 'reward'}")
        np.testing.assert_array_equal(score(again), score(reward))
        copied = pickle.loads(pickle.dumps(again))  # noqa: S301
        np.testing.assert_array_equal(score(copied), score(reward))
        np.testing.assert_array_equal(again.flops([PROMPT], ["Hi"]), reward.flops([PROMPT], ["Hi"]))

    def test_hidden_states(self, smollm2, tmp_path):
        from mbrl_text_env.rewards.learning.features import HiddenFeatures

        reward = fit_reward(pairs_of(PRAISE[:1], BLAME[:1]), features=HiddenFeatures(smollm2))
        reward.save(tmp_path / "reward")
        with pytest.raises(RewardError, match=r"pass LearnedReward\(folder, language_model=...\)"):
            LearnedReward(tmp_path / "reward")
        again = LearnedReward(tmp_path / "reward", language_model=smollm2)
        np.testing.assert_allclose(score(again), score(reward), atol=1e-5)

    def test_a_learned_reward_is_replaced(self, fitted, folder):
        fitted.save(folder)
        assert load(folder).name == "learned(praise)"
        assert sorted(path.name for path in folder.iterdir()) == ["head.safetensors", "reward.json"]
        assert [path.name for path in folder.parent.iterdir()] == ["reward"]

    def test_nothing_else_is_replaced(self, fitted, tmp_path):
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(RewardError, match="got a folder with other files"):
            fitted.save(tmp_path)
        with pytest.raises(RewardError, match="got a file"):
            fitted.save(tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text() == "precious"


class TestDamage:
    def check(self, folder, message):
        with pytest.raises(RewardError, match=message) as caught:
            load(folder)
        assert caught.match(str(folder))

    def edit(self, folder, **changes):
        path = folder / "reward.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_no_folder(self, tmp_path):
        self.check(tmp_path / "nothing", "Expected the folder of a learned reward.*FileNotFound")
        with pytest.raises(RewardError, match="expected a folder, got None"):
            LearnedReward(None)

    @pytest.mark.parametrize("file", ["reward.json", "head.safetensors"])
    @pytest.mark.parametrize("kept", [0, 10, -10])
    def test_files_cut_off(self, folder, file, kept):
        path = folder / file
        path.write_bytes(path.read_bytes()[:kept])
        self.check(folder, "JSONDecodeError|SafetensorError")

    @pytest.mark.parametrize("file", ["reward.json", "head.safetensors"])
    def test_files_missing(self, folder, file):
        (folder / file).unlink()
        self.check(folder, "FileNotFoundError")

    def test_not_utf8(self, folder):
        (folder / "reward.json").write_bytes(b"\xff\xfe")
        self.check(folder, "UnicodeDecodeError")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 1}, "format 1, and this version reads 3"),
            ({"features": {}}, "KeyError"),
            ({"report": {"objective": "x"}}, "TypeError.*missing .*'model'"),
            ({"report": []}, "TypeError"),
        ],
    )
    def test_other_contents(self, folder, changes, message):
        self.edit(folder, **changes)
        self.check(folder, message)

    def test_other_counts(self, folder):
        features = json.loads((folder / "reward.json").read_text())["features"]
        features["statistics"] = features["statistics"][1:]
        self.edit(folder, features=features)
        self.check(folder, "text statistics that this version of the package does not compute")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: weights * np.nan, "not finite"),
            (lambda weights: weights[1:], "a head that does not fit"),
            (lambda weights: weights[None], "a head that does not fit"),
        ],
    )
    def test_other_weights(self, folder, change, message):
        arrays = load_file(folder / "head.safetensors")
        arrays["head.0.coef_"] = np.ascontiguousarray(change(arrays["head.0.coef_"]))
        save_file(arrays, folder / "head.safetensors")
        self.check(folder, message)

    def test_the_encoder(self, folder):
        with pytest.raises(RewardError, match=r"'LetterEncoder' object.*encoder=\.\.\."):
            LearnedReward(folder)

        class Wider:
            def encode(self, sentences):
                return np.ones((len(sentences), 9))

        class Broken:
            def encode(self, sentences):
                return np.full((len(sentences), 8), np.nan)

        with pytest.raises(RewardError, match="fitted on, 8 numbers for 'response', got 9"):
            score(LearnedReward(folder, encoder=Wider()))
        with pytest.raises(RewardError, match="'Broken' to return one finite vector per text"):
            score(LearnedReward(folder, encoder=Broken()))
        with pytest.raises(RewardError, match="expected the folder of a SentenceTransformer"):
            score(LearnedReward(folder, encoder="no-such/encoder"))


def test_nothing_to_score_loads_nothing(folder):
    reward = LearnedReward(folder, encoder="no-such/encoder")
    assert reward.score([], []).shape == (0,)
    assert reward.flops([], []).shape == (0,)
