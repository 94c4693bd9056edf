"""The command `mbrl-text reward fit`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks.options import SeedOption, console, friendly

_METHODS = ("head", "lora")
_FEATURES = ("embedding", "hidden")


@friendly
def fit_command(
    out: Annotated[Path, typer.Option(help="Folder for the reward.")],
    pairs: Annotated[
        str | None,
        typer.Option(help="Preferences: a .jsonl file, or a dataset of the Hugging Face Hub."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Records folder, as written by `collect`; its scores are the gold."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(help="'bradley-terry' (on pairs), or 'regression' (on records' scores)."),
    ] = "bradley-terry",
    method: Annotated[
        str,
        typer.Option(help="'head' (on a frozen model, seconds) or 'lora' (tunes a classifier)."),
    ] = "head",
    head: Annotated[str, typer.Option(help="'linear' or 'mlp'.")] = "linear",
    features: Annotated[
        str,
        typer.Option(help="'embedding' (sentence encoder) or 'hidden' (language model's state)."),
    ] = "embedding",
    model: Annotated[
        str,
        typer.Option(
            help="What reads texts, or is tuned: 'embedded' (MiniLM, or SmolLM2), a Hub name, or "
            "a folder."
        ),
    ] = "embedded",
    text_statistics: Annotated[
        bool, typer.Option(help="Whether counts of the texts are features too.")
    ] = True,
    split: Annotated[str, typer.Option(help="Split of a dataset of the Hub.")] = "train",
    pairs_per_prompt: Annotated[
        int, typer.Option(min=1, help="Pairs that are made of a prompt's records.")
    ] = 12,
    min_gap: Annotated[
        float, typer.Option(min=0.0, help="Pairs of records differ in score by more than this.")
    ] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share of the prompts to measure on.")] = 0.2,
    seed: SeedOption = 0,
    name: Annotated[str | None, typer.Option(help="What reports call the reward.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA: rank of the adapters.")] = 8,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="LoRA: steps; by default one pass over the pairs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="LoRA: pairs in a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="LoRA: highest learning rate.")] = 1e-4,
    max_length: Annotated[int, typer.Option(min=1, help="LoRA: most tokens of a text.")] = 512,
) -> None:
    """Fit a reward on preferences or scores, and measure it on prompts that were left out."""
    from mbrl_text_env.rewards.learning.fitting import fit_reward
    from mbrl_text_env.rewards.learning.learned import FOLDER, RewardFitError

    for option, value, allowed in (("method", method, _METHODS), ("features", features, _FEATURES)):
        if value not in allowed:
            raise RewardFitError(f"--{option}: expected one of {list(allowed)}, got {value!r}.")
    if method == "lora" and objective != "bradley-terry":
        raise RewardFitError(
            f"--method lora fits 'bradley-terry', got --objective {objective!r}. Use --method head."
        )
    FOLDER.check_target(out)
    data, data_name = _data(pairs, records, objective, split, pairs_per_prompt, min_gap, seed)
    with console.status(f"Fitting on {len(data)} {'records' if _scored(objective) else 'pairs'}"):
        if method == "lora":
            from mbrl_text_env.rewards.learning.reward_trainer import LoraSettings, fit_lora

            settings = LoraSettings(
                base=model,
                r=rank,
                alpha=2.0 * rank,
                max_steps=max_steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_length=max_length,
                seed=seed,
            )
            reward = fit_lora(
                data, out, settings, held_out=held_out, name=name, data_name=data_name
            )
        else:
            reward = fit_reward(
                data,
                objective=objective,  # type: ignore[arg-type]
                head=head,  # type: ignore[arg-type]
                features=_features(features, model, text_statistics),
                held_out=held_out,
                seed=seed,
                name=name,
                data_name=data_name,
            )
            reward.save(out)
    for table in report_tables(reward.name, reward.report_):
        console.print(table)
    console.print(f"Use it with `mbrl-text compare --reward learned:{out}`.", markup=False)


def report_tables(name: str, report: Any) -> list[Any]:
    """The report as tables of rich: the figures and, for pairs, the calibration curve."""
    from rich.table import Table

    held_out = report.held_out
    is_regression = report.objective == "regression"
    rows = {
        "fitted": f"{report.model}, {report.objective}, on {report.data}",
        "fitted on": f"{report.num_fitted} {'records' if is_regression else 'pairs'} of "
        f"{report.num_fitted_prompts} prompts",
        "chosen": ", ".join(f"{key}={_shown(value)}" for key, value in report.chosen.items()),
        "pair accuracy there": _shown(report.fitted_accuracy),
        "measured on": f"{held_out.num_pairs} pairs of {held_out.num_prompts} other prompts",
        "pair accuracy": _shown(held_out.accuracy),
        "if the longer response wins": _shown(held_out.longer_wins),
        "by chance": _shown(held_out.chance),
    }
    if is_regression:
        rows |= {
            "R2": _shown(held_out.r2),
            "correlation": _shown(held_out.correlation),
            "correlation within a prompt": _shown(held_out.within_prompt),
        }
    else:
        rows |= {
            "log-loss (chance 0.693)": _shown(held_out.log_loss),
            "expected calibration error": _shown(held_out.ece),
        }
    figures = Table("", "", title=f"Reward {name!r}", show_header=False)
    for label, value in rows.items():
        figures.add_row(label, value)
    if is_regression:
        return [figures]
    curve = Table("confidence", "pairs", "predicted", "right", title="Calibration")
    for entry in held_out.calibration:
        curve.add_row(
            f"{entry.low:.1f} to {entry.high:.1f}",
            str(entry.count),
            _shown(entry.predicted),
            _shown(entry.observed),
        )
    return [figures, curve]


def _data(
    pairs: str | None,
    records: Path | None,
    objective: str,
    split: str,
    pairs_per_prompt: int,
    min_gap: float,
    seed: int,
) -> tuple[Any, str]:
    """What to fit on, and where it comes from."""
    from mbrl_text_env.records import read_records
    from mbrl_text_env.rewards.learning.learned import RewardFitError
    from mbrl_text_env.rewards.learning.preferences import load_preferences, pairs_from_records

    if (pairs is None) == (records is None):
        raise RewardFitError(
            "Expected either --pairs (a .jsonl file or a dataset) or --records (a folder), got "
            f"{'neither' if pairs is None else 'both'}."
        )
    if pairs is not None:
        if _scored(objective):
            raise RewardFitError(
                "--objective regression needs scores: pass --records instead of --pairs."
            )
        return load_preferences(pairs, split=split), Path(pairs).stem
    assert records is not None
    found = read_records(records)
    if _scored(objective):
        return found, found[0].reward_name
    made = pairs_from_records(found, pairs_per_prompt=pairs_per_prompt, min_gap=min_gap, seed=seed)
    return made, found[0].reward_name


def _features(kind: str, model: str, text_statistics: bool) -> Any:
    from mbrl_text_env.rewards.learning.features import EMBEDDED, EmbeddingFeatures, HiddenFeatures

    source = None if model == EMBEDDED else model
    if kind == "hidden":
        return HiddenFeatures(source, text_statistics)
    return EmbeddingFeatures(source, text_statistics)


def _scored(objective: str) -> bool:
    return objective == "regression"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)
