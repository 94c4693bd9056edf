"""The statistics by hand, and the command on a tiny model."""

import json
import textwrap

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.paired import chosen_prompts, kept, paired
from mbrl_text_env.benchmarks.policy_tuning import (
    Sampled,
    comparison,
    constrained,
    main,
    plot_curve,
    sampled,
)
from mbrl_text_env.language_models import TableLM, TransformersLM
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Prompt
from tests.language_models.conftest import (
    CHAT_TEMPLATE,
    make_config,
    save_model,
    train_tokenizer,
)
from tests.toys import CountReward

TOKENS = 8
SMALL = {
    "--steps": "2", "--prompts-per-step": "2", "--num-generations": "3", "--prompts": "3",
    "--samples": "2", "--learning-rate": "0.05",
}  # fmt: skip


class Command:
    """A command on a tiny model, with a reward in a file: the share of ASCII letters.

    Args:
        main: The command's function.
        folder: Of the model and the reward's file.
        options: Of the command.
    """

    def __init__(self, main, folder, options):
        self.folder, self.options = folder, options
        self.app = typer.Typer()
        self.app.command()(main)
        tokenizer = train_tokenizer(chat_template=CHAT_TEMPLATE)
        # Builtin prompts are longer than those of the other tests.
        config = make_config("llama", tokenizer.eos_token_id, max_position_embeddings=512)
        self.model = save_model(folder / "tiny", config, tokenizer)
        self.reward = folder / "letters.py"
        self.reward.write_text(
            textwrap.dedent(
                """
                import os
                import signal
                from pathlib import Path

                STOP = Path(__file__).with_name("stop")

                def letters(prompt, response):
                    if STOP.is_file() and Path(STOP.read_text()).exists():
                        STOP.unlink()
                        os.kill(os.getpid(), signal.SIGINT)
                    count = sum(c.isalpha() and c.isascii() for c in response)
                    return count / max(1, len(response))
                """
            )
        )

    def run(self, out, *, stop_after=None, **changes):
        """Run in a folder; Ctrl-C comes with the first score once a file of it is there."""
        if stop_after is not None:
            (self.folder / "stop").write_text(str(out / stop_after))
        options = {
            **self.options,
            "--reward": f"{self.reward}:letters",
            "--language-model": str(self.model),
            "--dtype": "float32",
            "--max-response-tokens": str(TOKENS),
            "--out": str(out),
            "--json": str(out.with_suffix(".json")),
            **{f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()},
        }
        words = [word for pair in options.items() for word in pair]
        return CliRunner(env={"COLUMNS": "200"}).invoke(self.app, words)


def said(result):
    """What a command told, without line ends."""
    return " ".join(result.output.split())


class TestPaired:
    def test_by_hand(self):
        """Prompt means 0.5, 0.5, 0.75 and 1, 0.5, 0.5: differences 0.5, 0 and -0.25."""
        prompts = ["a", "a", "b", "c", "c"]
        found = paired([0.0, 1.0, 0.5, 1.0, 0.5], [1.0, 1.0, 0.5, 0.5, 0.5], prompts, seed=0)
        assert (found["num_prompts"], found["wins_ties_losses"]) == (3, [1, 1, 1])
        assert found["before"] == pytest.approx(1.75 / 3)
        assert found["after"] == pytest.approx(2 / 3)
        assert found["difference"] == pytest.approx(0.25 / 3)
        # Of the sums of the sign patterns (0.75, 0.25, -0.25, -0.75) two are 0.25 or more.
        assert found["p_value"] == 1.0
        low, high = found["interval"]
        assert -0.25 <= low < 0.25 / 3 < high <= 0.5

    def test_the_unit_is_the_prompt(self):
        """Eight rows of three prompts that rise alike: one of the eight sign patterns, twice."""
        prompts = ["a"] * 6 + ["b", "c"]
        found = paired([0.0, 0.5] * 4, [0.25, 0.75] * 4, prompts, seed=0)
        assert found["num_prompts"] == 3
        assert found["interval"] == [0.25, 0.25]
        assert found["p_value"] == 0.25
        assert found["wins_ties_losses"] == [3, 0, 0]

    def test_rows_that_do_not_pair(self):
        with pytest.raises(ValueError, match="a prompt for each of 1 values, got 2"):
            paired([0.0, 1.0], [1.0], ["a", "b"], seed=0)


