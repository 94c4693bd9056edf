"""Trained choices: what they see, how they are kept, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.agents.learning import TuningError
from mbrl_text_env.agents.model_free import CandidatePolicy, CandidateView, load_policy
from mbrl_text_env.agents.model_free.candidate_policy import CandidateScorer, StateValue
from mbrl_text_env.proposer import FeatureLayout
from tests.agents.model_free.choice_worlds import LM, VIEW, LetterShares, reward

LAYOUT = FeatureLayout(4, 0, True)


def policy(layout=LAYOUT, hidden=(), view=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = CandidateScorer(layout, hidden)
    names = {"language_model_name": LM.name, "reward_name": "count", **options}
    return CandidatePolicy(scorer, view or CandidateView(**VIEW), hidden, "ppo", **names)


def greedy():
    """By hand: the reward of the prefix with the candidate decides."""
    found = policy()
    with torch.no_grad():
        for weights in found.scorer.parameters():
            weights.zero_()
        # Position, three of the candidate, then prefix reward, reward and gain.
        found.scorer.net[0].weight[0, 5] = 2.0
    return found


class TestScores:
    def test_by_hand(self):
        rows = np.zeros((1, LAYOUT.size), dtype=np.float32)
        parts = LAYOUT.split(rows)
        parts.prefix_reward[:] = 0.5
        parts.rewards[0, :, 0] = [0.25, 0.75, 1.0, 0.0]
        found = greedy()
        assert found.scores(rows).tolist() == [[0.5, 1.5, 2.0, 0.0]]
        assert found.choose(rows).tolist() == [2]
        with torch.no_grad():
            found.scorer.net[0].weight[0, 5:7] = torch.tensor([0.0, 4.0])
        assert found.scores(rows).tolist() == [[-1.0, 1.0, 2.0, -2.0]]

    @settings(deadline=None, max_examples=25)
    @given(st.permutations(range(4)), st.booleans(), st.sampled_from([0, 3]))
    def test_the_place_of_a_candidate_does_not_matter(self, order, prefix_rewards, size):
        layout = FeatureLayout(4, size, prefix_rewards)
        rows = np.random.default_rng(0).normal(size=(5, layout.size)).astype(np.float32)
        moved = rows.copy()
        for name in ("scalars", "rewards", "embeddings"):
            getattr(layout.split(moved), name)[:] = getattr(layout.split(rows), name)[:, order]
        scorer, value = CandidateScorer(layout, (8,)), StateValue(layout, (8,))
        with torch.inference_mode():
            scores, again = (scorer(torch.from_numpy(x)) for x in (rows, moved))
            np.testing.assert_allclose(again, scores[:, order], atol=1e-5)
            values, same = (value(torch.from_numpy(x)) for x in (rows, moved))
            np.testing.assert_allclose(same, values, atol=1e-5)

    def test_the_size_of_embeddings_does_not_matter(self):
        layout = FeatureLayout(2, 3)
        rows = np.random.default_rng(0).normal(size=(2, layout.size)).astype(np.float32)
        larger = rows.copy()
        layout.split(larger).embeddings[:] *= 100
        found = policy(layout, view=CandidateView(2, encoder="own", prefix_rewards=False))
        np.testing.assert_allclose(found.scores(larger), found.scores(rows), rtol=1e-5)

    @pytest.mark.parametrize("shape", [(LAYOUT.size,), (1, LAYOUT.size + 1)])
    def test_other_features_are_refused(self, shape):
        with pytest.raises(TuningError, match=rf"expected \[B, {LAYOUT.size}\]"):
            policy().scores(np.zeros(shape))


class TestFolder:
    def test_read_equals_written(self, tmp_path):
        found = policy(hidden=(8, 4))
        found.save(tmp_path / "p", {"more.json": {"a": 1}})
        read = load_policy(tmp_path / "p", LM, reward())
        rows = np.random.default_rng(0).normal(size=(3, LAYOUT.size))
        assert read.scores(rows).tolist() == found.scores(rows).tolist()
        assert (read.view, read.hidden, read.algorithm) == (found.view, (8, 4), "ppo")
        assert json.loads((tmp_path / "p" / "more.json").read_text()) == {"a": 1}
        assert {p.suffix for p in (tmp_path / "p").iterdir()} == {".json", ".safetensors"}

    @pytest.mark.parametrize("damage", ["config", "weights", "format", "nan", "gone", "shape"])
    def test_damaged(self, tmp_path, damage):
        found = policy()
        if damage == "nan":
            with torch.no_grad():
                found.scorer.net[0].weight[0, 0] = float("nan")
        found.save(tmp_path / "p")
        config, weights = tmp_path / "p" / "policy.json", tmp_path / "p" / "policy.safetensors"
        changes = {
            "config": lambda: config.write_text(config.read_text()[:40]),
            "weights": lambda: weights.write_bytes(weights.read_bytes()[:50]),
            "format": lambda: config.write_text(config.read_text().replace(": 1,", ": 9,", 1)),
            "gone": weights.unlink,
            "shape": lambda: config.write_text(
                config.read_text().replace('"num_candidates": 4', '"num_candidates": 1')
            ),
            "nan": lambda: None,
        }
        changes[damage]()
        with pytest.raises(TuningError, match="Expected the folder of a policy"):
            load_policy(tmp_path / "p")

    def test_other_folders_are_not_written_over(self, tmp_path):
        (tmp_path / "file.txt").write_text("mine")
        with pytest.raises(TuningError, match="with other files"):
            policy().save(tmp_path)
        assert (tmp_path / "file.txt").read_text() == "mine"

    def test_other_models_are_refused(self, tmp_path):
        policy(language_model_name="another").save(tmp_path / "lm")
        with pytest.raises(TuningError, match="language model 'another'"):
            load_policy(tmp_path / "lm", LM, reward())
        policy(reward_name="another").save(tmp_path / "reward")
        with pytest.raises(TuningError, match="reward 'another'"):
            load_policy(tmp_path / "reward", LM, reward())
        assert load_policy(tmp_path / "reward", LM).reward_name == "another"
        policy(language_model_name=None, reward_name=None).save(tmp_path / "any")
        assert load_policy(tmp_path / "any", LM, reward()).language_model_name is None

    def test_ones_own_encoder_has_to_be_passed(self, tmp_path):
        view = CandidateView(**{**VIEW, "encoder": "own"}, prefix_rewards=False)
        policy(FeatureLayout(4, 2), view=view, encoder=LetterShares()).save(tmp_path / "p")
        load_policy(tmp_path / "p", LM, encoder=LetterShares()).view.resolved(LetterShares())
        with pytest.raises(TuningError, match="an object with encode"):
            view.resolved(None)
        with pytest.raises(TuningError, match="expected None"):
            CandidateView(**VIEW).resolved(LetterShares())


@pytest.mark.parametrize(
    "change",
    [
        {"num_candidates": 1},
        {"chunk_tokens": 0},
        {"max_response_tokens": 0},
        {"temperature": -1.0},
        {"encoder": "minilm"},
    ],
)
def test_views_out_of_range(change):
    with pytest.raises(TuningError, match=next(iter(change))):
        CandidateView(**{**VIEW, **change})
