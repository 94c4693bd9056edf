"""The command `mbrl-text reward fit`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mbrl_text_env.benchmarks.friendly import friendly
from mbrl_text_env.benchmarks.options import SeedOption
from mbrl_text_env.benchmarks.terminal import console


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a reward is fitted on."""

    pairs: Annotated[
        str | None,
        typer.Option(help="Preferences: a .jsonl file, or a dataset of the Hugging Face Hub."),
    ] = None
    records: Annotated[
        Path | None,
        typer.Option(help="Records folder, as written by `collect`; its scores are the gold."),
    ] = None
    objective: Annotated[
        str, typer.Option(help="'bradley-terry' (on pairs), or 'regression' (on records' scores).")
    ] = "bradley-terry"
    split: Annotated[str, typer.Option(help="Split of a dataset of the Hub.")] = "train"
    pairs_per_prompt: Annotated[
        int, typer.Option(min=1, help="Pairs that are made of a prompt's records.")
    ] = 12
    min_gap: Annotated[
        float, typer.Option(min=0.0, help="Pairs of records differ in score by more than this.")
    ] = 0.0

    def load(self, seed: int) -> tuple[Any, str]:
        """What to fit on, and where it comes from."""
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
    out: Annotated[Path, typer.Option(help="Folder for the reward.")],
    data: DataOptions,
    features: Annotated[
        str,
        typer.Option(help="'embedding' (sentence encoder) or 'hidden' (language model's state)."),
    ] = "embedding",
    model: Annotated[
        str,
        typer.Option(
            help="What reads texts: 'embedded' (MiniLM, or SmolLM2), a Hub name, or a folder."
        ),
    ] = "embedded",
    text_statistics: Annotated[
        bool, typer.Option(help="Whether counts of the texts are features too.")
    ] = True,
    held_out: Annotated[float, typer.Option(help="Share of the prompts to measure on.")] = 0.2,
    seed: SeedOption = 0,
    name: Annotated[str | None, typer.Option(help="What reports call the reward.")] = None,
) -> None:
    """Fit a reward on preferences or scores, and measure it on prompts that were left out."""
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
    """The report as tables: the figures and, for pairs, the calibration curve."""
    held_out = report.held_out
    is_regression = report.objective == "regression"
    rows: dict[str, Any] = {
        "fitted": f"{report.model}, {report.objective}, on {report.data}",
        "fitted on": f"{report.num_fitted} {'records' if is_regression else 'pairs'} of "
        f"{report.num_fitted_prompts} prompts",
        "chosen": ", ".join(f"{key}={_shown(value)}" for key, value in report.chosen.items()),
        "pair accuracy there": report.fitted_accuracy,
        "measured on": f"{held_out.num_pairs} pairs of {held_out.num_prompts} other prompts",
        "pair accuracy": held_out.accuracy,
        "if the longer response wins": held_out.longer_wins,
        "by chance": held_out.chance,
    }
    if is_regression:
        rows |= {
            "R2": held_out.r2,
            "correlation": held_out.correlation,
            "correlation within a prompt": held_out.within_prompt,
        }
    else:
        rows |= {
            "log-loss (chance 0.693)": held_out.log_loss,
            "expected calibration error": held_out.ece,
        }
    figures = Table("", "", title=f"Reward {name!r}", show_header=False)
    for label, value in rows.items():
        figures.add_row(label, _shown(value))
    if is_regression:
        return [figures]
    curve = Table("confidence", "pairs", "predicted", "right", title="Calibration")
    for entry in held_out.calibration:
        ends = f"{entry.low:.1f} to {entry.high:.1f}"
        shares = (_shown(entry.predicted), _shown(entry.observed))
        curve.add_row(ends, str(entry.count), *shares)
    return [figures, curve]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)
