"""Groups of options, and prices."""

import re
from dataclasses import dataclass

import pytest
import typer
from hypothesis import assume, example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.options import CompareError, load_prompts_option, priced
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.language_models.base import pass_usage
from mbrl_text_env.prompts import PromptError
from tests.toys import CountReward


@dataclass(frozen=True)
class Sizes:
    names: tuple[str, ...] = option(..., "Names.")
    count: int = option(2, "", min=1)
    hidden: int = 7

    def __post_init__(self):
        if not all(self.names):
            raise OSError("an empty name")


def shown(*words):
    app = typer.Typer()

    @app.command()
    @friendly
    def command(*, sizes: Sizes = Sizes(("a", "b"), count=3), other: float = 0.5) -> None:
        typer.echo(f"{sizes} {other}")

    return CliRunner().invoke(app, words)


def test_fields_are_options_with_the_defaults_of_the_instance():
    assert shown().output == "Sizes(names=('a', 'b'), count=3, hidden=7) 0.5\n"
    given = shown("--names", "c, d", "--count", "4", "--other", "1")
    assert given.output == "Sizes(names=('c', 'd'), count=4, hidden=7) 1.0\n"


def test_bounds_and_errors_of_a_group_exit_with_2():
    assert shown("--count", "0").exit_code == 2
    assert shown("--hidden", "1").exit_code == 2
    assert shown("--names", "a,,b").exit_code == 2


class TestPrices:
    """A token of `LM` is 3 FLOPs."""

    LM = NGramLM("ab", seed=1, flops_per_token=3.0)

    def price(self, text, lm=LM, length=16):
        return priced(CountReward(), text, lm, length).usage_bound().flops

    @pytest.mark.parametrize(
        ("text", "flops"),
        [("300tokens", 900), ("2e11flops", 2e11), (" 1.5Tokens ", 4.5), ("0flops", 0)],
    )
    def test_tokens_and_flops(self, text, flops):
        assert self.price(text) == flops

    @given(
        number=st.floats(0, 1e15) | st.integers(0, 10**15),
        unit=st.sampled_from(["tokens", "flops"]),
    )
    def test_any_number(self, number, unit):
        each = 3.0 if unit == "tokens" else 1.0
        assert self.price(f"{number}{unit}") == pytest.approx(number * each)

    @given(st.text(max_size=12))
    @example("300")
    @example("-3tokens")
    @example("nantokens")
    @example("1e999flops")
    @example("3 tokens")
    def test_what_is_no_price_is_an_error(self, text):
        assume(not re.fullmatch(r"\d+\.?\d*(e[+-]?\d{1,2})?(tokens|flops)", text.strip().lower()))
        with pytest.raises(CompareError, match="reward price: expected"):
            self.price(text)

    def test_a_token_counts_for_the_mean_of_a_response_to_a_prompt_as_long(self):
        """4 tokens at 2 x 50, and 4 x 2 x (4 x 4 + 4^2 / 2) for what they attend to: 592."""

        class Attentive(NGramLM):
            def usage_bound(self, prefix_tokens, new_tokens):
                return pass_usage(prefix_tokens, prefix_tokens, new_tokens, 50, 2)

        assert self.price("100tokens", Attentive("ab", seed=1), 4) == 100 * 592 / 4

    def test_a_model_that_counts_no_flops(self):
        free = NGramLM("ab", seed=1, flops_per_token=0.0)
        assert self.price("7flops", free) == 7
        with pytest.raises(CompareError, match="counts no FLOPs"):
            self.price("7tokens", free)

    def test_none_is_the_reward_itself(self):
        reward = CountReward()
        assert priced(reward, None, self.LM, 16) is reward


class TestSplitsOfAFile:
    """A file without splits is used as a whole; one with splits is filtered."""

    def test_no_split(self, tmp_path, capsys):
        path = tmp_path / "mine.jsonl"
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        for split in ("test", "train", "all"):
            assert [p.text for p in load_prompts_option(str(path), split)] == ["a", "b"]
        assert capsys.readouterr().err.count("has no splits") == 2
        with pytest.raises(PromptError, match="got 'dev'"):
            load_prompts_option(str(path), "dev")

    def test_a_split(self, tmp_path, capsys):
        path = tmp_path / "mine.jsonl"
        path.write_text('{"text": "a"}\n{"text": "b", "split": "test"}\n')
        assert [p.text for p in load_prompts_option(str(path), "test")] == ["b"]
        assert [p.text for p in load_prompts_option(str(path), "all")] == ["a", "b"]
        with pytest.raises(PromptError, match="none of 2"):
            load_prompts_option(str(path), "train")
        assert not capsys.readouterr().err
