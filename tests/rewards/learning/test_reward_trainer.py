"""LoRA through TRL's `RewardTrainer`, on tiny models of real architectures."""

from __future__ import annotations

import pickle
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.learning.learned import LearnedReward, RewardFitError
from mbrl_text_env.rewards.learning.lora_classifier import LoraSettings, fit_lora
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.types import Prompt
from tests.rewards.conftest import CHAT_TEMPLATE, SIZES

TOPICS = ("cats", "ships", "bread", "trains", "bees", "chess", "rain", "gold", "tea", "art")
PAIRS = [
    PreferencePair(Prompt.from_text(f"Tell me about {topic}."), f"I love {a} {topic}.", f"No {b}!")
    for topic in TOPICS
    for a, b in (("the", "no"), ("all", "never"))
]
QUICK = {"batch_size": 4, "learning_rate": 1e-2, "max_length": 64}


@pytest.fixture(scope="module")
def causal(minilm, tmp_path_factory):
    """A causal language model, which has no head to score with."""
    import copy

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("causal")
    tokenizer = copy.deepcopy(minilm.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(causal, tmp_path_factory):
    """Two steps."""
    folder = tmp_path_factory.mktemp("fits") / "reward"
    settings = LoraSettings(base=str(causal), max_steps=2, **QUICK)
    return fit_lora(PAIRS, folder, settings, data_name="tests")


def score(reward, pairs=PAIRS):
    prompts = [pair.prompt for pair in pairs]
    chosen = score_responses(reward, prompts, [pair.chosen for pair in pairs]).total
    return chosen - score_responses(reward, prompts, [pair.rejected for pair in pairs]).total


class TestTwoSteps:
    def test_weights_change(self, causal, fitted):
        before, after = (load_file(f / "model.safetensors") for f in (causal, fitted.folder))
        changed = {n for n in before.keys() & after.keys() if (before[n] != after[n]).any()}
        assert len(changed) == 2 * 7
        assert all("_proj" in name for name in changed)
        assert any("score" in name for name in after)

    def test_the_report(self, fitted):
        report = fitted.report_
        assert (report.model, report.num_fitted, report.held_out.num_pairs) == ("lora", 16, 4)
        assert report.chosen["steps"] == 2
        assert sum(entry.count for entry in report.held_out.calibration) == 4
        margins = score(fitted)
        assert report.fitted_accuracy in (np.arange(33) / 32)
        assert report.held_out.accuracy * 4 + report.fitted_accuracy * 16 == pytest.approx(
            (margins > 0).sum()
        )

    def test_the_folder_is_read_and_has_nothing_to_execute(self, fitted):
        again = LearnedReward(fitted.folder)
        np.testing.assert_array_equal(score(again), score(fitted))
        suffixes = {path.suffix for path in fitted.folder.iterdir()}
        assert suffixes <= {".json", ".jinja", ".safetensors", ".txt"}
        assert [path.name for path in fitted.folder.parent.iterdir()] == ["reward"]

    def test_copies(self, fitted, tmp_path):
        np.testing.assert_array_equal(score(pickle.loads(pickle.dumps(fitted))), score(fitted))  # noqa: S301
        fitted.save(tmp_path / "copy")
        np.testing.assert_array_equal(score(LearnedReward(tmp_path / "copy")), score(fitted))

    @pytest.mark.filterwarnings("ignore:.*cut .* text")
    def test_the_contract(self, fitted):
        check_reward_model(fitted)
        assert fitted.flops_bound() > 0


@pytest.mark.parametrize("name", ["bert", "deberta", "llama"])
def test_classifiers_with_a_head(classifiers, tmp_path, name):
    """A head that there is goes on learning; the llama has no padding token of its own."""
    settings = LoraSettings(base=str(classifiers[name]), max_steps=15, r=4, **QUICK)
    reward = fit_lora(PAIRS, tmp_path / "reward", settings)
    assert reward.report_.fitted_accuracy == 1.0
    assert reward.report_.held_out.accuracy > 0.5


def test_an_encoder_without_a_head(minilm, tmp_path):
    minilm[0].auto_model.save_pretrained(tmp_path / "base")
    minilm.tokenizer.save_pretrained(tmp_path / "base")
    settings = LoraSettings(base=str(tmp_path / "base"), max_steps=2, targets=("query",), **QUICK)
    reward = fit_lora(PAIRS, tmp_path / "reward", settings)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "reward"))
    same = {f"bert.{name}": weights for name, weights in before.items()}
    changed = {n for n in same.keys() & after.keys() if (same[n] != after[n]).any()}
    assert changed
    assert all(".query." in name or ".pooler." in name for name in changed)
    assert any("classifier" in name for name in after)
    assert np.isfinite(score(reward)).all()


