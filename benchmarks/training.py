"""Train a policy from a reward in a folder, with curves and a report.

The folder has `config.json` (all that the policy depends on), `policy/` (for `compare --policy`)
and `events/` for TensorBoard. Expert iteration keeps its iterations in `loop/`.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mbrl_text_env._lazy import MissingExtraError, extras
from mbrl_text_env.agents.learning.training import TuningError
from mbrl_text_env.benchmarks.charts import Series, of_curves
from mbrl_text_env.benchmarks.page import Page, read_json, reading
from mbrl_text_env.benchmarks.statistics import mean_interval
from mbrl_text_env.benchmarks.terminal import numbers, table_of
from mbrl_text_env.files import write_folder
from mbrl_text_env.records import read_records, scores_of
from mbrl_text_env.runs import Each, claimed, identity, in_turn, prompt_digests
from mbrl_text_env.types import Prompt

CHOICES, LOOP = ("ppo", "dqn"), "expert-iteration"
POLICY, LOOP_FOLDER, ABOUT, REPORT = "policy", "loop", "run.json", "report.html"
_CURVE, _LEDGER = "curve.json", "ledger.json"
_WINDOWS, _AUDITS = 16, 8
_STEPS = {LOOP: "iteration", "grpo": "step", "rloo": "step", "dyna": "step"}

Points = Sequence[tuple[float, float]]
HeldOut = Mapping[float, Sequence[float]]
Tell = Callable[[int, str], None]
"""Called with the number of steps so far and a word on the current stage."""

_EVENTS = "events"
# These change how long a loop runs, not what an iteration does.
_ADJUSTABLE = ("iterations", "patience")


@dataclass(frozen=True)
class Training:
    """The parts of a training: algorithm, its settings, models and prompts.

    `held_out` prompts are for evaluation in PPO, DQN and expert iteration. `each` runs the prompts
    of expert iteration, for example on `RayWorkers`.
    """

    algorithm: str
    settings: Any
    language_model: Any
    reward_model: Any
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    folder: Path
    each: Each = in_turn

    @property
    def policy(self) -> Path:
        """The folder of the policy."""
        return self.folder / POLICY

    @property
    def steps(self) -> int:
        """Environment steps, optimizer steps or iterations."""
        names = ("total_steps", "steps", "iterations")
        return next(getattr(self.settings, n) for n in names if hasattr(self.settings, n))

    def run(self, tell: Tell, *, wandb: bool = False) -> None:
        """Train to the end, or resume; a finished training is unchanged.

        Raises:
            TuningError: The folder holds another training; or see `train_ppo` and `train_grpo`.
            LoopError: See `ExpertIteration.run`.
            MissingExtraError: A package is not installed.
        """
        with claimed(self.folder, self._record(), "training", TuningError):
            # A loop can be resumed with more iterations.
            if self.algorithm != LOOP and self.policy.exists():
                return
            with closing(Curves(self, with_wandb=wandb)) as curves:
                if self.algorithm in CHOICES:
                    _train_choice(self, curves, tell)
                elif self.algorithm == LOOP:
                    _train_loop(self, curves, tell)
                else:
                    _train_gradient(self, curves, tell)

    def _record(self) -> dict[str, Any]:
        kept = asdict(self.settings)
        if self.algorithm == LOOP:
            kept = {name: value for name, value in kept.items() if name not in _ADJUSTABLE}
        return {
            "algorithm": self.algorithm,
            "settings": identity(kept),
            "language_model": identity(self.language_model),
            "reward": identity(self.reward_model),
            "prompts": prompt_digests(self.prompts),
            "held_out": prompt_digests(self.held_out),
        }


class Curves:
    """Log episode reward and length by step to event files, and to Weights & Biases if asked for.

    A resumed training repeats some steps; from its first step on, it replaces earlier events.
    """

    def __init__(self, training: Training, *, with_wandb: bool) -> None:
        with extras():
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, str(training.folder / _EVENTS)
        self._wandb = _wandb_run(training) if with_wandb else None
        self._writer: Any = None

    def add(self, step: int, reward: float, length: float, **more: float | None) -> None:
        """Log a step; reward and length have the names that stable-baselines3 uses."""
        values = {"rollout/ep_rew_mean": reward, "rollout/ep_len_mean": length}
        values |= {f"train/{name}": value for name, value in more.items() if value is not None}
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # A resumed training would not repeat events that a kill lost.
        self._writer.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(training: Training) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--wandb: expected the package 'wandb' to be installed. Install it with `pip install "
            "wandb`.",
            name="wandb",
        ) from error
    name = training.folder.resolve().name
    settings = {"algorithm": training.algorithm, **asdict(training.settings)}
    return wandb.init(project="mbrl-text-env", name=name, dir=training.folder, config=settings)


def _train_choice(training: Training, curves: Curves, tell: Tell) -> None:
    from mbrl_text_env.agents import model_free

    with extras():
        from stable_baselines3.common.callbacks import BaseCallback

    class Episodes(BaseCallback):
        """Log means over the episodes that end in a step; lengths are in chunks."""

        def _on_training_start(self) -> None:
            env: Any = self.training_env
            self.lengths = [len(s.text_state.chunk_ends) for s in env.env.get_states()]

        def _on_step(self) -> bool:
            ended = []
            for place, info in enumerate(self.locals["infos"]):
                self.lengths[place] += 1
                if "terminal_observation" in info:
                    ended.append((float(info["score"]), self.lengths[place]))
                    self.lengths[place] = 0
            if ended:
                reward, length = (sum(column) / len(ended) for column in zip(*ended, strict=True))
                curves.add(self.num_timesteps, reward, length)
            tell(self.num_timesteps, training.algorithm)
            return True

    train = {"ppo": model_free.train_ppo, "dqn": model_free.train_dqn}[training.algorithm]
    models = training.language_model, training.reward_model
    given = (*models, training.prompts, training.policy, training.settings)
    train(*given, validation=training.held_out, callbacks=[Episodes()])


def _train_gradient(training: Training, curves: Curves, tell: Tell) -> None:
    from mbrl_text_env.agents import model_free

    def on_step(step: Any) -> None:
        more = {"flat_share": step.flat_share, "kl": step.kl}
        curves.add(step.step, step.reward, step.mean_tokens, **more)
        tell(step.step, training.algorithm)

    algorithms = {"grpo": model_free.train_grpo, "rloo": model_free.train_rloo}
    train = {**algorithms, "dyna": model_free.train_dyna}[training.algorithm]
    models = training.language_model, training.reward_model
    given = (*models, training.prompts, training.policy, training.settings)
    train(*given, on_step=on_step)


def _train_loop(training: Training, curves: Curves, tell: Tell) -> None:
    from mbrl_text_env.agents.learning import ExpertIteration

    models = training.language_model, training.reward_model
    folder = training.folder / LOOP_FOLDER
    noted = 0

    def on_stage(iteration: int, stage: str) -> None:
        """Log the iterations that finished since the last call, from the loop's files."""
        nonlocal noted
        for done in range(noted, iteration):
            path = folder / f"{done:02d}" / "scores.json"
            found = json.loads(path.read_text(encoding="utf-8"))["validation"]
            curves.add(done, found["mean"], found["tokens"])
        noted = max(noted, iteration)
        tell(min(iteration, training.steps), stage)

    given = (*models, training.prompts, training.held_out, folder, training.settings)
    loop = ExpertIteration(*given, on_stage=on_stage, each=training.each)
    result = loop.run()
    on_stage(len(result.iterations), "ended")
    if result.best:
        with write_folder(training.policy) as scratch:
            best = folder / f"{result.best:02d}" / POLICY
            shutil.copytree(best, scratch, dirs_exist_ok=True)


