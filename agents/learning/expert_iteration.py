"""Expert iteration: a policy answers with an agent's help, and learns its best answers.

Each iteration collects scored answers to train prompts, filters them, tunes the policy on what is
left, measures plain sampling on validation prompts, and fits the value model anew. Iteration 0 only
measures the base model and fits its value. Whatever is made is kept; see `iteration_folder`.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning.answers import Hint, collect_answers
from mbrl_text_env.agents.learning.filters import select
from mbrl_text_env.agents.learning.improvers import Improver, LoraImprover
from mbrl_text_env.agents.learning.iteration_folder import (
    STAGES,
    LoopError,
    LoopFolder,
    NoSignalError,
    Stage,
    told_where,
    write_json,
)
from mbrl_text_env.agents.learning.iteration_report import (
    Collected,
    IterationReport,
    LoopResult,
    Selected,
    Validation,
    doubts_about,
    fallen,
    read_validation,
    read_value,
    without_signal,
)
from mbrl_text_env.agents.learning.loop_prompts import check_prompts, prompts_digest
from mbrl_text_env.agents.learning.loop_values import LoopValues, ValueBefore
from mbrl_text_env.agents.learning.presets import LoopSettings, answer_hint, planned
from mbrl_text_env.agents.learning.shift import (
    Divergence,
    check_gold,
    divergence,
    from_json,
    to_json,
)
from mbrl_text_env.agents.registry import make
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.agents.values import FittedValue
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.identity import identity
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams, spawn_seed
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record, RecordWriter, read_records
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueModel

AgentFactory = Callable[[LanguageModel, RewardModel, ValueModel | None], Agent]
"""Makes the agent that answers from a policy, the reward and the policy's value model."""

