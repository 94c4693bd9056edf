"""GRPO and RLOO with TRL's trainers, on a tiny model of a real architecture."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mbrl_text_env.agents.learning import TuningError, serve
from mbrl_text_env.agents.model_free import (
    PolicyGradientSettings,
    StepReport,
    train_grpo,
    train_rloo,
)
from mbrl_text_env.language_models.base import SamplingParams, spawn_seed
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Ledger, Prompt
from tests.agents.learning.tiny import PROMPTS, tiny_lm
from tests.toys import CountReward

QUICK = PolicyGradientSettings(
    r=4,
    alpha=8,
    steps=2,
    prompts_per_step=2,
    num_generations=4,
    max_completion_length=12,
    learning_rate=1e-2,
    batch_size=4,
)
TRAIN = {"grpo": train_grpo, "rloo": train_rloo}


class PaidReward(CountReward):
    """As many operations as there are characters."""

    name = "paid"

    def flops(self, prompts, responses):
        return np.asarray([float(len(response)) for response in responses])

    def flops_bound(self):
        return 100.0


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


class LettersReward(CountReward):
    """The share of characters that are ASCII letters."""

    name = "letters"

    def score(self, prompts, responses):
        return [sum(c.isalpha() and c.isascii() for c in r) / max(1, len(r)) for r in responses]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_two_steps(algorithm, beta, tmp_path):
    reward = PaidReward("e")
    settings = replace(QUICK, beta=beta)
    seen: list[StepReport] = []
    report = TRAIN[algorithm](
        tiny_lm(), reward, PROMPTS, tmp_path / "a", settings, on_step=seen.append
    )
    assert tuple(seen) == report.curve
    found = weights(tmp_path / "a")
    assert {n.split(".")[-3] for n in found} == {"q_proj", "v_proj"}
    assert all(w.abs().max() > 0 for n, w in found.items() if "lora_B" in n)
    # The curve is of the scores that the reward gave, in groups of four.
    assert len(report.curve) == 2
    for step, texts in zip(report.curve, reward.calls, strict=True):
        scores = np.array([text.count("e") / len(text) if text else 0.0 for text in texts])
        assert len(texts) == 8
        assert step.reward == pytest.approx(scores.mean(), abs=1e-6)
        assert step.flat_share == np.mean(np.ptp(scores.reshape(2, 4), axis=1) == 0)
        assert (step.kl is None) == (beta == 0)
    # Policies are the same before the first step.
    assert report.curve[0].kl in (None, pytest.approx(0.0, abs=1e-6))
    usage = report.usage
    assert usage.reward_calls == 16
    assert usage.reward_flops == sum(len(text) for texts in reward.calls for text in texts)
    assert usage.generated_tokens == 8 * sum(step.mean_tokens for step in report.curve)
    assert usage.lm_flops > 0 < usage.seconds
    ledger = json.loads((tmp_path / "a" / "ledger.json").read_text())
    assert ledger == report.ledger()
    assert ledger["total_flops"] == usage.flops + report.training_flops
    curve = json.loads((tmp_path / "a" / "curve.json").read_text())
    assert [step["reward"] for step in curve] == [step.reward for step in report.curve]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    suffixes = {path.suffix for path in (tmp_path / "a").iterdir()}
    assert suffixes <= {".json", ".jinja", ".safetensors", ".txt"}


def test_training_flops(tmp_path):
    """Forward passes' worth: loss and gradients; RLOO looks once more; KL needs the base's."""
    lm = tiny_lm()
    reports = [
        train(lm, CountReward("e"), PROMPTS, tmp_path / f"a{i}", replace(QUICK, steps=1, beta=beta))
        for i, (train, beta) in enumerate(((train_grpo, 0), (train_rloo, 0), (train_grpo, 0.1)))
    ]
    grpo, rloo, divergence = (report.training_flops for report in reports)
    assert rloo == pytest.approx(1.5 * grpo)
    assert divergence == pytest.approx(1.5 * grpo)
    usage = reports[0].usage
    tokens = usage.generated_tokens + 4 * sum(
        # Both prompts are as long.
        len(lm.encode_prompt(prompt))
        for prompt in PROMPTS[:2]
    )
    assert grpo > 2 * 2 * lm.num_parameters * (tokens - 16)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_it_learns(algorithm, tmp_path):
    """Letters become more frequent, also in what the served adapter samples."""
    lm, reward = tiny_lm(), LettersReward()
    settings = replace(
        QUICK,
        targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        r=8,
        alpha=16,
        steps=15,
        prompts_per_step=4,
        num_generations=8,
        batch_size=32,
        learning_rate=3e-2,
    )
    report = TRAIN[algorithm](lm, reward, PROMPTS, tmp_path / "a", settings)
    assert report.curve[-1].reward > report.curve[0].reward + 0.1
    before, after = mean_reward(lm, reward), mean_reward(serve(lm, tmp_path / "a"), reward)
    assert after > before + 0.1


def mean_reward(lm, reward):
    states = [initial(prompt, lm) for prompt in PROMPTS]
    params = SamplingParams(temperature=QUICK.temperature)
    rows = lm.sample(states, 16, 12, seeds=[7] * len(states), params=params)
    texts = [lm.decode(chunk.token_ids) for row in rows for chunk in row]
    return float(np.mean(reward.score([PROMPTS[0]] * len(texts), texts)))


def test_responses_are_the_language_models_own(tmp_path):
    """The first step's are those of the base, and what is scored is what it decodes."""
    lm = tiny_lm()
    reward = CountReward("e")
    train_grpo(lm, reward, PROMPTS, tmp_path / "a", replace(QUICK, steps=1))
    states = [initial(prompt, lm) for prompt in PROMPTS]
    seeds = [spawn_seed(0, 0)] * len(states)
    params = SamplingParams(temperature=QUICK.temperature)
    rows = lm.sample(states, 4, 12, seeds=seeds, params=params)
    drawn = {
        lm.decode(transition(state, chunk, 12).response_ids)
        for state, row in zip(states, rows, strict=True)
        for chunk in row
    }
    assert set(reward.calls[0]) <= drawn


