"""Expert iteration: a policy answers with an agent's help, and learns its best answers.

Each iteration collects scored answers to train prompts, filters them, tunes the policy on what is
left, measures plain sampling on validation prompts, and fits a new value model. Iteration 0 only
measures the base model and fits its value. Whatever is made is kept; docs/self-training.md shows
the folder.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning.answers import Hint, collect_answers
from mbrl_text_env.agents.learning.filters import select
from mbrl_text_env.agents.learning.fine_tuning import Improver, LoraImprover
from mbrl_text_env.agents.learning.loop_values import LoopValues, ValueBefore, ValueFactory
from mbrl_text_env.agents.learning.notes import from_json, to_json, write_json
from mbrl_text_env.agents.learning.presets import LoopSettings, answer_hint, planned
from mbrl_text_env.agents.learning.reports import (
    Collected,
    Divergence,
    IterationReport,
    LoopResult,
    Selected,
    Validation,
    ValueReport,
    check_gold,
    divergence,
    doubts_about,
    fallen,
    without_signal,
)
from mbrl_text_env.agents.learning.stages import (
    STAGES,
    LoopError,
    NoSignalError,
    Stage,
    check_prompts,
    told_where,
)
from mbrl_text_env.agents.learning.training import prompts_digest
from mbrl_text_env.agents.registry import make
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.agents.values import FittedValue
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import (
    LanguageModel,
    SamplingParams,
    clear_cache,
    spawn_seed,
)
from mbrl_text_env.records import Record, RecordWriter, read_records
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel
from mbrl_text_env.runs import claimed, identity
from mbrl_text_env.types import Ledger, Prompt, initial
from mbrl_text_env.values import ValueModel

AgentFactory = Callable[[LanguageModel, RewardModel, ValueModel | None], Agent]
"""Makes the agent that answers from a policy, the reward and the policy's value model."""

_FEW_PROMPTS = 500
# What may differ when a loop goes on: it decides how far the loop goes, not what an iteration does.
_ADJUSTABLE = ("iterations", "patience")


