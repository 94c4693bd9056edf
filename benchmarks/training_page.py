"""The page of a training, from its folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mbrl_text_env.benchmarks.charts import Series, of_curves
from mbrl_text_env.benchmarks.page import Page, read_json, reading
from mbrl_text_env.benchmarks.statistics import mean_interval
from mbrl_text_env.benchmarks.terminal import numbers, table_of
from mbrl_text_env.records import read_records, scores_of

CHOICES, LOOP = ("ppo", "dqn"), "expert-iteration"
POLICY, LOOP_FOLDER, ABOUT, REPORT = "policy", "loop", "run.json", "report.html"
_CURVE, _LEDGER = "curve.json", "ledger.json"
_WINDOWS, _AUDITS = 16, 8
_STEPS = {LOOP: "iteration", "grpo": "step", "rloo": "step", "dyna": "step"}

Points = Sequence[tuple[float, float]]
HeldOut = Mapping[float, Sequence[float]]


def is_training(folder: Path) -> bool:
    """Whether a folder is that of a training that has ended."""
    parts = (folder / POLICY, folder / LOOP_FOLDER)
    return (folder / ABOUT).is_file() and any(part.is_dir() for part in parts)


def use_of(algorithm: str, folder: Path) -> str:
    """The command that compares a policy with best-of-N."""
    agent = "candidates" if algorithm in CHOICES else "best-of-n"
    agents = f"best-of-n,{agent}:policy=trained"
    return f"mbrl-text compare --agents {agents} --policy trained={folder / POLICY}"


def recorded_page(folder: Path) -> Page:
    """The page of a training that has ended.

    Raises:
        CompareError: A file is damaged or missing.
    """
    with reading(folder):
        points, held_out = _curve(folder)
        return _page(folder, read_json(folder / ABOUT), points, held_out)


def _page(folder: Path, about: Mapping[str, Any], points: Points, held_out: HeldOut) -> Page:
    algorithm, reward = about["algorithm"], about["reward"]
    label = _STEPS.get(algorithm, "environment step")
    series = _windows(points)
    if held_out:
        measured = [mean_interval(scores) for scores in held_out.values()]
        series.append(Series("held-out prompts", list(held_out), measured))
    columns = [{x: f"{i:.3f}" for x, i in zip(s.xs, s.intervals, strict=True)} for s in series]
    shown = table_of(
        (
            (f"{x:g}", *(column.get(x, "-") for column in columns))
            for x in sorted({x for column in columns for x in column})
        ),
        *numbers(label, *(one.name for one in series)),
        title=f"Mean {reward}",
        caption="Bootstrap intervals of 95%: of the episodes up to a step since the row before, "
        "and of the held-out prompts.",
    )
    names = ("algorithm", "reward", "language_model", "settings")
    has_policy = (folder / POLICY).is_dir()
    use = {"use the policy with": use_of(algorithm, folder)} if has_policy else {}
    return Page(
        f"{algorithm}: {reward}",
        _verdict(reward, series, label),
        [] if has_policy else ["No iteration is above the base model: there is no policy."],
        [of_curves("Reward as training goes", label, f"mean {reward}", series)],
        [shown, *([_audit(folder)] if algorithm == "dyna" else []), *_cost(folder)],
        {"episodes": points, "held_out": [[x, list(scores)] for x, scores in held_out.items()]},
        {**{name: about[name] for name in names[:3]}, **use, **about["settings"]},
        {name: value for name, value in about.items() if name not in names},
    )


def _verdict(reward: str, series: Sequence[Series], label: str) -> str:
    told = (
        f"{one.name} {one.intervals[0]:.3f} at {label} {one.xs[0]:g}, {one.intervals[-1]:.3f} at "
        f"{one.xs[-1]:g}"
        for one in series
    )
    return f"Mean {reward} (95% intervals): {'; '.join(told)}."


def _windows(points: Points) -> list[Series]:
    """The mean reward of episodes, in windows of equally many of them."""
    if not points:
        return []
    parts = np.array_split(np.asarray(points, dtype=float), min(_WINDOWS, len(points)))
    # Episodes that end in one step stand together.
    by_step: dict[float, list[float]] = defaultdict(list)
    for part in parts:
        by_step[float(part[-1, 0])] += part[:, 1].tolist()
    return [Series("episodes", list(by_step), [mean_interval(own) for own in by_step.values()])]


def _cost(folder: Path) -> list[Table]:
    """What training took, where it is written in one file."""
    path = folder / POLICY / _LEDGER
    if not path.is_file():
        return []
    rows = (
        (name.replace("_", " "), f"{amount:,.4g}")
        for name, amount in read_json(path).items()
        if isinstance(amount, int | float) and amount
    )
    return [table_of(rows, "training took", *numbers("amount"))]


def _audit(folder: Path) -> Table:
    """What a learned head said of responses drawn at random, against the reward."""
    from mbrl_text_env.agents.model_free.dyna import labels_of
    from mbrl_text_env.rewards.learning.surrogate import audits, read_batches

    shown = Table(
        *numbers("step", "reward calls", "error of the head", "its band", "head minus reward"),
        title="The learned head against the reward",
        caption="On responses drawn at random, before the head was fitted on them: root mean "
        "square error since the row before, what it stays below in 95% of rows if nothing shifts, "
        "and the mean difference with its 95% interval. A difference above 0 that grows says that "
        "the policy has learned to please the head alone.",
    )
    for found in audits([*read_batches(labels_of(folder / POLICY)).values()], _AUDITS):
        gap = f"{mean_interval(found.errors):.3f}" if len(found.errors) else "-"
        shown.add_row(
            *(f"{found.batches}", f"{found.calls}", f"{found.error:.3f}", f"{found.band:.3f}", gap)
        )
    return shown


def _curve(folder: Path) -> tuple[Points, HeldOut]:
    """Rewards by step, and those of each held-out prompt by step."""
    if (folder / LOOP_FOLDER).is_dir():
        return [], _loop_curve(folder / LOOP_FOLDER)
    found = read_json(folder / POLICY / _CURVE)
    if isinstance(found, list):
        return [(row["step"], row["reward"]) for row in found], {}
    held_out = {row["steps"]: list(row["scores"]) for row in found["validation"]}
    return [(step, score) for step, score in found["episodes"]], held_out


def _loop_curve(loop: Path) -> dict[float, list[float]]:
    """The mean score of each held-out prompt, by iteration."""
    found = {}
    for folder in sorted(loop.glob("[0-9][0-9]")):
        by_prompt, records = defaultdict(list), read_records(folder / "validation")
        for record, score in zip(records, scores_of(records), strict=True):
            by_prompt[record.prompt_id].append(score)
        found[float(int(folder.name))] = [float(np.mean(own)) for own in by_prompt.values()]
    return found