def is_training(folder: Path) -> bool:
    """Whether a folder holds a finished training."""
    parts = (folder / POLICY, folder / LOOP_FOLDER)
    return (folder / ABOUT).is_file() and any(part.is_dir() for part in parts)


def use_of(algorithm: str, folder: Path) -> str:
    """The command that compares the policy with best-of-N."""
    agent = "candidates" if algorithm in CHOICES else "best-of-n"
    agents = f"best-of-n,{agent}:policy=trained"
    return f"mbrl-text compare --agents {agents} --policy trained={folder / POLICY}"


def recorded_page(folder: Path) -> Page:
    """Make the page of a finished training.

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
        caption="95% bootstrap intervals: over the episodes since the previous row, "
        "and over the held-out prompts.",
    )
    names = ("algorithm", "reward", "language_model", "settings")
    has_policy = (folder / POLICY).is_dir()
    use = {"use the policy with": use_of(algorithm, folder)} if has_policy else {}
    return Page(
        f"{algorithm}: {reward}",
        _verdict(reward, series, label),
        [] if has_policy else ["No iteration beats the base model, so there is no policy."],
        [of_curves("Reward during training", label, f"mean {reward}", series)],
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
    """The mean reward of episodes, in windows of equal size."""
    if not points:
        return []
    parts = np.array_split(np.asarray(points, dtype=float), min(_WINDOWS, len(points)))
    # Windows that end in the same step are merged.
    by_step: dict[float, list[float]] = defaultdict(list)
    for part in parts:
        by_step[float(part[-1, 0])] += part[:, 1].tolist()
    return [Series("episodes", list(by_step), [mean_interval(own) for own in by_step.values()])]


def _cost(folder: Path) -> list[Table]:
    """The cost of training, if it is recorded in one file."""
    path = folder / POLICY / _LEDGER
    if not path.is_file():
        return []
    rows = (
        (name.replace("_", " "), f"{amount:,.4g}")
        for name, amount in read_json(path).items()
        if isinstance(amount, int | float) and amount
    )
    return [table_of(rows, "training cost", *numbers("amount"))]


def _audit(folder: Path) -> Table:
    """The predictions of a learned head for random responses, against the reward."""
    from mbrl_text_env.agents.model_free.trl import labels_of
    from mbrl_text_env.rewards.learning.surrogate import audits, read_batches

    shown = Table(
        *numbers("step", "reward calls", "error of the head", "95% band", "head minus reward"),
        title="The learned head against the reward",
        caption="On random responses, before the head was fitted on them: root mean square error "
        "since the previous row, the band that holds 95% of rows if nothing shifts, and the "
        "mean difference with its 95% interval. A positive difference that grows indicates that "
        "the policy exploits the head.",
    )
    for found in audits([*read_batches(labels_of(folder / POLICY)).values()], _AUDITS):
        gap = f"{mean_interval(found.errors):.3f}" if len(found.errors) else "-"
        shown.add_row(
            *(f"{found.batches}", f"{found.calls}", f"{found.error:.3f}", f"{found.band:.3f}", gap)
        )
    return shown


def _curve(folder: Path) -> tuple[Points, HeldOut]:
    """Rewards by step, and the scores of the held-out prompts by step."""
    if (folder / LOOP_FOLDER).is_dir():
        return [], _loop_curve(folder / LOOP_FOLDER)
    found = read_json(folder / POLICY / _CURVE)
    if isinstance(found, list):
        return [(row["step"], row["reward"]) for row in found], {}
    held_out = {row["steps"]: list(row["scores"]) for row in found["validation"]}
    return [(step, score) for step, score in found["episodes"]], held_out


def _loop_curve(loop: Path) -> dict[float, list[float]]:
    """The mean score of each held-out prompt by iteration."""
    found = {}
    for folder in sorted(loop.glob("[0-9][0-9]")):
        by_prompt, records = defaultdict(list), read_records(folder / "validation")
        for record, score in zip(records, scores_of(records), strict=True):
            by_prompt[record.prompt_id].append(score)
        found[float(int(folder.name))] = [float(np.mean(own)) for own in by_prompt.values()]
    return found