@dataclass(eq=False, repr=False)
class ExpertIteration:
    """The loop of collecting, filtering, tuning and refitting, kept in a folder.

    A call of `run` that was stopped, or killed at any moment, goes on from the last whole stage
    when it is made again, to the same result.

    Sources: Anthony et al., "Thinking Fast and Slow with Deep Learning and Tree Search", NeurIPS
    2017; for the variants see `mbrl_text_env.agents.learning.presets`.

    Args:
        language_model: The base model.
        reward_model: Scores the answers.
        train: Prompts to answer; below 500 there is a warning, as the article advises.
        validation: Prompts to measure on, of other ids.
        folder: Where everything is kept.
        settings: What an iteration does; see `star`, `rest_em`, `rejection_sampling`, `planned`.
        improver: How a policy learns.
        gold_model: A trusted reward that nothing is selected by.
        agent_factory: Makes the agent that answers, instead of the settings' spec.
        value_factory: Makes a value model to fit, of a class that `load_value` reads, instead of
            the settings' kind.
        value_model: A value that was fitted for the base model already; None fits one.
        encoder: Of value models that embed texts; None for MiniLM.
        hint: How prompts are hinted, where the settings say so.
        on_stage: Called with iteration and name of each stage that begins.

    Raises:
        LoopError: There are no prompts, or train and validation share some, or the reward applies
            to too few of them.

    Example:
        >>> loop = ExpertIteration(
        ...     lm, SentimentReward(), load_prompts(split="train"),
        ...     load_prompts(split="validation"), "loop", planned(iterations=2),
        ... )  # doctest: +SKIP
        >>> result = loop.run()  # doctest: +SKIP
        >>> [report.validation.mean for report in result.iterations]  # doctest: +SKIP
        [0.34, 0.52, 0.61]
        >>> policy, value = loop.policy(result.best), loop.value(result.best)  # doctest: +SKIP
    """

    language_model: LanguageModel
    reward_model: RewardLike
    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    folder: str | Path
    settings: LoopSettings = dataclasses.field(default_factory=planned)
    _: KW_ONLY
    improver: Improver = dataclasses.field(default_factory=LoraImprover)
    gold_model: RewardLike | None = None
    agent_factory: AgentFactory | None = None
    value_factory: ValueFactory | None = None
    value_model: FittedValue | None = None
    encoder: Encoder | None = None
    hint: Hint = answer_hint
    on_stage: Callable[[int, str], None] | None = None

    def __post_init__(self) -> None:
        # None stands for the default here too.
        self.settings = self.settings or planned()
        self.improver = self.improver or LoraImprover()
        self.reward_model = self._reward = as_reward_model(self.reward_model)
        check_prompts(self.train, self.validation, self._reward)
        self._gold = None if self.gold_model is None else as_reward_model(self.gold_model)
        self._values = LoopValues(
            self.settings, self._reward, self.encoder, self.value_factory, self.value_model
        )
        self._serving: tuple[int, LanguageModel] = (0, self.language_model)

    def run(self) -> LoopResult:
        """Run, or go on, to the last iteration.

        Raises:
            LoopError: The folder is of another loop, or damaged, or cannot be written.
            NoSignalError: All answers of the first iteration have one score.
            FilterError: The filter leaves fewer than two answers.
            ValueModelError: `stale_value="error"`, and a policy would be searched with the value
                of another one.
            KeyboardInterrupt: It was stopped; the same call goes on.
        """
        with (
            told_where(self.folder, "the start"),
            claimed(self.folder, self._described(), "loop", LoopError),
        ):
            if len(self.train) < _FEW_PROMPTS:
                warnings.warn(
                    f"{len(self.train)} train prompts: with fewer than {_FEW_PROMPTS} a policy "
                    "may learn these prompts by heart rather than what is asked of it. Watch the "
                    "validation prompts, or add prompts.",
                    stacklevel=2,
                )
            reports = [self._first()]
            stopped = None
            for iteration in range(1, self.settings.iterations + 1):
                report, stopped = self._iterate(iteration, reports)
                if report is not None:
                    reports.append(report)
                if stopped is not None:
                    break
        best = max(reports, key=lambda report: report.validation.mean)
        return LoopResult(tuple(reports), best.iteration, stopped)

    def policy(self, iteration: int) -> LanguageModel:
        """The policy at the end of an iteration; the base model for 0.

        Raises:
            LoopError: The iteration has none yet.
        """
        if iteration != self._serving[0]:
            served = self.language_model
            if iteration:
                stage = self._stage(iteration, "policy")
                if not stage.is_done:
                    raise LoopError(f"{stage.folder}: iteration {iteration} has no policy yet.")
                served = self.improver.serve(self.language_model, stage.folder)
            self._serving = iteration, served
        return self._serving[1]

    def value(self, iteration: int) -> ValueModel | None:
        """The value model for the policy of an iteration; None where there is none.

        Raises:
            ValueModelError: It was fitted for another policy (`stale_value="error"`).
        """
        if not self._values.is_wanted:
            return None
        policy = self.policy(iteration)
        fitted_at = self._value_report(iteration).fitted_at
        if self.settings.stale_value != "error":
            # One that was taken over was written again for this policy.
            fitted_at = iteration
        return self._values.load(self._stage(fitted_at, "value").folder, policy)

    def records(self, iteration: int, stage: str) -> list[Record]:
        """The records of a stage: `"collected"`, `"selected"`, `"validation"` or `"value"`."""
        folder = self._stage(iteration, stage).folder
        return read_records(folder / "records" if stage == "value" else folder)

    # The stages.

    def _first(self) -> IterationReport:
        self._do(0, "validation", self._validate)
        if self._values.is_wanted:
            self._do(0, "value", self._fit_value)
        return self._report(0, [])

    def _iterate(
        self, iteration: int, reports: Sequence[IterationReport]
    ) -> tuple[IterationReport | None, str | None]:
        """Its report, and why the loop stops with it; no report where nothing was learned."""
        self._do(iteration, "collected", self._collect)
        lacking = without_signal(
            self.records(iteration, "collected"),
            self.records(iteration - 1, "validation"),
            is_plain=self._stage(iteration, "collected").read()["is_plain"],
        )
        if lacking is not None:
            told = f"Iteration {iteration}: {lacking}"
            if iteration == 1:
                raise NoSignalError(told)
            warnings.warn(told, stacklevel=3)
            return None, told
        self._do(iteration, "selected", self._select)
        self._do(iteration, "policy", self._improve)
        self._do(iteration, "validation", self._validate)
        found = self._stage(iteration, "validation").read()["report"]["mean"]
        means = [*(report.validation.mean for report in reports), found]
        stopped = fallen(means, self.settings.patience)
        if self._values.is_wanted and stopped is None:
            self._do(iteration, "value", self._fit_value)
        return self._report(iteration, reports), stopped

    def _collect(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        before, settings = stage.iteration - 1, self.settings
        agent = self._agent(self.policy(before), self.value(before))
        with RecordWriter(stage.folder) as writer:
            failed = collect_answers(
                agent,
                self.train,
                writer,
                answers=settings.answers_per_prompt,
                budget=settings.budget,
                batch_prompts=settings.batch_prompts,
                seed=seed,
                hint=self.hint if settings.hints else None,
                ledger=ledger,
            )
        records = read_records(stage.folder)
        scores = [record.score for record in records]
        report = Collected.of(records, num_failed=len(failed), std=float(np.std(scores)))
        return {"report": to_json(report), "is_plain": isinstance(agent, Sampling)}

    def _select(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        kept = select(self.records(stage.iteration, "collected"), self.settings.filter)
        with RecordWriter(stage.folder) as writer:
            writer.extend(kept)
        lowest = min(record.score for record in kept)
        return {"report": to_json(Selected.of(kept, lowest=lowest))}

    def _improve(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        before = self._stage(stage.iteration - 1, "policy").folder
        goes_on = self.settings.start_from == "checkpoint" and stage.iteration > 1
        found = self.improver.improve(
            self.language_model,
            self.records(stage.iteration, "selected"),
            stage.folder,
            start_from=before if goes_on else None,
            seed=seed,
        )
        ledger.charge(found.usage)
        details = json.loads(json.dumps(dict(found.details)))
        return {"report": {"num_examples": found.num_examples, **details}}

    def _validate(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        policy, samples = self.policy(stage.iteration), self.settings.validation_samples
        records = self._sampled(stage.folder, policy, self.validation, samples, seed, ledger)
        moved = self._divergence(policy, spawn_seed(seed, 1), ledger)
        gold = None if self._gold is None else check_gold(self._gold, records, ledger=ledger)
        report = Validation.of(records, moved, gold)
        return {"report": to_json(report), "policy": policy.name}

    def _divergence(self, policy: LanguageModel, seed: int, ledger: Ledger) -> Divergence | None:
        """From responses of their own, which are drawn at temperature 1."""
        count = self.settings.divergence_samples
        if not count or policy is self.language_model:
            return None
        agent = self._sampling(policy, SamplingParams())
        states = []
        for start in range(0, len(self.validation), self.settings.batch_prompts):
            batch = self.validation[start : start + self.settings.batch_prompts]
            begun = [initial(prompt, policy) for prompt in batch]
            rows = run([partial(agent.complete, state, count, ledger, seed) for state in begun])
            states += [completion.state for row in rows for completion in row]
        return divergence(policy, self.language_model, states, ledger=ledger)

    def _fit_value(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        last = stage.iteration - 1
        before = None
        if last >= 0:
            folder = self._stage(last, "value").folder
            before = ValueBefore(folder, self.policy(last), self._value_report(last))
        found = self._values.renew(
            stage.folder,
            self.policy(stage.iteration),
            self.records(stage.iteration, "validation"),
            lambda folder, policy: self._sampled(
                folder, policy, self.train, self.settings.value_samples, seed, ledger
            ),
            ledger,
            iteration=stage.iteration,
            before=before,
        )
        return {"report": to_json(found)}

    # What the stages share.

    def _do(
        self, iteration: int, name: str, make: Callable[[Stage, Ledger, int], dict[str, Any]]
    ) -> None:
        """Make a stage, if it is not there."""
        stage = self._stage(iteration, name)
        if stage.is_done:
            return
        if self.on_stage is not None:
            self.on_stage(iteration, name)
        with told_where(self.folder, f"iteration {iteration}, stage {name!r}"):
            stage.begin()
            # What one policy left in its cache must not depend on where the loop was stopped.
            for model in (self.language_model, self._serving[1]):
                clear_cache(model)
            ledger, start = Ledger(), time.perf_counter()
            seed = spawn_seed(self.settings.seed, iteration, STAGES.index(name))
            note = make(stage, ledger, seed)
            wall = {"wall_seconds": time.perf_counter() - start}
            stage.end({**note, "usage": {**ledger.usage.as_dict(), **wall}})

    def _stage(self, iteration: int, name: str) -> Stage:
        return Stage(iteration, name, Path(self.folder) / f"{iteration:02d}")

    def _value_report(self, iteration: int) -> ValueReport:
        found: ValueReport = from_json(
            ValueReport, self._stage(iteration, "value").read()["report"]
        )
        return found

    def _agent(self, policy: LanguageModel, value: ValueModel | None) -> Agent:
        if self.agent_factory is not None:
            return self.agent_factory(policy, self._reward, value)
        settings = self.settings
        return make(
            settings.agent,
            policy,
            self._reward,
            value,
            max_response_tokens=settings.max_response_tokens,
            params=settings.params,
        )

    def _sampling(self, policy: LanguageModel, params: SamplingParams) -> Sampling:
        limit = self.settings.max_response_tokens
        return Sampling(policy, self._reward, max_response_tokens=limit, params=params)

    def _sampled(
        self,
        folder: Path,
        policy: LanguageModel,
        prompts: Sequence[Prompt],
        samples: int,
        seed: int,
        ledger: Ledger,
    ) -> list[Record]:
        """Plain samples of a policy, scored and written."""
        with RecordWriter(folder) as writer:
            collect_answers(
                self._sampling(policy, self.settings.params),
                prompts,
                writer,
                answers=samples,
                batch_prompts=self.settings.batch_prompts,
                seed=seed,
                ledger=ledger,
            )
        return read_records(folder)

    def _report(self, iteration: int, before: Sequence[IterationReport]) -> IterationReport:
        """Put an iteration's notes together, and write its scores and its ledger."""
        stages = [self._stage(iteration, name) for name in STAGES]
        notes = {stage.name: stage.read() for stage in stages if stage.is_done}
        parts = {
            "validation": Validation,
            "collected": Collected,
            "selected": Selected,
            "value": ValueReport,
        }
        found: dict[str, Any] = {
            name: from_json(kind, notes[name]["report"]) if name in notes else None
            for name, kind in parts.items()
        }
        last = found["validation"]
        report = IterationReport(
            iteration=iteration,
            policy=notes["validation"]["policy"],
            improvement=notes["policy"]["report"] if "policy" in notes else None,
            usage={name: note["usage"] for name, note in notes.items()},
            warnings=tuple(doubts_about(before[0].validation if before else last, last)),
            **found,
        )
        for doubt in report.warnings:
            warnings.warn(f"Iteration {iteration}: {doubt}", stacklevel=4)
        write_json(stages[0].root / "scores.json", report.to_dict())
        write_json(stages[0].root / "ledger.json", report.ledger())
        return report

    def _described(self) -> dict[str, Any]:
        """Whatever the results depend on."""
        settings = dataclasses.asdict(self.settings)
        for name in _ADJUSTABLE:
            settings.pop(name)
        names = (
            "language_model",
            "value_model",
            "encoder",
            "agent_factory",
            "value_factory",
            "hint",
        )
        return {
            "settings": identity(settings),
            "reward": identity(self._reward),
            "gold": identity(self._gold),
            "improver": dict(self.improver.described()),
            **{name: identity(getattr(self, name)) for name in names},
            **{name: prompts_digest(getattr(self, name)) for name in ("train", "validation")},
        }
