"""PPO and DQN learn which candidate to take, go on after a stop, and say what is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from mbrl_text_env.agents.learning import TuningError
from mbrl_text_env.agents.model_free import (
    CandidatePolicy,
    DQNSettings,
    Measured,
    PPOSettings,
    evaluate,
    load_policy,
    train_dqn,
    train_ppo,
)
from mbrl_text_env.files import restored
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Prompt
from tests.agents.model_free.choice_worlds import (
    DQN,
    LM,
    PPO,
    PROMPTS,
    VALIDATION,
    LetterShares,
    best,
    chance,
    reward,
)
from tests.toys import CountReward

ALGORITHMS = {"ppo": (train_ppo, PPO), "dqn": (train_dqn, DQN)}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(algorithm, folder, reward_model=None, prompts=PROMPTS, changes=None, **options):
    function, settings = ALGORITHMS[algorithm]
    settings = replace(settings, **(changes or {}))
    options.setdefault("validation", VALIDATION)
    return function(LM, reward_model or reward(), prompts, folder, settings, **options)


@pytest.fixture(scope="module", params=list(ALGORITHMS))
def trained(request, tmp_path_factory):
    """A training that nothing stopped."""
    folder = tmp_path_factory.mktemp(request.param) / "policy"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    report = train(request.param, folder)
    torch.set_num_threads(before)
    return request.param, folder, report


class TestLearning:
    def test_it_comes_near_the_best_choice(self, trained):
        """Chance earns about 0.5; always taking the best of the four, about 0.8."""
        _, folder, _ = trained
        policy = load_policy(folder, LM, reward())
        rng = np.random.default_rng(0)
        chosen = evaluate(policy, LM, reward(), VALIDATION, episodes=400)
        drawn = evaluate(
            policy, LM, reward(), VALIDATION, episodes=400,
            choose=lambda rows: rng.integers(4, size=len(rows)),
        )  # fmt: skip
        assert chosen.shape == (1, 400)
        assert drawn.mean() == pytest.approx(chance(), abs=0.04)
        assert chosen.mean() > best() - 0.05 > chance() + 0.2

    def test_an_encoder_of_ones_own(self, tmp_path):
        changes = {"encoder": "own", "prefix_rewards": False, "hidden": (16,)}
        encoder = LetterShares()
        train("ppo", tmp_path / "p", changes=changes, encoder=encoder)
        policy = load_policy(tmp_path / "p", encoder=encoder)
        assert evaluate(policy, LM, reward(), VALIDATION, episodes=200).mean() > best() - 0.1

    def test_rewards_at_the_end_teach_too(self, tmp_path):
        train("ppo", tmp_path / "p", changes={"reward": "terminal"})
        policy = load_policy(tmp_path / "p")
        assert evaluate(policy, LM, reward(), VALIDATION, episodes=200).mean() > best() - 0.1


class TestReport:
    def test_what_it_took(self, trained):
        algorithm, folder, report = trained
        settings = ALGORITHMS[algorithm][1]
        # Nothing ends early in this world: four chunks of two tokens from four candidates.
        assert report.steps == settings.total_steps
        drawn = (report.steps + settings.num_envs) * 4 * 2
        assert report.usage.generated_tokens == drawn
        assert len(report.curve) == report.steps // 4
        # Each step pays for a score of the chunk, and for those of new prefixes.
        assert report.steps < report.usage.reward_calls <= report.steps * 6 + 5 * 16
        assert [point.steps for point in report.validation] == [
            *range(0, settings.total_steps, 512),
            settings.total_steps,
        ]
        for point in report.validation:
            assert point.own_usage.generated_tokens == 4 * 4 * 2
            assert point.usage.generated_tokens == (point.steps + settings.num_envs) * 4 * 2
            assert len(point.scores) == 1
        assert report.validation[0].training_flops == 0
        assert report.validation[-1].training_flops == report.training_flops
        assert 0 < report.validation[1].wall_seconds < report.wall_seconds
        assert report.training_flops > 0
        written = json.loads((folder / "ledger.json").read_text())
        assert written["generated_tokens"] == report.usage.generated_tokens
        assert written["total_flops"] == report.usage.flops + report.training_flops
        curve = json.loads((folder / "curve.json").read_text())
        assert [tuple(row) for row in curve["episodes"]] == list(report.curve)
        assert [restored(Measured, row) for row in curve["validation"]] == list(report.validation)

    def test_episodes_are_scores(self, trained):
        _, _, report = trained
        scores = [score for _, score in report.curve]
        assert set(scores) <= {i / 8 for i in range(9)}
        tenth = len(scores) // 8
        assert np.mean(scores[-tenth:]) > np.mean(scores[:tenth]) + 0.1

    def test_nothing_is_left_but_numbers(self, trained):
        _, folder, _ = trained
        assert {path.name for path in folder.iterdir()} == {
            "policy.json", "policy.safetensors", "ledger.json", "curve.json",
        }  # fmt: skip
        assert list(folder.parent.iterdir()) == [folder]

    @every_algorithm
    def test_the_seed_decides(self, algorithm, tmp_path):
        changes = {"total_steps": 512}
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            train(algorithm, tmp_path / name, changes={**changes, "seed": seed})
        a, b, c = ((tmp_path / n / "policy.safetensors").read_bytes() for n in "abc")
        assert a == b
        assert a != c

    def test_the_global_generators_are_left_alone(self, tmp_path):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        train("ppo", tmp_path / "p", changes={"total_steps": 512}, validation=())
        assert torch.equal(torch_state, torch.get_rng_state())
        assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002


class Stop(BaseCallback):
    """Ends a training in one way or another after some steps."""

    def __init__(self, at, how):
        super().__init__()
        self.at, self.how = at, how

    def _on_step(self):
        if self.num_timesteps == self.at:
            self.how()
        return True


def same(one: Path, other: Path):
    """Policies, curves and ledgers, times aside."""
    assert (one / "policy.safetensors").read_bytes() == (other / "policy.safetensors").read_bytes()
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (one, other)]
    assert curves[0]["episodes"] == curves[1]["episodes"]
    seen = [[(r["steps"], r["scores"]) for r in curve["validation"]] for curve in curves]
    assert seen[0] == seen[1]
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (one, other)]
    for ledger in ledgers:
        for name in ("seconds", "wall_seconds"):
            ledger.pop(name)
    calls = [ledger.pop("reward_calls") for ledger in ledgers]
    assert ledgers[0] == ledgers[1]
    # Prefixes that were known are scored once more after a stop.
    assert 0 <= calls[1] - calls[0] <= 16


class TestStopped:
    def test_ctrl_c(self, trained, tmp_path, capsys):
        algorithm, whole, _ = trained

        def press():
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt, match="The same call resumes"):
            train(algorithm, tmp_path / "p", callbacks=[Stop(624, press)])
        assert "Ctrl-C again stops at once" in capsys.readouterr().err
        assert not (tmp_path / "p").exists()
        train(algorithm, tmp_path / "p")
        same(whole, tmp_path / "p")

    @pytest.mark.parametrize("at", [528, 1008])
    def test_killed_between_checkpoints(self, trained, tmp_path, at):
        algorithm, whole, _ = trained

        def die():
            raise MemoryError

        with pytest.raises(MemoryError):
            train(algorithm, tmp_path / "p", callbacks=[Stop(at, die)])
        train(algorithm, tmp_path / "p")
        same(whole, tmp_path / "p")

    def test_sigkill(self, tmp_path):
        train("ppo", tmp_path / "whole")
        program = textwrap.dedent(
            f"""
            import os, signal
            from tests.agents.model_free.test_sb3 import Stop, train
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            train("ppo", {str(tmp_path / "p")!r}, callbacks=[Stop(1200, kill)])
            """
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        train("ppo", tmp_path / "p")
        same(tmp_path / "whole", tmp_path / "p")

    def test_checkpoints_are_numbers(self, trained, tmp_path):
        algorithm, _, _ = trained

        def die():
            raise MemoryError

        with pytest.raises(MemoryError):
            train(algorithm, tmp_path / "p", callbacks=[Stop(1008, die)])
        files = [path for path in (tmp_path / "p-checkpoints").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}

    def test_a_half_written_checkpoint(self, tmp_path):
        """A folder without its state is none; one with damaged numbers is told."""

        def die():
            raise MemoryError

        with pytest.raises(MemoryError):
            train("ppo", tmp_path / "p", callbacks=[Stop(1008, die)])
        [checkpoint] = (tmp_path / "p-checkpoints").glob("checkpoint-*")
        tensors = checkpoint / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:100])
        with pytest.raises(TuningError, match="expected a checkpoint of this training"):
            train("ppo", tmp_path / "p")
        (checkpoint / "trainer_state.json").write_text("{")
        assert train("ppo", tmp_path / "p").steps == PPO.total_steps

    @pytest.mark.parametrize("change", [{"seed": 9}, {"hidden": (4,)}, {"learning_rate": 1e-4}])
    def test_other_settings_do_not_go_on(self, tmp_path, change):
        def die():
            raise MemoryError

        with pytest.raises(MemoryError):
            train("ppo", tmp_path / "p", callbacks=[Stop(528, die)])
        with pytest.raises(TuningError, match="holds another training"):
            train("ppo", tmp_path / "p", changes=change)
        with pytest.raises(TuningError, match="holds another training"):
            train("ppo", tmp_path / "p", prompts=[Prompt("four", "b")])

    def test_no_space_left(self, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(TuningError, match="No space left"):
            train("ppo", tmp_path / "p")
        assert not (tmp_path / "p").exists()


class TestRefused:
    @every_algorithm
    def test_a_reward_without_signal(self, algorithm, tmp_path):
        class Same(CountReward):
            def score(self, prompts, responses):
                return [0.25] * len(responses)

        with pytest.raises(TuningError, match=r"got 0\.25 for all of the first \d+ episodes"):
            train(algorithm, tmp_path / "p", Same())

    def test_a_reward_that_fails(self, tmp_path):
        class Failing(CountReward):
            def score(self, prompts, responses):
                return [float("nan") if "b" not in r else 0.5 for r in responses]

        with pytest.raises(RewardError, match="count"):
            train("ppo", tmp_path / "p", Failing())

    def test_prompts(self, tmp_path):
        with pytest.raises(TuningError, match="prompts: expected at least 1"):
            train("ppo", tmp_path / "p", prompts=[])
        with pytest.raises(TuningError, match="distinct ids"):
            train("ppo", tmp_path / "p", prompts=[PROMPTS[0], PROMPTS[0]])

    def test_a_folder_with_other_things(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(TuningError, match="with other files"):
            train("ppo", tmp_path)

    def test_an_encoder_that_the_settings_do_not_name(self, tmp_path):
        with pytest.raises(TuningError, match="encoder"):
            train("ppo", tmp_path / "p", encoder=LetterShares())

    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            (PPOSettings, {"total_steps": 0}),
            (PPOSettings, {"rollout_steps": 100}),
            (PPOSettings, {"rollout_steps": 64}),
            (PPOSettings, {"reward": "sparse"}),
            (PPOSettings, {"discount": 0.0}),
            (PPOSettings, {"hidden": (0,)}),
            (DQNSettings, {"updates": 0}),
            (DQNSettings, {"exploration_final": 2.0}),
        ],
    )
    def test_settings_out_of_range(self, kind, change):
        with pytest.raises(TuningError, match=next(iter(change))):
            kind(**change)


@every_algorithm
def test_the_real_models(algorithm, smollm2, tmp_path):
    """SmolLM2 proposes and MiniLM embeds: it trains, is kept, and chooses again."""
    from mbrl_text_env.rewards import make

    function, settings = ALGORITHMS[algorithm]
    settings = replace(
        settings, num_candidates=2, chunk_tokens=4, max_response_tokens=8, encoder="embedded",
        total_steps=16, num_envs=4, flat_episodes=100,
    )  # fmt: skip
    if algorithm == "ppo":
        settings = replace(settings, rollout_steps=16, batch_size=8)
    prompts = [Prompt.from_text("Praise the sea."), Prompt.from_text("Name a fruit.")]
    report = function(smollm2, make("sentiment"), prompts, tmp_path / "p", settings)
    assert report.steps == 16
    assert report.usage.value_flops > 0
    policy = load_policy(tmp_path / "p", smollm2, make("sentiment"))
    assert isinstance(policy, CandidatePolicy)
    scores = evaluate(policy, smollm2, make("sentiment"), prompts)
    assert np.isfinite(scores).all()
