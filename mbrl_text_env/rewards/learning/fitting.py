"""Fit rewards: heads on frozen features, or classifiers tuned with LoRA through TRL's trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mbrl_text_env._lazy import optional
from mbrl_text_env.fitting.heads import LayeredHead, Problem, fit_linear, fit_mlp
from mbrl_text_env.fitting.report import FitReport, pair_report, regression_report, split_by_group
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.learning.features import EMBEDDED, EmbeddingFeatures, Features, Raw
from mbrl_text_env.rewards.learning.learned import (
    FOLDER,
    Fitted,
    HeadScorer,
    LearnedReward,
    RewardFitError,
    RewardFitReport,
    described,
)
from mbrl_text_env.rewards.learning.lora_classifier import (
    AdapterReward,
    Base,
    load_base,
    quiet,
    write_adapter,
)
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.runs import claim_checkpoints, own_randomness, writing
from mbrl_text_env.types import FloatArray

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

Objective = Literal["bradley-terry", "regression"]
HeadKind = Literal["linear", "mlp"]
Rows = npt.NDArray[np.bool_]

_FITS: Mapping[str, Callable[[Problem, int], tuple[LayeredHead, dict[str, Any]]]] = {
    "linear": fit_linear,
    "mlp": fit_mlp,
}


def fit_reward(
    data: Sequence[PreferencePair] | Sequence[Record],
    *,
    objective: Objective = "bradley-terry",
    head: HeadKind = "linear",
    features: Features | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
) -> LearnedReward:
    """Fit a reward model, not saved yet: a head on features of a frozen model.

    Its report is of the pairs or records of prompts, told apart by their text, that are held out of
    the fit. The penalty is chosen by cross-validation by prompt on the others.

    Bradley-Terry: a response is preferred with probability sigmoid(r_chosen - r_rejected), whose
    mean -log is minimised; with a linear head, a logistic regression on differences of features
    without an intercept. Margins are not used. Regression: ridge regression of the scores.

    Sources: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 1952;
    Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020. Deviation: only a
    head is fitted, the model below it is frozen; `fit_lora` tunes a model.

    Args:
        data: Preference pairs, or for regression scored records of one reward model.
        head: `"linear"`; or `"mlp"`, one hidden layer of 32 units, stopped early by the loss on a
            fifth of the prompts that are fitted on.
        features: By default `EmbeddingFeatures()`, on MiniLM, with counts. A copy is fitted.
        held_out: Share of the prompts to measure on.
        seed: The split and the initial weights of an MLP follow from it.
        name: Of the reward; by default `learned(<data_name>)`.
        data_name: What preferences or scores come from; by default the records' reward, or
            "preferences".

    Raises:
        RewardFitError: There is too little data (fewer than five prompts), all of it looks the same
            to the features, or it does not fit the objective.

    Example:
        >>> pairs = pairs_from_records(read_records("records"))  # doctest: +SKIP
        >>> reward = fit_reward(pairs, data_name="relevance")  # doctest: +SKIP
        >>> reward.report_.held_out.accuracy  # doctest: +SKIP
        0.93
    """
    _check_arguments(data, objective, head)
    # A copy: the same features in two fits give two rewards.
    features = EmbeddingFeatures() if features is None else copy.copy(features)
    table = (_read_pairs if objective == "bradley-terry" else _read_records)(data, features)
    test = split_by_group(table.groups, held_out, seed)
    rows = table.rows(~test)
    features.fit({key: values[rows] for key, values in table.raw.items()})
    inputs = features.transform(table.raw)
    problem = table.problem(inputs).subset(~test)
    if problem.says_nothing():
        raise RewardFitError(
            f"Expected responses that the features tell apart, but {len(data)} rows look the same "
            f"to {features.kind} features. Add data, or choose other features."
        )
    fitted, chosen = _FITS[head](problem, seed)
    if objective == "bradley-terry":
        fitted = fitted.moved(-fitted(inputs[rows]).mean())
    scores = fitted(inputs)
    origin = data_name or table.data_name
    facts = {"objective": objective, "model": f"{head} on {features.kind}", "data": origin}
    measure = partial(table.report, scores)
    report = _fit_report(table.groups, test, measure, seed=seed, chosen=chosen, **facts)
    scorer = HeadScorer(features, fitted)
    return LearnedReward(None, fitted=Fitted(name or f"learned({origin})", scorer, report))


def _fit_report(
    groups: Sequence[str], test: Rows, measure: Callable[[Rows], FitReport], **facts: Any
) -> RewardFitReport:
    """What is known of a fit; `measure` makes the report of some of the rows."""
    return RewardFitReport(
        num_fitted=int((~test).sum()),
        num_fitted_prompts=len(set(compress(groups, ~test))),
        fitted_accuracy=measure(~test).accuracy,
        held_out=measure(test),
        **facts,
    )


class _Table(NamedTuple):
    """Records, one row each; or pairs, the chosen responses' rows before the rejected ones'.

    Of each record or pair it has the prompt (`groups`) and the characters; of records the scores.
    """

    raw: Raw
    groups: list[str]
    lengths: npt.NDArray[np.int64]
    data_name: str
    scores: FloatArray | None = None

    def rows(self, used: Rows) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.concatenate([used, used]) if self.scores is None else used)

    def problem(self, inputs: FloatArray) -> Problem:
        numbers = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        groups = np.array([numbers[group] for group in self.groups], dtype=np.int64)
        if self.scores is not None:
            return Problem(inputs, groups, targets=self.scores)
        chosen, rejected = np.split(inputs, 2)
        return Problem(chosen, groups, rejected=rejected)

    def report(self, scores: FloatArray, used: Rows) -> FitReport:
        groups = [*compress(self.groups, used)]
        lengths = self.lengths[used]
        if self.scores is not None:
            return regression_report(scores[used], self.scores[used], groups, lengths)
        chosen, rejected = np.split(scores, 2)
        return pair_report(chosen[used], rejected[used], groups, lengths)


def _read_pairs(data: Sequence[Any], features: Features) -> _Table:
    prompts = [pair.prompt for pair in data]
    responses = [*(pair.chosen for pair in data), *(pair.rejected for pair in data)]
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in data])
    raw = features.read(prompts * 2, responses)
    return _Table(raw, [prompt.text for prompt in prompts], lengths, "preferences")


def _read_records(data: Sequence[Any], features: Features) -> _Table:
    from mbrl_text_env.records import scores_of

    responses = [record.response for record in data]
    return _Table(
        features.read([record.prompt() for record in data], responses),
        [record.prompt_text for record in data],
        np.array([len(response) for response in responses]),
        data[0].reward_name,
        np.array(scores_of(data), dtype=np.float64),
    )


def _check_arguments(data: Sequence[Any], objective: str, head: str) -> None:
    allowed = {"objective": get_args(Objective), "head": get_args(HeadKind)}
    for argument, value in (("objective", objective), ("head", head)):
        if value not in allowed[argument]:
            known = list(allowed[argument])
            raise RewardFitError(f"{argument}: expected one of {known}, got {value!r}.")
    if not data:
        raise RewardFitError("Expected data to fit a reward on, got none.")
    is_pairs = all(isinstance(row, PreferencePair) for row in data)
    if is_pairs != (objective == "bradley-terry"):
        raise RewardFitError(
            f"objective={objective!r} takes "
            f"{'scored records' if is_pairs else 'preference pairs'}, got "
            f"{type(data[0]).__name__}s. Make pairs of records with `pairs_from_records`, or "
            "change the objective."
        )
    names = sorted({row.reward_name for row in data if not isinstance(row, PreferencePair)})
    if len(names) > 1:
        raise RewardFitError(
            f"Expected scores of one reward model, got those of {names}. Score the responses with "
            "one of them (`records.rescore`)."
        )


@dataclass(frozen=True)
class LoraSettings:
    """How a classifier is tuned.

    Args:
        base: A sequence-classification or causal checkpoint: name on the Hub or folder;
            `"embedded"` is the package's SmolLM2. A head that the checkpoint lacks starts random.
        r: Rank of the adapters; their scale is `alpha / r`.
        targets: Names of the modules that get adapters; None for all linear layers.
        dropout: Of the adapters' input. (TRL turns other dropout off.)
        max_steps: Steps of the optimizer; None for `epochs` passes over the pairs.
        batch_size: Pairs in one step.
        learning_rate: Its highest value; it falls linearly to 0.
        max_length: Most tokens of prompt and response; longer texts are cut as `ClassifierReward`
            cuts them, in tuning and in scoring.
        save_steps: Steps between checkpoints.
        seed: Head, adapters, order of the pairs and held-out prompts follow from it.
        use_margin: Whether a pair's margin is taken off its score difference in the loss, as in
            Llama 2 (Touvron et al., 2023); every pair needs one.
    """

    base: str = EMBEDDED
    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    learning_rate: float = 1e-4
    max_length: int = 512
    save_steps: int = 50
    seed: int = 0
    use_margin: bool = False

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "epochs", "batch_size", "learning_rate", "max_length"):
            if not getattr(self, name) > 0:
                raise RewardFitError(f"{name}: expected more than 0, got {getattr(self, name)!r}.")
        if self.save_steps < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise RewardFitError(
                "Expected save_steps and max_steps of at least 1, got "
                f"{self.save_steps!r} and {self.max_steps!r}."
            )
        if not 0 <= self.dropout < 1:
            raise RewardFitError(f"dropout: expected 0 or more and below 1, got {self.dropout!r}.")


def fit_lora(
    pairs: Sequence[PreferencePair],
    folder: str | Path,
    settings: LoraSettings = LoraSettings(),
    *,
    held_out: float = 0.2,
    name: str | None = None,
    data_name: str = "preferences",
) -> LearnedReward:
    """Tune a classifier with one logit so that chosen responses score higher than rejected ones.

    The loss is Bradley-Terry's, by TRL's `RewardTrainer`, in float32. Texts are in the tokenizer's
    chat template where it has one, otherwise as in the article ("User: ...\\nAssistant: ...").
    The report is of the pairs of prompts that are held out.

    A fit that was stopped goes on from `<folder>-checkpoints` if pairs and settings are the same;
    it is removed at the end. transformers reads its torch files with `weights_only=True`; keep
    checkpoints of others out of it. The final folder has safetensors and JSON alone: adapter, head,
    tokenizer, and the name or path of the base, which is not copied.

    Sources: Hu et al., "LoRA", ICLR 2022; the objective as in `fit_reward`.

    Args:
        folder: Where the reward is written, and read back from.
        held_out: Share of the prompts to measure on.
        name: Of the reward; by default `learned(<data_name>)`.
        data_name: What the preferences come from.

    Raises:
        RewardFitError: There are fewer than five prompts, a margin is missing, or the checkpoints
            are of another fit.
        RewardError: `trl` or `peft` is missing, or the base or the folder cannot be used.

    Example:
        >>> reward = fit_lora(pairs, "my-reward", LoraSettings(max_steps=100))  # doctest: +SKIP
    """
    target = Path(folder)
    FOLDER.check_target(target)
    peft, trl = optional("peft", RewardError), optional("trl", RewardError)
    groups = [pair.prompt.text for pair in pairs]
    test = split_by_group(groups, held_out, settings.seed)
    fitted_on = list(compress(pairs, ~test))
    if settings.use_margin and any(pair.margin is None for pair in fitted_on):
        raise RewardFitError("use_margin=True: expected a margin on every pair, got some without.")
    name = name or f"learned({data_name})"
    checkpoints = target.with_name(f"{target.name}-checkpoints")
    rows = [[pair.prompt.text, pair.chosen, pair.rejected, pair.margin] for pair in fitted_on]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    with writing(checkpoints, RewardFitError):
        ours = {**asdict(settings), "pairs": digest}
        resumed = claim_checkpoints(checkpoints, ours, RewardFitError)
    with quiet(), own_randomness(settings.seed):
        base = load_base(settings.base, settings.max_length, name)
        trainer = _trainer(peft, trl, base, settings, fitted_on, checkpoints)
        trainer.train(resume_from_checkpoint=resumed)
    with FOLDER.writing(target) as scratch:
        write_adapter(scratch, trainer.model, base.tokenizer, settings.base)
        # What is measured is what was written.
        scorer = AdapterReward(scratch, settings.base, settings.max_length, name)
        chosen = {**asdict(settings), "steps": int(trainer.state.global_step)}
        facts = {"objective": "bradley-terry", "model": "lora", "data": data_name}
        measure = partial(_report, scorer, pairs)
        report = _fit_report(groups, test, measure, seed=settings.seed, chosen=chosen, **facts)
        kept = {"base": settings.base, "max_length": settings.max_length}
        FOLDER.write_config(scratch, described("lora", Fitted(name, scorer, report), kept))
    shutil.rmtree(checkpoints)
    return LearnedReward(target)


def _trainer(
    peft: Any,
    trl: Any,
    base: Base,
    settings: LoraSettings,
    pairs: Sequence[PreferencePair],
    checkpoints: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    prompts = [pair.prompt for pair in pairs]
    columns: dict[str, list[Any]] = {
        f"{which}_ids": base.encoder.token_ids(prompts, [getattr(pair, which) for pair in pairs])
        for which in ("chosen", "rejected")
    }
    if settings.use_margin:
        columns["margin"] = [pair.margin for pair in pairs]
    adapter = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.targets is None else list(settings.targets),
        modules_to_save=base.heads or None,
    )
    arguments = trl.RewardConfig(
        output_dir=str(checkpoints),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        # Texts are cut already; what is too long would be left out.
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.RewardTrainer(
        model=base.model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(scorer: AdapterReward, data: Sequence[PreferencePair], used: Rows) -> FitReport:
    pairs = list(compress(data, used))
    prompts = [pair.prompt for pair in pairs]
    responses = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    chosen, rejected = np.split(scorer.score(prompts * 2, responses), 2)
    lengths = [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    return pair_report(chosen, rejected, [prompt.text for prompt in prompts], lengths)
