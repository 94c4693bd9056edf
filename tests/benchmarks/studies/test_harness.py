"""What the studies share: paired statistics by hand, and what is kept."""

import pytest

from mbrl_text_env.benchmarks.studies.harness import kept, paired


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