class TestKept:
    def test_it_is_made_once(self, tmp_path):
        calls = []

        def make_it():
            calls.append("made")
            return {"scores": [0.5, 1.0]}

        path = tmp_path / "deep" / "found.json"
        assert kept(path, make_it) == kept(path, make_it) == {"scores": [0.5, 1.0]}
        assert calls == ["made"]
        path.write_text("[7]")
        assert kept(path, make_it) == [7]

    def test_what_fails_leaves_nothing(self, tmp_path):
        path = tmp_path / "found.json"
        with pytest.raises(ZeroDivisionError):
            kept(path, lambda: 1 / 0)
        assert list(tmp_path.iterdir()) == []
        assert kept(path, lambda: 2) == 2


class TestChosenPrompts:
    def test_the_order_is_fixed_and_random(self):
        everything = chosen_prompts(make("sentiment"), "test", None, KeyError)
        there = load_prompts(split="test")
        assert sorted(p.id for p in everything) == sorted(p.id for p in there)
        assert [p.id for p in everything] != [p.id for p in there]
        assert chosen_prompts(make("sentiment"), "test", 5, KeyError) == everything[:5]

    def test_the_reward_applies_to_all(self):
        reward = make("constraints")
        found = chosen_prompts(reward, "train", None, KeyError)
        assert all(reward.applies_to(prompt) for prompt in found)
        assert 2 <= len(found) < len(load_prompts(split="train")) == 465

    def test_too_few(self):
        class NotEnoughError(Exception):
            pass

        message = "at least 466 train prompts that 'sentiment' applies to, got 465. Take fewer"
        with pytest.raises(NotEnoughError, match=message):
            chosen_prompts(make("sentiment"), "train", 466, NotEnoughError)
        with pytest.raises(NotEnoughError, match=r"at least 2 test .* got 0"):
            chosen_prompts(make("unit-tests"), "test", None, NotEnoughError)


def test_sampled_by_hand():
    """A model that writes "a b a b" whatever it is asked: two different bigrams of three."""
    text = "a b a b"
    sure = {text[:n]: np.eye(4)[" ab".index(text[n]) + 1] for n in range(len(text))}
    lm = TableLM(" ab", {**sure, text: [1.0, 0.0, 0.0, 0.0]})
    prompts = [Prompt.from_text(letters) for letters in ("a", "b")]
    found = sampled(lm, CountReward(), prompts, 2, 7, seed=0)
    assert found == Sampled(["a", "a", "b", "b"], [2 / 7] * 4, 7.0, 2 / 12)
    # With its stop token it is one longer; one word alone has no bigram.
    assert sampled(lm, CountReward(), prompts, 2, 9, seed=0).tokens == 8.0
    assert sampled(lm, CountReward(), prompts, 2, 2, seed=0).distinct == 0.0


