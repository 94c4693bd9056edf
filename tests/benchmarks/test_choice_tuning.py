"""The statistics by hand, the choices on a toy world, and the command on a tiny model."""

import json

import numpy as np
import pytest
import torch

from mbrl_text_env.agents.learning.training import prompts_digest
from mbrl_text_env.agents.model_free import load_policy
from mbrl_text_env.benchmarks.choice_tuning import HIGHEST, RANDOM, _choices, comparison, main

# Under its own name pytest would take it for tests.
from mbrl_text_env.benchmarks.choice_tuning import Test as Measurement
from mbrl_text_env.benchmarks.paired import chosen_prompts
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.proposer import FeatureLayout
from mbrl_text_env.rewards import make
from tests.agents.model_free.choice_worlds import LM, VALIDATION, best, chance, reward
from tests.agents.model_free.test_candidate_policy import greedy, policy
from tests.benchmarks.test_policy_tuning import TOKENS, Command, said

SMALL = {
    "--total-steps": "16", "--num-envs": "4", "--num-candidates": "2", "--chunk-tokens": "4",
    "--prompts": "3", "--episodes": "2",
}  # fmt: skip
BOTH = ["ppo", "dqn"]
ALL = [RANDOM, HIGHEST, *BOTH]


def result(scores):
    return {"scores": scores, "usage": {}}


class TestComparison:
    # Episodes of a prompt differ, so that rows are not prompts: each has the mean 0.5.
    DRAWN = ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 0.0), (0.75, 0.25), (0.5, 0.5))

    def moved(self, *changes):
        rows = zip(self.DRAWN, changes, strict=True)
        return result([[score + change for score in scores] for scores, change in rows])

    def test_by_hand(self):
        """Six prompts have 64 sign patterns.

        A sum as far from 0 as five steps up and one down is reached by 2 of 6 and by 12 of 4; one
        of six steps by 2. Holm multiplies the two smallest, 1/32, by 3 and by 2 and takes the
        larger for both, and the largest, 7/32, by 1.
        """
        up, down = 0.25, -0.25
        results = {
            RANDOM: self.moved(0, 0, 0, 0, 0, 0),
            HIGHEST: self.moved(up, up, up, up, up, down),
            "ppo": self.moved(up, up, up, up, up, up),
            "dqn": self.moved(down, down, down, down, down, down),
        }
        rows = comparison(results, list("abcdef"), seed=0)
        assert [row["choice"] for row in rows] == [HIGHEST, "ppo", "dqn"]
        assert [row["before"] for row in rows] == [0.5, 0.5, 0.5]
        assert [row["after"] for row in rows] == pytest.approx([0.5 + 1 / 6, 0.75, 0.25])
        assert [row["difference"] for row in rows] == pytest.approx([1 / 6, 0.25, -0.25])
        assert [row["interval"] for row in rows[1:]] == [[0.25, 0.25], [-0.25, -0.25]]
        assert [row["wins_ties_losses"] for row in rows] == [[5, 0, 1], [6, 0, 0], [0, 0, 6]]
        assert [row["p_value"] for row in rows] == [7 / 32, 1 / 32, 1 / 32]
        assert [row["p_holm"] for row in rows] == [7 / 32, 3 / 32, 3 / 32]
        assert {row["num_prompts"] for row in rows} == {6}

    def test_rows_are_prompts_and_columns_their_episodes(self):
        """Of two prompts with three episodes the first rises by 1 and the second by 0."""
        drawn, chosen = [[0.0, 0.5, 1.0], [3.0, 3.0, 3.0]], [[1.5, 1.5, 1.5], [2.0, 3.0, 4.0]]
        [row] = comparison({RANDOM: result(drawn), "dqn": result(chosen)}, ["a", "b"], seed=0)
        assert (row["before"], row["after"], row["wins_ties_losses"]) == (1.75, 2.25, [1, 1, 0])
        # Of the sign patterns two give 1 and two -1; one comparison alone needs no correction.
        assert (row["p_value"], row["p_holm"]) == (1.0, 1.0)

    def test_the_order_of_results_does_not_matter(self):
        drawn, chosen = self.moved(0, 0, 0, 0, 0, 0), self.moved(1, 1, 1, 1, 1, 1)
        last = comparison({"ppo": chosen, RANDOM: drawn}, list("abcdef"), seed=0)
        assert last == comparison({RANDOM: drawn, "ppo": chosen}, list("abcdef"), seed=0)
        assert last[0]["difference"] == 1.0


