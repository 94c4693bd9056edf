"""Expert iteration: a policy answers prompts with a planner and is tuned on the best answers."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning import reports, stages
from mbrl_text_env.agents.learning.answers import Hint, collect_answers, select
from mbrl_text_env.agents.learning.presets import LoopSettings, answer_hint, planned
from mbrl_text_env.agents.learning.reports import (
    IterationReport,
    LoopResult,
    ValueCheck,
    ValueReport,
    to_json,
    write_json,
)
from mbrl_text_env.agents.learning.stages import LoopError, Stage
from mbrl_text_env.agents.learning.training import check_prompts
from mbrl_text_env.agents.registry import make
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.agents.values import (
    READY,
    FittedValue,
    check_value_fits,
    load_value,
    make_value,
)
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import restored
from mbrl_text_env.language_models.base import (
    LanguageModel,
    SamplingParams,
    spawn_seed,
)
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record, RecordWriter, read_records
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    ObjectReward,
    RewardLike,
    RewardModel,
    Scores,
    score_responses,
)
from mbrl_text_env.runs import Each, claimed, identity, in_turn, prompt_digests
from mbrl_text_env.types import FloatArray, Ledger, Prompt
from mbrl_text_env.values import ValueModel

Note = dict[str, Any]

_FEW_PROMPTS = 500
# Parts of the value stage: the records it is fitted on, and the value model.
_RECORDS, _MODEL = "records", "model"
# Settings that may change on resuming: they decide when the loop ends, not what iterations do.
_ADJUSTABLE = ("iterations", "patience")


@dataclass(eq=False, repr=False)
class ExpertIteration:
    """Expert iteration: collect answers, filter them, tune the policy and refit the value.

    All state is kept in a folder. If `run` is stopped or killed at any moment, the same call
    resumes after the last complete stage and gives the same result.

    Sources: Anthony et al., "Thinking Fast and Slow with Deep Learning and Tree Search", NeurIPS
    2017; for the variants see `mbrl_text_env.agents.learning.presets`.

    Args:
        language_model: The base model.
        train: Prompts to answer. Fewer than 500 give a warning, as the article advises.
        validation: Prompts to evaluate on, with other ids.
        settings: The settings of an iteration; see `star`, `rest_em`, `rejection_sampling` and
            `planned`.
        improver: Trains a policy on answers: `LoraImprover`, or an object with the same methods.
        gold_model: A trusted reward that is only evaluated, never used for selection.
        value_model: A fitted value model for the base model, of the settings' kind. None fits one.
        encoder: Text encoder of value models that use one; None for MiniLM.
        hint: Adds a hint to a prompt, if the settings use hints.
        on_stage: Called with the iteration and name of each stage that starts.
        each: Runs the batches of prompts (for example `RayWorkers`); all else runs in this process.

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
    settings: LoopSettings = field(default_factory=planned)
    _: KW_ONLY
    improver: Any = field(default_factory=stages.LoraImprover)
    gold_model: RewardLike | None = None
    value_model: FittedValue | None = None
    encoder: Encoder | None = None
    hint: Hint = answer_hint
    on_stage: Callable[[int, str], None] | None = None
    each: Each = in_turn

    def __post_init__(self) -> None:
        self.reward_model = self._reward = as_reward_model(self.reward_model)
        self._gold = None if self.gold_model is None else as_reward_model(self.gold_model)
        # Validation prompts must not be tuned on.
        both = [*self.train, *self.validation]
        lists = (("train", self.train), ("validation", self.validation), ("both", both))
        for name, prompts in lists:
            check_prompts(prompts, self._reward, noun=name, error=LoopError)
        if self.value_model is not None and self.settings.value is None:
            raise LoopError("value_model: set settings.value as well, the kind of model to refit.")
        self._serving: tuple[int, LanguageModel] = (0, self.language_model)

    def run(self) -> LoopResult:
        """Run or resume the loop until the last iteration.

        Raises:
            LoopError: The folder belongs to another loop, is damaged, or is not writable.
            NoSignalError: All answers of the first iteration have the same score.
            FilterError: The filter keeps fewer than two answers.
            ValueModelError: With `stale_value="error"`, a policy would be searched with the value
                model of another policy.
            KeyboardInterrupt: The loop was stopped; the same call resumes it.
        """
        with (
            stages.told_where(self.folder, "the start"),
            claimed(self.folder, self._described(), "loop", LoopError),
        ):
            if len(self.train) < _FEW_PROMPTS:
                warnings.warn(
                    f"{len(self.train)} train prompts: with fewer than {_FEW_PROMPTS}, a policy "
                    "can memorise the prompts instead of learning the task. Watch the "
                    "validation score, or add prompts.",
                    stacklevel=2,
                )
            done: list[IterationReport] = []
            stopped = None
            for iteration in range(self.settings.iterations + 1):
                stopped = self._iterate(iteration, done)
                if stopped is not None:
                    break
        best = max(done, key=lambda report: report.validation.mean)
        return LoopResult(tuple(done), best.iteration, stopped)

    def policy(self, iteration: int) -> LanguageModel:
        """Return the policy after an iteration, or the base for 0; a `LoopError` if missing."""
        if iteration != self._serving[0]:
            served = self.language_model
            if iteration:
                stage = self._stage(iteration, "policy")
                stage.read()
                served = self.improver.serve(self.language_model, stage.folder)
            self._serving = iteration, served
        return self._serving[1]

    def value(self, iteration: int) -> ValueModel | None:
        """Return the value model for an iteration's policy, or None if there is none.

        Raises:
            ValueModelError: It was fitted for another policy (with `stale_value="error"`).
        """
        if self.settings.value is None:
            return None
        policy = self.policy(iteration)
        fitted_at = self._value_report(iteration).fitted_at
        if self._is_ready:
            return self._made_value(policy, self._reward)
        # A value model that was carried over was saved again for this policy, except for `"error"`.
        is_stale = self.settings.stale_value == "error"
        return self._read_value(fitted_at if is_stale else iteration, policy)

    def records(self, iteration: int, stage: str) -> list[Record]:
        """Read the records of a stage: `"collected"`, `"selected"`, `"validation"` or `"value"`."""
        folder = self._stage(iteration, stage).folder
        return read_records(folder / _RECORDS if stage == "value" else folder)

    # The stages.

    def _iterate(self, iteration: int, done: list[IterationReport]) -> str | None:
        """Run an iteration and append its report; return the reason to stop, if there is one."""
        if iteration:
            self._do(iteration, "collected", self._collect)
            lacking = reports.without_signal(
                self.records(iteration, "collected"),
                self.records(iteration - 1, "validation"),
                is_plain=self._stage(iteration, "collected").read()["is_plain"],
            )
            if lacking is not None:
                told = f"Iteration {iteration}: {lacking}"
                if iteration == 1:
                    raise stages.NoSignalError(told)
                warnings.warn(told, stacklevel=3)
                return told
            self._do(iteration, "selected", self._select)
            self._do(iteration, "policy", self._improve)
        self._do(iteration, "validation", self._validate)
        found = self._stage(iteration, "validation").read()["report"]["mean"]
        means = [*(report.validation.mean for report in done), found]
        stopped = reports.fallen(means, self.settings.patience)
        if self.settings.value is not None and stopped is None:
            self._do(iteration, "value", self._fit_value)
        done.append(self._report(iteration, done))
        return stopped

    def _collect(self, stage: Stage, ledger: Ledger, seed: int) -> Note:
        before, settings = stage.iteration - 1, self.settings
        policy, value = self.policy(before), self.value(before)
        limits: dict[str, Any] = {"max_response_tokens": settings.max_response_tokens}
        limits["params"] = settings.params
        agent = make(settings.agent, policy, self._reward, value, **limits)
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
                each=self.each,
            )
        report = reports.Answers.of(read_records(stage.folder), len(failed))
        return {"report": to_json(report), "is_plain": isinstance(agent, Sampling)}

    def _select(self, stage: Stage, ledger: Ledger, seed: int) -> Note:
        kept = select(self.records(stage.iteration, "collected"), self.settings.filter)
        with RecordWriter(stage.folder) as writer:
            writer.extend(kept)
        return {"report": to_json(reports.Answers.of(kept))}

    def _improve(self, stage: Stage, ledger: Ledger, seed: int) -> Note:
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

    def _validate(self, stage: Stage, ledger: Ledger, seed: int) -> Note:
        policy, samples = self.policy(stage.iteration), self.settings.validation_samples
        records = self._sampled(stage.folder, policy, self.validation, samples, seed, ledger)
        moved = self._divergence(policy, spawn_seed(seed, 1), ledger)
        gold = reports.check_gold(self._gold, records, ledger=ledger) if self._gold else None
        report = reports.Validation.of(records, moved, gold)
        return {"report": to_json(report), "policy": policy.name}

    def _divergence(
        self, policy: LanguageModel, seed: int, ledger: Ledger
    ) -> reports.Divergence | None:
        """Divergence from separate responses, sampled at temperature 1."""
        count, size = self.settings.divergence_samples, self.settings.batch_prompts
        if not count or policy is self.language_model:
            return None
        agent = self._sampling(policy, SamplingParams())
        states = []
        for start in range(0, len(self.validation), size):
            begun = [initial(prompt, policy) for prompt in self.validation[start : start + size]]
            rows = run([partial(agent.complete, state, count, ledger, seed) for state in begun])
            states += [completion.state for row in rows for completion in row]
        return reports.divergence(policy, self.language_model, states, ledger=ledger)

    def _fit_value(self, stage: Stage, ledger: Ledger, seed: int) -> Note:
        return {"report": to_json(self._fitted_value(stage, ledger, seed))}

    def _fitted_value(self, stage: Stage, ledger: Ledger, seed: int) -> ValueReport:
        """Fit a value model on samples of the policy, or carry over the last one; evaluate it."""
        iteration, settings, way = stage.iteration, self.settings, self.settings.stale_value
        carried: Any = None
        if iteration and not self._is_ready:
            carried = self._read_value(iteration - 1, self.policy(iteration - 1))
        policy, fresh = self.policy(iteration), self.records(iteration, "validation")

        def samples() -> list[Record]:
            count, folder = settings.value_samples, stage.folder / _RECORDS
            return self._sampled(folder, policy, self.train, count, seed, ledger)

        def fitted(records: Sequence[Record]) -> FittedValue:
            value: Any = self._made_value(policy, _Charged(self._reward, ledger))
            return value.fit(records)

        def checked(value: ValueModel) -> ValueCheck:
            return reports.check_value(value, fresh, ledger=ledger)

        def kept(value: FittedValue) -> ValueCheck:
            check_value_fits(value, policy, self._reward)
            value.save(stage.folder / _MODEL)
            # Loaded again, so that a value that uses the policy's internals uses this policy.
            return checked(self._read_value(iteration, policy))

        if self._is_ready:
            found = checked(self._made_value(policy, self._reward))
            return ValueReport(iteration, False, found, None, found, None)
        if carried is None:
            found = kept(self.value_model or fitted(samples()))
            return ValueReport(0, self.value_model is None, found, None, found, None)
        last = self._value_report(iteration - 1)
        reference = last.after if last.fitted_at == iteration - 1 else last.when_fitted
        carried.language_model_name_ = policy.name
        old = kept(carried)
        ratio = old.error / reference.error if reference.error > 0 else float("inf")
        report = ValueReport(last.fitted_at, False, reference, old, old, ratio)
        if way == "error":
            shutil.rmtree(stage.folder)
        elif way == "refit" or not ratio <= settings.error_factor:
            records = samples()
            if len({record.score for record in records}) > 1:
                after = kept(fitted(records))
                return ValueReport(iteration, True, reference, old, after, ratio)
            # Expected once a policy has learned everything.
            warnings.warn(
                f"Iteration {iteration}: all responses to fit a value model on have the "
                f"score {records[0].score:.4g}; the previous value model is kept.",
                stacklevel=2,
            )
        return report

    @property
    def _is_ready(self) -> bool:
        """Whether the value model needs no fit and works for any policy."""
        return self.settings.value in READY and self.value_model is None

    def _made_value(self, policy: LanguageModel, reward_model: RewardModel) -> ValueModel:
        settings = self.settings
        assert settings.value is not None
        limits = {"max_response_tokens": settings.max_response_tokens, "seed": settings.seed}
        return make_value(settings.value, policy, reward_model, encoder=self.encoder, **limits)

    def _read_value(self, iteration: int, policy: LanguageModel) -> FittedValue:
        folder = self._stage(iteration, "value").folder / _MODEL
        return load_value(folder, policy, self._reward, self.encoder)

    # What the stages share.

    def _do(self, iteration: int, name: str, make: Callable[[Stage, Ledger, int], Note]) -> None:
        """Run a stage unless it is complete."""
        stage = self._stage(iteration, name)
        if stage.is_done:
            return
        if self.on_stage is not None:
            self.on_stage(iteration, name)
        with stages.told_where(self.folder, f"iteration {iteration}, stage {name!r}"):
            stage.begin()
            # Cached state of another policy must not depend on where the loop was stopped.
            for model in (self.language_model, self._serving[1]):
                model.clear_cache()
            ledger, start = Ledger(), time.perf_counter()
            seed = spawn_seed(self.settings.seed, iteration, stages.STAGES.index(name))
            note = make(stage, ledger, seed)
            wall = {"wall_seconds": time.perf_counter() - start}
            stage.end({**note, "usage": {**ledger.usage.as_dict(), **wall}})

    def _stage(self, iteration: int, name: str) -> Stage:
        return Stage(iteration, name, Path(self.folder) / f"{iteration:02d}")

    def _value_report(self, iteration: int) -> ValueReport:
        values = self._stage(iteration, "value").read()["report"]
        found: ValueReport = restored(ValueReport, values)
        return found

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
        """Sample a policy, score the responses and write the records."""
        agent, size = self._sampling(policy, self.settings.params), self.settings.batch_prompts
        options: Any = {"answers": samples, "batch_prompts": size, "seed": seed, "ledger": ledger}
        with RecordWriter(folder) as writer:
            collect_answers(agent, prompts, writer, each=self.each, **options)
        return read_records(folder)

    def _report(self, iteration: int, before: Sequence[IterationReport]) -> IterationReport:
        """Combine an iteration's notes, and write its scores and ledger."""
        made = [self._stage(iteration, name) for name in stages.STAGES]
        notes = {stage.name: stage.read() for stage in made if stage.is_done}
        parts = {stage.name: notes.get(stage.name, {}).get("report") for stage in made}
        values = {
            "iteration": iteration,
            "policy": notes["validation"]["policy"],
            "improvement": parts.pop("policy"),
            "usage": {name: note["usage"] for name, note in notes.items()},
        }
        report: IterationReport = restored(IterationReport, {**values, **parts})
        first = before[0] if before else report
        doubt = reports.doubt_about(first.validation.gold, report.validation.gold)
        if doubt is not None:
            warnings.warn(f"Iteration {iteration}: {doubt}", stacklevel=4)
            report = replace(report, warnings=(doubt,))
        write_json(made[0].root / "scores.json", report.to_dict())
        write_json(made[0].root / "ledger.json", report.ledger())
        return report

    def _described(self) -> Note:
        """Everything that the results depend on."""
        settings = {k: v for k, v in asdict(self.settings).items() if k not in _ADJUSTABLE}
        names = ("language_model", "value_model", "encoder", "hint")
        return {
            "settings": identity(settings),
            "reward": identity(self._reward),
            "gold": identity(self._gold),
            "improver": dict(self.improver.described()),
            **{name: identity(getattr(self, name)) for name in names},
            "train": [*prompt_digests(self.train).items()],
            "validation": [*prompt_digests(self.validation).items()],
        }


class _Charged(ObjectReward):
    """A reward model that charges a ledger for scores computed during a fit."""

    def __init__(self, reward_model: RewardModel, ledger: Ledger) -> None:
        super().__init__(reward_model)
        self._ledger = ledger

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        charged = [self._ledger] * len(responses)
        return score_responses(self.reward, prompts, responses, ledgers=charged)