@pytest.mark.filterwarnings("ignore:Reward model 'count' gave all 4")
class TestStopped:
    SETTINGS = replace(QUICK, steps=6, save_steps=2, beta=0.1, dropout=0.1)

    @pytest.fixture(scope="class", params=["grpo", "rloo"])
    @classmethod
    def whole(cls, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole") / "a"
        train = TRAIN[request.param]
        # Six prompts make three steps: the second pass has an order of its own.
        return train, folder, train(tiny_lm(), CountReward("e"), PROMPTS, folder, cls.SETTINGS)

    def check_same(self, whole, folder, report):
        _, there, expected = whole
        for name, weight in weights(folder).items():
            torch.testing.assert_close(weight, weights(there)[name], rtol=1e-4, atol=1e-6)
        seconds = {"usage": replace(report.usage, seconds=expected.usage.seconds)}
        got = replace(report, **seconds)
        assert got.usage == expected.usage
        assert got.training_flops == pytest.approx(expected.training_flops)
        for one, other in zip(got.curve, expected.curve, strict=True):
            assert one.reward == pytest.approx(other.reward)

    def test_a_kill(self, whole, tmp_path, monkeypatch):
        """An error in the fourth step; the step before it is the last one saved but one."""
        own_score = CountReward.score

        def failing(self, prompts, responses):
            if len(self.calls) == 3:
                raise OSError("the server is gone")
            return own_score(self, prompts, responses)

        train = whole[0]
        with monkeypatch.context() as patch:
            patch.setattr(CountReward, "score", failing)
            with pytest.raises(RewardError, match="the server is gone"):
                train(tiny_lm(), CountReward("e"), PROMPTS, tmp_path / "a", self.SETTINGS)
        assert not (tmp_path / "a").exists()
        reward = CountReward("e")
        report = train(tiny_lm(), reward, PROMPTS, tmp_path / "a", self.SETTINGS)
        assert len(reward.calls) == 4
        self.check_same(whole, tmp_path / "a", report)

    def test_ctrl_c(self, whole, tmp_path, monkeypatch):
        own_score = CountReward.score

        def stopping(self, prompts, responses):
            if len(self.calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return own_score(self, prompts, responses)

        train = whole[0]
        monkeypatch.setattr(CountReward, "score", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"Stopped after step 3 of 6.*same call"):
            train(tiny_lm(), CountReward("e"), PROMPTS, tmp_path / "a", self.SETTINGS)
        monkeypatch.undo()
        with pytest.raises(TuningError, match="holds another training"):
            train(tiny_lm(), CountReward("e"), PROMPTS[:4], tmp_path / "a", self.SETTINGS)
        report = train(tiny_lm(), CountReward("e"), PROMPTS, tmp_path / "a", self.SETTINGS)
        self.check_same(whole, tmp_path / "a", report)


def test_going_on_from_an_adapter(tmp_path):
    lm = tiny_lm()
    settings = replace(QUICK, steps=1, beta=0.1)
    train_grpo(lm, CountReward("e"), PROMPTS, tmp_path / "a", settings)
    train_grpo(lm, CountReward("e"), PROMPTS, tmp_path / "b", settings, start_from=tmp_path / "a")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert first.keys() == second.keys()
    # Each step moves a weight by about the learning rate.
    moved = {n: (second[n] - first[n]).abs().max().item() for n in first}
    assert 0 < max(moved.values()) < 0.03
    with pytest.raises(TuningError, match="expected an adapter for 'tiny'"):
        train_grpo(
            tiny_lm(seed=1),
            CountReward("e"),
            PROMPTS,
            tmp_path / "c",
            settings,
            start_from=tmp_path / "a",
        )


def test_any_reward_goes(tmp_path):
    """A function of two texts, and one of TRL that reads a column of the metadata."""
    prompts = [replace(p, metadata={"letter": "aeiou"[i % 5]}) for i, p in enumerate(PROMPTS)]

    def vowels(completions, letter, **kwargs):
        return [c[0]["content"].count(v) for c, v in zip(completions, letter, strict=True)]

    def brevity(prompt, response):
        return -float(len(response))

    for i, reward in enumerate((vowels, brevity)):
        report = train_grpo(tiny_lm(), reward, prompts, tmp_path / f"{i}", replace(QUICK, steps=1))
        assert report.reward_name == reward.__name__
    with pytest.raises(TuningError, match=r"the reward 'vowels' applies to, got 6 others"):
        train_grpo(tiny_lm(), vowels, PROMPTS, tmp_path / "c", QUICK)


class TestNoSignal:
    class Constant(CountReward):
        name = "constant"

        def score(self, prompts, responses):
            return [0.25] * len(responses)

    @pytest.mark.filterwarnings("ignore:.*step 1 teaches nothing")
    @pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
    def test_an_error_after_some_steps(self, algorithm, tmp_path):
        settings = replace(QUICK, steps=10, flat_steps=3, beta=0.1)
        with (
            pytest.warns(UserWarning, match="step 2 teaches nothing"),
            pytest.raises(
                TuningError, match=r"'constant' gave all 4 .* first 3 steps: there is no"
            ),
        ):
            TRAIN[algorithm](tiny_lm(), self.Constant(), PROMPTS, tmp_path / "a", settings)
        assert not (tmp_path / "a").exists()

    def test_a_late_flat_step_is_a_warning(self, tmp_path):
        class Late(CountReward):
            def score(self, prompts, responses):
                found = super().score(prompts, responses)
                return found if len(self.calls) < 2 else [1.0] * len(responses)

        settings = replace(QUICK, flat_steps=1)
        with pytest.warns(UserWarning, match="step 2 teaches nothing"):
            report = train_grpo(tiny_lm(), Late("e"), PROMPTS, tmp_path / "a", settings)
        assert report.curve[1].flat_share == 1


class TestRefused:
    def test_prompts(self, tmp_path):
        with pytest.raises(TuningError, match="prompts: expected at least 2"):
            train_grpo(tiny_lm(), CountReward(), PROMPTS[:1], tmp_path / "a", QUICK)
        with pytest.raises(TuningError, match=r"distinct ids, got \['Say"):
            train_grpo(tiny_lm(), CountReward(), PROMPTS[:2] + PROMPTS[:1], tmp_path / "a", QUICK)
        assert not list(tmp_path.iterdir())

    def test_metadata_that_a_reward_needs(self, tmp_path):
        from mbrl_text_env.rewards import make

        with pytest.raises(TuningError, match=r"first 'Say fox.', whose metadata"):
            train_rloo(tiny_lm(), make("constraints"), PROMPTS, tmp_path / "a", QUICK)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"num_generations": 1}, "compared with each other, got 1"),
            ({"batch_size": 3}, r"divisor of .* \(8\), got 3"),
            ({"temperature": 0}, "temperature"),
            ({"beta": -0.1}, "beta"),
            ({"steps": 0}, "steps"),
        ],
    )
    def test_settings(self, setting, message):
        with pytest.raises(TuningError, match=message):
            replace(QUICK, **setting)


def test_the_served_policy_charges_as_the_base_does(tmp_path):
    lm = tiny_lm()
    train_grpo(lm, CountReward("e"), PROMPTS, tmp_path / "a", replace(QUICK, steps=1))
    ledgers = [Ledger(), Ledger()]
    for model, ledger in zip((lm, serve(lm, tmp_path / "a")), ledgers, strict=True):
        model.clear_cache()
        model.features([initial(Prompt.from_text("Say it."), model)], ledgers=[ledger])
    assert ledgers[0].usage.lm_flops == ledgers[1].usage.lm_flops > 0
