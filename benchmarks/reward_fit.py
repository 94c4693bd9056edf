"""The command `mbrl-text reward fit`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.options import SEED
from mbrl_text_env.benchmarks.terminal import console, table_of


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of the data to fit a reward on."""

    pairs: str | None = option(
        None, "Preferences: a .jsonl file, or a dataset on the Hugging Face Hub."
    )
    records: Path | None = option(
        None, "Records folder, as written by `collect`; its scores are the labels."
    )
    objective: str = option(
        "bradley-terry", "'bradley-terry' (pairs), or 'regression' (scores of records)."
    )
    split: str = option("train", "Split of a dataset on the Hub.")
    pairs_per_prompt: int = option(12, "Pairs to make per prompt from records.", min=1)
    min_gap: float = option(0.0, "Score gap that a pair of records must exceed.", min=0.0)

    def load(self, seed: int) -> tuple[Any, str]:
        """Load the data to fit on, and its name."""
        from mbrl_text_env.records import read_records
        from mbrl_text_env.rewards import RewardFitError, load_preferences, pairs_from_records

        if (self.pairs is None) == (self.records is None):
            raise RewardFitError(
                "Expected either --pairs (a .jsonl file or a dataset) or --records (a folder), got "
                f"{'neither' if self.pairs is None else 'both'}."
            )
        is_scored = self.objective == "regression"
        if self.pairs is not None:
            if is_scored:
                raise RewardFitError(
                    "--objective regression needs scores: pass --records instead of --pairs."
                )
            return load_preferences(self.pairs, split=self.split), Path(self.pairs).stem
        assert self.records is not None
        found = read_records(self.records)
        name = found[0].reward_name
        if is_scored:
            return found, name
        count, gap = self.pairs_per_prompt, self.min_gap
        return pairs_from_records(found, pairs_per_prompt=count, min_gap=gap, seed=seed), name


@friendly
def fit_command(
    *,
    out: Path = option(..., "Output folder of the reward."),
    data: DataOptions,
    features: str = option(
        "embedding", "'embedding' (sentence encoder) or 'hidden' (language model states)."
    ),
    model: str = option(
        "embedded", "Feature model: 'embedded' (MiniLM or SmolLM2), a Hub name, or a folder."
    ),
    text_statistics: bool = option(True, "Use text statistics as features, too."),
    held_out: float = option(0.2, "Fraction of the prompts to evaluate on."),
    seed: int = option(0, SEED),
    name: str | None = option(None, "Name of the reward in reports."),
) -> None:
    """Fit a reward to preferences or scores, and evaluate it on held-out prompts."""
    from mbrl_text_env import rewards
    from mbrl_text_env.rewards.learning.learned import FOLDER

    kinds = {"embedding": rewards.EmbeddingFeatures, "hidden": rewards.HiddenFeatures}
    if features not in kinds:
        raise typer.BadParameter(f"--features: expected one of {list(kinds)}, got {features!r}.")
    FOLDER.check_target(out)
    rows, data_name = data.load(seed)
    with console.status(f"Fitting on {len(rows)} rows"):
        reward = rewards.fit_reward(
            rows,
            objective=data.objective,
            features=kinds[features](None if model == "embedded" else model, text_statistics),
            held_out=held_out,
            seed=seed,
            name=name,
            data_name=data_name,
        )
    reward.save(out)
    for table in report_tables(reward.name, reward.report_):
        console.print(table)
    console.print(f"Use it with `mbrl-text compare --reward learned:{out}`.", markup=False)


def report_tables(name: str, report: Any) -> list[Table]:
    """Format the report as tables: figures and, for pairs, calibration."""
    held_out, is_regression = report.held_out, report.objective == "regression"
    own = (
        {
            "R2": held_out.r2,
            "correlation": held_out.correlation,
            "correlation within a prompt": held_out.within_prompt,
        }
        if is_regression
        else {
            "log-loss (chance 0.693)": held_out.log_loss,
            "expected calibration error": held_out.ece,
        }
    )
    rows: dict[str, Any] = {
        "fitted": f"{report.model}, {report.objective}, on {report.data}",
        "fitted on": f"{report.num_fitted} {'records' if is_regression else 'pairs'} of "
        f"{report.num_fitted_prompts} prompts",
        "chosen": ", ".join(f"{key}={_shown(value)}" for key, value in report.chosen.items()),
        "pair accuracy, fitted": report.fitted_accuracy,
        "evaluated on": f"{held_out.num_pairs} pairs of {held_out.num_prompts} other prompts",
        "pair accuracy": held_out.accuracy,
        "accuracy of preferring the longer": held_out.longer_wins,
        "accuracy by chance": held_out.chance,
        **own,
    }
    shown = ((label, _shown(value)) for label, value in rows.items())
    figures = table_of(shown, "", "", title=f"Reward {name!r}", show_header=False)
    if is_regression:
        return [figures]
    curve = (
        (
            f"{share.low:.1f} to {share.high:.1f}",
            *map(_shown, (share.count, share.predicted, share.observed)),
        )
        for share in held_out.calibration
    )
    names = ("confidence", "pairs", "predicted", "correct")
    return [figures, table_of(curve, *names, title="Calibration")]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)
