"""Supervised fine-tuning with TRL's trainer, on a tiny model of a real architecture."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mbrl_text_env.agents.learning import (
    FineTuneReport,
    FineTuneSettings,
    TuningError,
    fine_tune,
    serve,
)
from mbrl_text_env.agents.learning.lora import examples_of
from mbrl_text_env.files import restored
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.types import Prompt
from tests.agents.learning.tiny import PROMPTS, logprob, record, tiny_lm

RECORDS = [record(f" the {word} bank", prompt) for prompt in PROMPTS for word in ("river", "sea")]
QUICK = FineTuneSettings(r=4, alpha=8, learning_rate=1e-2, batch_size=2, gradient_accumulation=2)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One epoch: twelve records make three steps."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    return folder, fine_tune(tiny_lm(), RECORDS, folder, QUICK)


class TestExamples:
    def test_the_ids_and_the_mask(self):
        lm = tiny_lm()
        first, cut = examples_of(lm, [RECORDS[0], record(" and", finish_reason="length")], 512)
        prompt, response = lm.encode_prompt(PROMPTS[0]), RECORDS[0].response_ids
        assert first.input_ids == [*prompt, *response]
        assert first.labels == [-100] * len(prompt) + list(response)
        assert response[-1] in lm.stop_token_ids
        assert cut.input_ids[-1] not in lm.stop_token_ids

    def test_a_lost_stop_token_is_put_back(self):
        bare = record(" the river bank", with_stop=False)
        found = examples_of(tiny_lm(), [bare, RECORDS[0]], 512)
        assert found[0] == found[1]

    def test_a_hint_is_not_learned(self):
        hinted = replace(RECORDS[0], prompt_ids=(1, 2, 3, *RECORDS[0].prompt_ids))
        assert len(set(map(str, examples_of(tiny_lm(), [hinted, RECORDS[0]], 512)))) == 1

    def test_the_loss_is_of_the_response_alone(self, tuned):
        """TRL's loss, before the first step, is what the language model's log-probabilities say."""
        lm = tiny_lm()
        examples = RECORDS[:2]
        expected = -sum(logprob(lm, r) for r in examples)
        expected /= sum(len(r.response_ids) for r in examples)
        settings = replace(QUICK, batch_size=2, gradient_accumulation=1)
        report = fine_tune(lm, examples, tuned[0].parent / "two", settings)
        assert report.loss_before == pytest.approx(expected, rel=1e-5)
        assert report.losses == (pytest.approx(expected, rel=1e-5),)

    def test_long_ones_are_left_out(self):
        long = record(" river" * 40)
        with pytest.warns(UserWarning, match="1 of 3 records have more than 60 tokens"):
            found = examples_of(tiny_lm(), [long, *RECORDS[:2]], 60)
        assert found == examples_of(tiny_lm(), RECORDS[:2], 60)
        with (
            pytest.warns(UserWarning, match="2 of 3"),
            pytest.raises(TuningError, match="got 1 of 3"),
        ):
            examples_of(tiny_lm(), [long, long, RECORDS[0]], 60)


class TestTuned:
    def test_the_adapter_changes(self, tuned):
        grown = {n: w for n, w in weights(tuned[0]).items() if "lora_B" in n}
        assert len(grown) == 2 * 2
        assert all(w.abs().max() > 0 for w in grown.values())

    def test_the_report(self, tuned):
        lm, (folder, report) = tiny_lm(), tuned
        lengths = [len(e.input_ids) for e in examples_of(lm, RECORDS, 512)]
        assert (report.num_examples, report.steps, len(report.losses)) == (12, 3, 3)
        assert report.tokens == sum(lengths)
        # Twice a forward pass of each sequence.
        assert report.flops == pytest.approx(
            2 * sum(lm.usage_bound(n, []).lm_flops for n in lengths)
        )
        assert report.losses[-1] < report.losses[0]
        assert restored(FineTuneReport, json.loads(json.dumps(asdict(report)))) == report
        written = json.loads((folder / "fine_tuning.json").read_text())
        assert restored(FineTuneReport, written["report"]) == report
        assert FineTuneSettings(**written["settings"]) == QUICK

    def test_nothing_else_is_left(self, tuned):
        names = {path.name for path in tuned[0].parent.iterdir()}
        assert not {name for name in names if "checkpoints" in name or name.startswith(".")}

    def test_a_response_that_is_fitted_becomes_likelier(self, tmp_path):
        lm = tiny_lm()
        pair = [record(" the river bank"), record(" the river bank", PROMPTS[1])]
        settings = FineTuneSettings(
            targets=("q_proj", "v_proj", "o_proj", "down_proj"), learning_rate=2e-2, epochs=30
        )
        report = fine_tune(lm, pair, tmp_path / "adapter", settings)
        before, after = (logprob(m, pair[0]) for m in (lm, serve(lm, tmp_path / "adapter")))
        assert before < -20
        assert after > -1
        assert report.losses[-1] < 0.2 < 3 < report.loss_before

    def test_the_same_again(self, tuned, tmp_path):
        """Whatever the global generators hold; and they are left alone."""
        torch.manual_seed(1234)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        report = fine_tune(tiny_lm(), RECORDS, tmp_path / "again", QUICK)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
        assert report.losses == tuned[1].losses
        there = weights(tuned[0])
        assert all(torch.equal(w, there[n]) for n, w in weights(tmp_path / "again").items())
        other = fine_tune(tiny_lm(), RECORDS, tmp_path / "other", replace(QUICK, seed=1))
        assert other.losses != report.losses

    def test_going_on_from_an_adapter(self, tuned, tmp_path):
        folder, report = tuned
        again = fine_tune(tiny_lm(), RECORDS, tmp_path / "on", QUICK, start_from=folder)
        assert again.loss_before < report.loss_before - 0.5
        policy = serve(tiny_lm(), folder)
        tuned_records = [replace(r, language_model=policy.name) for r in RECORDS]
        assert len(examples_of(tiny_lm(), tuned_records, 512)) == 12

    def test_another_base(self, tuned, tmp_path):
        with pytest.raises(TuningError, match="expected an adapter for 'tiny'"):
            fine_tune(tiny_lm(seed=1), RECORDS, tmp_path / "a", QUICK, start_from=tuned[0])


class TestStopped:
    SETTINGS = replace(QUICK, epochs=2.0, dropout=0.1)  # six steps over two epochs

    @pytest.fixture
    def often(self, monkeypatch):
        monkeypatch.setattr("mbrl_text_env.agents.learning.lora._SAVE_STEPS", 2)

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory):
        """What comes of it when nothing stops it."""
        folder = tmp_path_factory.mktemp("whole") / "adapter"
        return folder, fine_tune(tiny_lm(), RECORDS, folder, cls.SETTINGS)

    def stop_in_step(self, monkeypatch, number, stop):
        """Call `stop` once, in the step after `number` others."""
        import trl

        whole, done = trl.SFTTrainer.training_step, []

        def step(trainer, *args, **kwargs):
            if trainer.state.global_step == number and number not in done:
                stop()
            done.append(trainer.state.global_step)
            return whole(trainer, *args, **kwargs)

        monkeypatch.setattr(trl.SFTTrainer, "training_step", step)
        return done

    def check_same(self, one, other):
        there = weights(one)
        for name, weight in weights(other).items():
            torch.testing.assert_close(weight, there[name], rtol=1e-5, atol=1e-7)

    def test_a_kill(self, whole, tmp_path, monkeypatch, often):
        """The last checkpoint is cut off, as by a kill in the middle of writing."""

        def stop():
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            self.stop_in_step(patch, 5, stop)
            with pytest.raises(KeyboardInterrupt, match="same call resumes"):
                fine_tune(tiny_lm(), RECORDS, tmp_path / "a", self.SETTINGS)
        assert not (tmp_path / "a").exists()
        (tmp_path / "a-checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
        done = self.stop_in_step(monkeypatch, -1, stop)
        report = fine_tune(tiny_lm(), RECORDS, tmp_path / "a", self.SETTINGS)
        assert sorted(set(done)) == [2, 3, 4, 5]
        assert report.losses == pytest.approx(whole[1].losses)
        assert (report.steps, report.loss_before) == (6, pytest.approx(whole[1].loss_before))
        self.check_same(whole[0], tmp_path / "a")

    def test_ctrl_c(self, whole, tmp_path, monkeypatch):
        """The step under way is ended and saved, although no checkpoint is due."""
        before = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            self.stop_in_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt, match="Stopped after step 3 of 6"):
                fine_tune(tiny_lm(), RECORDS, tmp_path / "a", self.SETTINGS)
        assert signal.getsignal(signal.SIGINT) is before
        assert (tmp_path / "a-checkpoints" / "checkpoint-3").is_dir()
        done = self.stop_in_step(monkeypatch, -1, lambda: None)
        fine_tune(tiny_lm(), RECORDS, tmp_path / "a", self.SETTINGS)
        assert min(done) == 3
        self.check_same(whole[0], tmp_path / "a")

    def test_other_data_or_settings_do_not_go_on(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            self.stop_in_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                fine_tune(tiny_lm(), RECORDS, tmp_path / "a", QUICK)
        for records, settings in ((RECORDS[1:], QUICK), (RECORDS, replace(QUICK, seed=2))):
            with pytest.raises(TuningError, match="holds another training"):
                fine_tune(tiny_lm(), records, tmp_path / "a", settings)

    @pytest.mark.parametrize("where", ["checkpoint", "adapter"])
    def test_no_space_left(self, tmp_path, monkeypatch, often, where):
        import trl

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if where == "checkpoint":
                patch.setattr(trl.SFTTrainer, "save_model", full)
            else:
                patch.setattr("mbrl_text_env.agents.learning.lora.write_adapter", full)
            with pytest.raises(TuningError, match=r"No space left .* Free some space"):
                fine_tune(tiny_lm(), RECORDS, tmp_path / "a", QUICK)
        assert [path.name for path in tmp_path.iterdir()] == ["a-checkpoints"]
        assert fine_tune(tiny_lm(), RECORDS, tmp_path / "a", QUICK).steps == 3

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TuningError, match="a folder that can be written"):
            fine_tune(tiny_lm(), RECORDS, tmp_path / "file" / "a", QUICK)


class TestRefused:
    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few(self, tmp_path, count):
        with pytest.raises(TuningError, match=f"to fine-tune on, got {count} of {count}"):
            fine_tune(tiny_lm(), RECORDS[:count], tmp_path / "a", QUICK)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"response_ids": ()}, "token ids of its response, got none"),
            ({"language_model": "gpt-2"}, "expected a response of 'tiny', got one of 'gpt-2'"),
            ({"response_ids": (5, 300)}, "expected token ids from 0 to 299, got 300"),
        ],
    )
    def test_records(self, tmp_path, change, message):
        with pytest.raises(TuningError, match=message):
            fine_tune(tiny_lm(), [RECORDS[0], replace(RECORDS[1], **change)], tmp_path / "a", QUICK)

    @pytest.mark.parametrize(
        "setting",
        [{"learning_rate": 0}, {"epochs": 0}, {"batch_size": 0}, {"gradient_accumulation": -1}],
    )
    def test_settings(self, setting):
        with pytest.raises(TuningError, match=next(iter(setting))):
            FineTuneSettings(**setting)


def test_the_defaults_are_the_articles():
    found = FineTuneSettings()
    assert (found.r, found.alpha, found.targets) == (16, 32, ("q_proj", "v_proj"))
    assert (found.learning_rate, found.epochs, found.gradient_accumulation) == (2e-4, 1, 4)
    assert found.max_length == 512


def test_sampled_responses_of_a_plain_prompt():
    """Ids are learned as they were sampled, also where encoding their text gives others."""
    lm = tiny_lm()
    prompt = Prompt.from_text("Where", chat=False)
    from mbrl_text_env.mdp import initial, transition

    state = initial(prompt, lm)
    [[chunk]] = lm.sample([state], 1, 20, seeds=[spawn_seed(0, 1)])
    ended = transition(state, chunk, 20)
    text = lm.decode(ended.response_ids)
    made = replace(
        record(text, prompt), response_ids=ended.response_ids, finish_reason=ended.finish_reason
    )
    assert lm._tokenizer.tokenizer(text)["input_ids"] != list(ended.response_ids)
    [found, _] = examples_of(lm, [made, made], 90)
    assert found.input_ids == [*state.prompt_ids, *ended.response_ids]