class TestChoices:
    def test_the_highest_prefix_reward(self):
        """Whatever else is seen, and whatever the prefix scored; the first of equals."""
        layout = FeatureLayout(4, 2, True)
        rows = np.random.default_rng(0).normal(size=(4, layout.size)).astype(np.float32) * 9
        layout.split(rows).rewards[..., 0] = [
            [0.25, 0.75, 1.0, 0.0],
            [-0.5, -1.0, -0.75, -2.0],
            [0.0, 0.5, 0.25, 0.5],
            [1.0, 1.0, 1.0, 1.5],
        ]
        found = _choices(policy(layout), seed=0)[HIGHEST](rows)
        assert found.tolist() == [2, 0, 1, 3]

    def drawn(self, seed, sizes):
        choose = _choices(policy(), seed)[RANDOM]
        return [choose(np.zeros((size, 1))).tolist() for size in sizes]

    def test_random_follows_from_its_seed(self):
        first = self.drawn(3, [50, 50])
        assert first == self.drawn(3, [50, 50])
        assert first != self.drawn(4, [50, 50])
        # Each choice is a new draw.
        assert first[0] != first[1]

    def test_random_takes_each_candidate_as_often(self):
        [found] = self.drawn(0, [4000])
        # Four standard deviations.
        assert np.bincount(found) == pytest.approx([1000] * 4, abs=110)