def test_comparison_by_hand():
    before = Sampled(["a", "a", "b", "b"], [0.0, 0.5, 0.5, 0.5], tokens=12.0, distinct=0.75)
    after = Sampled(["a", "a", "b", "b"], [0.5, 0.5, 0.75, 0.75], tokens=9.0, distinct=0.5)
    assert comparison(before, after, seed=0) == {
        "num_prompts": 2, "before": 0.375, "after": 0.625, "difference": 0.25,
        "interval": [0.25, 0.25],
        # One of four sign patterns is as high, and so is one as low.
        "p_value": 0.5,
        "wins_ties_losses": [2, 0, 0],
        "tokens_before": 12.0, "tokens_after": 9.0, "distinct_before": 0.75, "distinct_after": 0.5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(main, tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuning") / "run"
    result = command.run(out)
    assert result.exit_code == 0, result.output
    return out, json.loads(out.with_suffix(".json").read_text()), result


class TestCommand:
    def test_the_figures_are_those_of_the_files(self, command, finished):
        from mbrl_text_env.agents.learning import serve

        out, figures, _ = finished
        before, after = (
            Sampled(**json.loads((out / f"{name}.json").read_text()))
            for name in ("before", "after")
        )
        assert figures["result"] == comparison(before, after, seed=0)
        assert len(before.scores) == 3 * 2
        lm, reward = TransformersLM(command.model), make(f"{command.reward}:letters")
        test = chosen_prompts(reward, "test", 3, KeyError)
        tuned = serve(lm, out / "adapter")
        for policy, found in ((lm, before), (tuned, after)):
            assert sampled(policy, reward, test, 2, TOKENS, seed=0) == found
        assert before.scores != after.scores
        assert figures["num_train_prompts"] == 465
        assert [step["step"] for step in figures["curve"]] == [1, 2]
        # Two steps of three responses to each of two prompts.
        assert figures["ledger"]["reward_calls"] == 12
        assert set(figures["tokens_per_second"]) == {"own", "generate"}
        assert min(figures["tokens_per_second"].values()) > 0

    def test_what_is_printed(self, finished):
        _, figures, result = finished
        shown = {name: value for name, value in figures.items() if name != "curve"}
        assert json.loads(result.stdout) == shown
        assert "step 2: reward" in result.stderr

    def test_the_curve_is_plotted(self, finished):
        import matplotlib.image

        out, figures, _ = finished
        written = matplotlib.image.imread(out.with_suffix(".png"))
        # The latest steps' mean and the steps themselves are drawn on white.
        assert (written[..., :3] < 1).any()
        plot_curve(figures["curve"], figures["reward"], out.with_name("again.png"))
        assert (matplotlib.image.imread(out.with_name("again.png")) == written).all()

    def test_a_second_run_makes_nothing(self, command, finished):
        out, figures, first = finished
        made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        again = command.run(out)
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert "step" not in again.stderr
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == made
        assert json.loads(out.with_suffix(".json").read_text()) == figures

    def test_a_run_that_was_stopped_goes_on(self, command, finished, tmp_path):
        _, figures, _ = finished
        out = tmp_path / "run"
        result = command.run(out, stop_after="speeds.json")
        assert result.exit_code == 130, result.output
        assert "Stopped after step 1 of 2. The same call goes on" in said(result)
        assert not (out / "adapter").exists()
        result = command.run(out)
        assert result.exit_code == 0, result.output
        assert json.loads(out.with_suffix(".json").read_text())["result"] == figures["result"]

    def test_the_folder_of_another_run(self, command, finished, tmp_path):
        out, _, _ = finished
        result = command.run(out, samples=3)
        assert result.exit_code == 2
        assert "another measurement of tuning (test: [3, 2] there, [3, 3] here)" in said(result)
        (tmp_path / "precious.txt").write_text("mine")
        result = command.run(tmp_path)
        assert result.exit_code == 2
        assert "holds other files and no measurement of tuning" in said(result)
        assert list(tmp_path.iterdir()) == [tmp_path / "precious.txt"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"algorithm": "ppo"}, "expected grpo or rloo, got 'ppo'"),
            ({"prompts": 99999}, "PolicyTuningError: Expected at least 99999 test prompts"),
            ({"reward": "sentimant"}, "Did you mean 'sentiment'"),
            ({"dtype": "int4"}, "--dtype: expected one of"),
            ({"constraint": "no_commas"}, "--constraint: expected JSON, got 'no_commas'"),
            ({"constraint": '["no_commas"]'}, "--constraint: expected an object such as"),
            ({"constraint": '{"type": "no_commas"}'}, "--instruction: expected the sentence"),
            ({"instruction": "Be brief."}, "--instruction: expected a --constraint"),
        ],
    )
    def test_bad_input_is_told_without_a_traceback(self, command, tmp_path, changes, message):
        result = command.run(tmp_path / "run", **changes)
        assert result.exit_code == 2, result.output
        assert message in said(result)
        assert "Traceback" not in result.output
        assert not (tmp_path / "run.json").exists()

    def test_a_constraint_of_ones_own(self, command, tmp_path):
        out = tmp_path / "run"
        result = command.run(
            out,
            reward="constraints",
            constraint='{"type": "max_words", "value": 4}',
            instruction="Be brief.",
        )
        assert result.exit_code == 0, result.output
        figures = json.loads(out.with_suffix(".json").read_text())
        assert figures["constraints"] == ['{"type": "max_words", "value": 4}', "Be brief."]
        assert 0 <= figures["result"]["before"] <= 1
        builtin = [p for p in load_prompts(split="train") if not p.metadata.get("constraints")]
        assert figures["num_train_prompts"] == len(builtin)


def test_constraints_are_given_to_prompts_without_any():
    prompts = [
        Prompt.from_text("Praise the sea.", "a", metadata={"kind": "review"}, split="test"),
        Prompt.from_text("No commas.", "b", metadata={"constraints": [{"type": "no_commas"}]}),
    ]
    [found] = constrained(prompts, ['{"type": "max_words", "value": 2}'], "Two words.")
    assert (found.id, found.text, found.split) == ("a", "Praise the sea. Two words.", "test")
    assert found.metadata == {
        "kind": "review",
        "constraints": [{"type": "max_words", "value": 2}],
    }
    assert make("constraints").score([found] * 2, ["Blue sea", "The blue sea"]).tolist() == [1, 0]