class TestStopped:
    def run(self, causal, folder, **changes):
        settings = LoraSettings(base=str(causal), max_steps=6, save_steps=2, **(QUICK | changes))
        return fit_lora(PAIRS, folder, settings)

    def stop_after(self, monkeypatch, steps):
        import trl

        whole = trl.RewardTrainer.training_step
        done = []

        def step(trainer, *args, **kwargs):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(trainer.state.global_step)
            return whole(trainer, *args, **kwargs)

        monkeypatch.setattr(trl.RewardTrainer, "training_step", step)
        return done

    def test_a_fit_goes_on_and_ends_the_same(self, causal, tmp_path, monkeypatch):
        there = self.run(causal, tmp_path / "whole")
        with monkeypatch.context() as patch:
            self.stop_after(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                self.run(causal, tmp_path / "stopped")
        assert not (tmp_path / "stopped").exists()
        # The last checkpoint is cut off, as by a kill in the middle of writing.
        checkpoints = tmp_path / "stopped-checkpoints"
        (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
        done = self.stop_after(monkeypatch, 100)
        again = self.run(causal, tmp_path / "stopped")
        assert done == [2, 3, 4, 5]
        assert not checkpoints.exists()
        np.testing.assert_allclose(score(again), score(there), rtol=1e-5, atol=1e-6)

    def test_other_settings_do_not_go_on(self, causal, tmp_path, monkeypatch):
        self.stop_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            self.run(causal, tmp_path / "reward")
        with pytest.raises(RewardFitError, match="holds another training"):
            self.run(causal, tmp_path / "reward", learning_rate=1e-3)

    def test_other_folders_are_left_alone(self, causal, tmp_path):
        (tmp_path / "reward-checkpoints").mkdir()
        (tmp_path / "reward-checkpoints" / "mine.txt").write_text("precious")
        with pytest.raises(RewardFitError, match="Remove the folder to begin anew"):
            self.run(causal, tmp_path / "reward")
        with pytest.raises(RewardError, match="a folder with other files"):
            self.run(causal, tmp_path / "reward-checkpoints")
        assert (tmp_path / "reward-checkpoints" / "mine.txt").read_text() == "precious"


def test_the_global_generators_are_left_alone(causal, tmp_path):
    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    settings = LoraSettings(base=str(causal), max_steps=1, **QUICK)
    fit_lora(PAIRS, tmp_path / "reward", settings)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_margins_count(causal, tmp_path):
    settings = LoraSettings(base=str(causal), max_steps=2, use_margin=True, **QUICK)
    with pytest.raises(RewardFitError, match="expected a margin on every pair"):
        fit_lora(PAIRS, tmp_path / "reward", settings)
    wide, narrow = (
        fit_lora(
            [PreferencePair(p.prompt, p.chosen, p.rejected, margin) for p in PAIRS],
            tmp_path / f"reward-{margin}",
            settings,
        )
        for margin in (20.0, 0.0)
    )
    assert np.abs(score(wide) - score(narrow)).max() > 1e-3


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"r": 0}, "r: expected more than 0"),
            ({"learning_rate": float("nan")}, "learning_rate: expected more than 0"),
            ({"max_steps": 0}, "max_steps: expected more than 0"),
            ({"save_steps": 0}, "save_steps"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(RewardFitError, match=message):
            LoraSettings(**settings)

    def test_too_few_prompts(self, causal, tmp_path):
        with pytest.raises(RewardFitError, match="at least 5 different prompts"):
            fit_lora(PAIRS[:4], tmp_path / "reward", LoraSettings(base=str(causal)))

    def test_bases(self, classifiers, tmp_path):
        for base in ("no-such/model", str(tmp_path), str(classifiers["bert_with_three_classes"])):
            with pytest.raises(RewardError, match="Expected the base to be a transformers") as e:
                fit_lora(PAIRS, tmp_path / "reward", LoraSettings(base=base, max_steps=1))
            assert e.match(base)
            shutil.rmtree(tmp_path / "reward-checkpoints")

    def test_a_base_without_a_tokenizer(self, classifiers, tmp_path):
        shutil.copytree(classifiers["bert"], tmp_path / "base")
        for file in (tmp_path / "base").glob("token*"):
            file.unlink()
        with pytest.raises(RewardError, match="to hold a tokenizer for the model's 30522 tokens"):
            fit_lora(PAIRS, tmp_path / "reward", LoraSettings(base=str(tmp_path / "base")))

    def test_damaged_folders(self, fitted, tmp_path):
        folder = tmp_path / "reward"
        for file, message in (
            ("model.safetensors", "SafetensorError"),
            ("reward.json", "JSONDecodeError"),
        ):
            shutil.copytree(fitted.folder, folder, dirs_exist_ok=True)
            (folder / file).write_bytes((folder / file).read_bytes()[:-20])
            with pytest.raises(RewardError, match=message):
                LearnedReward(folder)
            (folder / file).unlink()
            with pytest.raises(RewardError, match="FileNotFoundError"):
                LearnedReward(folder)