class TestScores:
    """Letters drawn evenly, of which "a" counts: what chance and the best choice earn is known."""

    EPISODES = 300

    def scored(self, found, choice="", seed=0):
        return Measurement(LM, reward(), VALIDATION, self.EPISODES, seed).scores(found, choice)

    def test_what_they_earn(self):
        assert best() > chance() + 0.2
        for choice, expected in ((RANDOM, chance()), (HIGHEST, best())):
            found = self.scored(policy(), choice)
            assert np.shape(found["scores"]) == (1, self.EPISODES)
            # Three standard errors of a mean of so many times eight letters.
            assert np.mean(found["scores"]) == pytest.approx(expected, abs=0.03)
            # Nothing ends early: four chunks of two tokens from four candidates.
            assert found["usage"]["generated_tokens"] == self.EPISODES * 4 * 4 * 2

    def test_the_policy_chooses_unless_another_choice_is_named(self):
        """One that goes by the rewards of prefixes scores as that choice does, on any policy."""
        contrary = greedy()
        with torch.no_grad():
            contrary.scorer.net[0].weight.neg_()
        highest, lowest = self.scored(greedy())["scores"], self.scored(contrary)["scores"]
        assert np.mean(lowest) < chance() - 0.2
        assert self.scored(contrary, HIGHEST)["scores"] == highest
        drawn = [self.scored(found, RANDOM)["scores"] for found in (greedy(), contrary)]
        assert drawn[0] == drawn[1]

    def test_the_seed_decides(self):
        first = self.scored(policy(), RANDOM)["scores"]
        assert first == self.scored(policy(), RANDOM)["scores"]
        assert first != self.scored(policy(), RANDOM, seed=1)["scores"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(main, tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuning") / "run"
    found = command.run(out)
    assert found.exit_code == 0, found.output
    return out, json.loads(out.with_suffix(".json").read_text()), found


def kept_in(out):
    """The files of scores, by the choice."""
    return {name: json.loads((out / f"{name.replace(' ', '-')}.json").read_text()) for name in ALL}


def trained(found):
    """The trainings that a command told of."""
    return [line for line in found.stderr.splitlines() if line.endswith("steps")]


def made(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


class TestCommand:
    def test_the_figures_are_those_of_the_files(self, command, finished):
        out, figures, _ = finished
        lm, reward_model = TransformersLM(command.model), make(f"{command.reward}:letters")
        held_out = chosen_prompts(reward_model, "test", 3, KeyError)
        test, files = Measurement(lm, reward_model, held_out, 2, 0), kept_in(out)
        policies = {name: load_policy(out / name, lm, reward_model) for name in BOTH}
        again = {
            **{choice: test.scores(policies["dqn"], choice) for choice in (RANDOM, HIGHEST)},
            **{name: test.scores(policies[name]) for name in BOTH},
        }
        for name in ALL:
            assert np.shape(files[name]["scores"]) == (3, 2)
            assert files[name]["scores"] == again[name]["scores"], name
        # The random choice is another one than the highest: the comparison is of two things.
        assert files[RANDOM]["scores"] != files[HIGHEST]["scores"]
        assert figures["result"] == comparison(files, [prompt.id for prompt in held_out], 0)
        assert [row["choice"] for row in figures["result"]] == [HIGHEST, *BOTH]
        assert figures["use"] == {name: files[name]["usage"] for name in ALL}

    def test_what_was_trained(self, finished):
        out, figures, _ = finished
        assert figures["num_train_prompts"] == 465
        assert list(figures["training"]) == list(figures["settings"]) == BOTH
        for name, training in figures["training"].items():
            view = load_policy(out / name).view
            limits = view.num_candidates, view.chunk_tokens, view.max_response_tokens
            assert limits == (2, 4, TOKENS)
            assert (training["ledger"]["algorithm"], training["ledger"]["steps"]) == (name, 16)
            curve = json.loads((out / name / "curve.json").read_text())["episodes"]
            assert training["curve"] == curve
            assert training["ledger"] == json.loads((out / name / "ledger.json").read_text())
            # Four environments, four times: a response has two chunks at most.
            assert 8 <= len(curve) <= 16
        # A training shorter than a rollout is one.
        ppo = figures["settings"]["ppo"]
        assert (ppo["rollout_steps"], ppo["batch_size"]) == (16, 16)

    def test_what_is_printed(self, finished):
        _, figures, found = finished
        shown = ("reward", "settings", "test", "language_model", "result")
        assert json.loads(found.stdout) == {name: figures[name] for name in shown}
        assert trained(found) == ["ppo: 16 steps", "dqn: 16 steps"]

    def test_a_second_run_makes_nothing(self, command, finished):
        out, figures, first = finished
        before = made(out)
        again = command.run(out)
        assert (again.exit_code, again.stdout, trained(again)) == (0, first.stdout, [])
        assert made(out) == before
        assert json.loads(out.with_suffix(".json").read_text()) == figures

    def test_a_run_that_was_stopped_goes_on(self, command, finished, tmp_path):
        """Once while PPO is trained, once while DQN is; what was there stays as it is."""
        _, figures, _ = finished
        out = tmp_path / "run"
        found = command.run(out, stop_after="config.json")
        assert found.exit_code == 130, found.output
        assert "of 16 steps. The same call goes on" in said(found)
        record = json.loads((out / "ppo-checkpoints" / "run.json").read_text())
        train = chosen_prompts(make(f"{command.reward}:letters"), "train", None, KeyError)
        assert record["prompts"] == prompts_digest(train)
        assert not (out / "ppo").exists()
        found = command.run(out, stop_after="ppo.json")
        assert found.exit_code == 130, found.output
        assert "of 16 steps. The same call goes on" in said(found)
        assert not (out / "dqn").exists()
        before = made(out / "ppo")
        assert len(before) == 4
        found = command.run(out)
        assert (found.exit_code, trained(found)) == (0, ["dqn: 16 steps"]), found.output
        assert made(out / "ppo") == before
        assert not list(out.glob("*-checkpoints"))
        assert json.loads(out.with_suffix(".json").read_text())["result"] == figures["result"]

    def test_one_algorithm_alone(self, command, finished, tmp_path):
        """All is as beside the other, but for the correction for two comparisons, not three."""
        _, figures, _ = finished
        found = command.run(tmp_path / "run", algorithms=" dqn ")
        assert found.exit_code == 0, found.output
        rows, three = json.loads(found.stdout)["result"], figures["result"]
        assert [row["choice"] for row in rows] == [HIGHEST, "dqn"]
        for row, same in zip(rows, (three[0], three[2]), strict=True):
            assert {**row, "p_holm": 0.0} == {**same, "p_holm": 0.0}
        assert not (tmp_path / "run" / "ppo").exists()

    def test_the_folder_of_another_run(self, command, finished, tmp_path):
        out, _, _ = finished
        before = made(out)
        found = command.run(out, episodes=3)
        assert found.exit_code == 2
        assert "another measurement of choices (test: [3, 2] there, [3, 3] here)" in said(found)
        found = command.run(out, seed=1)
        assert found.exit_code == 2
        assert "another measurement of choices (settings.dqn.seed: 0" in said(found)
        assert made(out) == before
        (tmp_path / "precious.txt").write_text("mine")
        found = command.run(tmp_path)
        assert found.exit_code == 2
        assert "holds other files and no measurement of choices" in said(found)
        assert list(tmp_path.iterdir()) == [tmp_path / "precious.txt"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"algorithms": "ppo,a2c"}, "--algorithms: expected ppo, dqn or both, got 'ppo,a2c'"),
            ({"algorithms": ""}, "--algorithms: expected ppo, dqn or both, got ''"),
            ({"num_envs": 5}, "TuningError: rollout_steps: expected a multiple of num_envs (5)"),
            ({"prompts": 99999}, "ChoiceTuningError: Expected at least 99999 test prompts"),
            ({"reward": "sentimant"}, "Did you mean 'sentiment'"),
            ({"dtype": "int4"}, "--dtype: expected one of"),
        ],
    )
    def test_bad_input_is_told_without_a_traceback(self, command, tmp_path, changes, message):
        found = command.run(tmp_path / "run", **changes)
        assert found.exit_code == 2, found.output
        assert message in said(found)
        assert "Traceback" not in found.output
        assert not (tmp_path / "run.json").exists()
        assert not list(tmp_path.glob("run/*-checkpoints"))