_FEW_PROMPTS = 500
# What may differ when a loop goes on: it decides how far the loop goes, not what an iteration does.
_ADJUSTABLE = ("iterations", "patience")


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
        improver: How a policy learns; None for `LoraImprover`.
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

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardLike,
        train: Sequence[Prompt],
        validation: Sequence[Prompt],
        folder: str | Path,
        settings: LoopSettings | None = None,
        *,
        improver: Improver | None = None,
        gold_model: RewardLike | None = None,
        agent_factory: AgentFactory | None = None,
        value_factory: Callable[[LanguageModel, RewardModel], FittedValue] | None = None,
        value_model: FittedValue | None = None,
        encoder: Encoder | None = None,
        hint: Hint = answer_hint,
        on_stage: Callable[[int, str], None] | None = None,
    ) -> None:
        self.language_model = language_model
        self.reward_model = as_reward_model(reward_model)
        self.train = train
        self.validation = validation
        self.folder = folder
        self.settings = planned() if settings is None else settings
        self.improver: Improver = LoraImprover() if improver is None else improver
        self.gold_model = None if gold_model is None else as_reward_model(gold_model)
        self.agent_factory = agent_factory
        self.value_factory = value_factory
        self.value_model = value_model
        self.encoder = encoder
        self.hint = hint
        self.on_stage = on_stage
        check_prompts(train, validation, self.reward_model)
        self._folder = LoopFolder(folder)
        self._values = LoopValues(
            self.settings, self.reward_model, encoder, value_factory, value_model
        )
        self._serving: tuple[int, LanguageModel] = (0, language_model)

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
        with told_where(self.folder, "the start"), self._folder.claimed(self._described()):
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
            stage = self._stage(iteration, "policy")
            if iteration and not stage.is_done:
                raise LoopError(f"{stage.folder}: iteration {iteration} has no policy yet.")
            served = self.language_model
            if iteration:
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
        fitted_at = read_value(self._stage(iteration, "value").read()["report"]).fitted_at
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
        lacking = self._without_signal(iteration)
        if lacking is not None:
            told = f"Iteration {iteration}: {lacking}"
            if iteration == 1:
                raise NoSignalError(told)
            warnings.warn(told, stacklevel=3)
            return None, told
        self._do(iteration, "selected", self._select)
        self._do(iteration, "policy", self._improve)
        self._do(iteration, "validation", self._validate)
        found = read_validation(self._stage(iteration, "validation").read()["report"])
        means = [*(report.validation.mean for report in reports), found.mean]
        stopped = fallen(means, self.settings.patience)
        if self._values.is_wanted and stopped is None:
            self._do(iteration, "value", self._fit_value)
        return self._report(iteration, reports), stopped

    def _collect(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        before = stage.iteration - 1
        settings = self.settings
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
        report = Collected.of(read_records(stage.folder), len(failed))
        return {"report": to_json(report), "is_plain": isinstance(agent, Sampling)}

    def _select(self, stage: Stage, ledger: Ledger, seed: int) -> dict[str, Any]:
        kept = select(self.records(stage.iteration, "collected"), self.settings.filter)
        with RecordWriter(stage.folder) as writer:
            writer.extend(kept)
        return {"report": to_json(Selected.of(kept))}

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
        settings, policy = self.settings, self.policy(stage.iteration)
        samples = settings.validation_samples
        records = self._sampled(stage.folder, policy, self.validation, samples, seed, ledger)
        moved = self._divergence(policy, spawn_seed(seed, 1), ledger)
        gold = None
        if self.gold_model is not None:
            gold = check_gold(self.gold_model, records, ledger=ledger)
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
        before = stage.iteration - 1
        found = self._values.renew(
            stage.folder,
            self.policy(stage.iteration),
            self.records(stage.iteration, "validation"),
            lambda folder, policy: self._sampled(
                folder, policy, self.train, self.settings.value_samples, seed, ledger
            ),
            ledger,
            iteration=stage.iteration,
            before=None if before < 0 else self._before(before),
        )
        return {"report": to_json(found)}

    def _before(self, iteration: int) -> ValueBefore:
        """The value model of an iteration, for the next one."""
        stage = self._stage(iteration, "value")
        return ValueBefore(stage.folder, self.policy(iteration), read_value(stage.read()["report"]))

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
                clear = getattr(model, "clear_cache", None)
                if clear is not None:
                    clear()
            ledger, start = Ledger(), time.perf_counter()
            seed = spawn_seed(self.settings.seed, iteration, STAGES.index(name))
            note = make(stage, ledger, seed)
            wall = {"wall_seconds": time.perf_counter() - start}
            stage.end({**note, "usage": {**ledger.usage.as_dict(), **wall}})

    def _stage(self, iteration: int, name: str) -> Stage:
        return self._folder.stage(iteration, name)

    def _agent(self, policy: LanguageModel, value: ValueModel | None) -> Agent:
        if self.agent_factory is not None:
            return self.agent_factory(policy, self.reward_model, value)
        settings = self.settings
        return make(
            settings.agent,
            policy,
            self.reward_model,
            value,
            max_response_tokens=settings.max_response_tokens,
            params=settings.params,
        )

    def _sampling(self, policy: LanguageModel, params: SamplingParams) -> Sampling:
        limit = self.settings.max_response_tokens
        return Sampling(policy, self.reward_model, max_response_tokens=limit, params=params)

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

    def _without_signal(self, iteration: int) -> str | None:
        """Why nothing can be learned from the answers; None where something can."""
        return without_signal(
            self.records(iteration, "collected"),
            self.records(iteration - 1, "validation"),
            is_plain=self._stage(iteration, "collected").read()["is_plain"],
        )

    def _report(self, iteration: int, before: Sequence[IterationReport]) -> IterationReport:
        """Put an iteration's notes together, and write its scores and its ledger."""
        notes = {
            name: stage.read() for name in STAGES if (stage := self._stage(iteration, name)).is_done
        }
        collected, selected, value = (notes.get(n) for n in ("collected", "selected", "value"))
        validation = read_validation(notes["validation"]["report"])
        report = IterationReport(
            iteration,
            notes["validation"]["policy"],
            validation,
            None if collected is None else from_json(Collected, collected["report"]),
            None if selected is None else from_json(Selected, selected["report"]),
            notes["policy"]["report"] if "policy" in notes else None,
            None if value is None else read_value(value["report"]),
            {name: note["usage"] for name, note in notes.items()},
            tuple(doubts_about(before[0].validation if before else validation, validation)),
        )
        for doubt in report.warnings:
            warnings.warn(f"Iteration {iteration}: {doubt}", stacklevel=4)
        root = self._folder.iteration(iteration)
        write_json(root / "scores.json", report.to_dict())
        write_json(root / "ledger.json", {**report.usage, "total": report.total_usage()})
        return report

    def _described(self) -> dict[str, Any]:
        """Whatever the results depend on."""
        settings = dataclasses.asdict(self.settings)
        for name in _ADJUSTABLE:
            settings.pop(name)
        models: dict[str, Any] = {
            "language_model": identity(self.language_model),
            "reward": identity(self.reward_model),
            "gold": identity(self.gold_model),
            "value_model": identity(self.value_model),
            "encoder": identity(self.encoder),
            "improver": dict(self.improver.described()),
        }
        given = ("agent_factory", "value_factory", "hint")
        return {
            "settings": identity(settings),
            **models,
            **{name: identity(getattr(self, name)) for name in given},
            **{name: prompts_digest(getattr(self, name)) for name in ("train", "validation")},
        }
