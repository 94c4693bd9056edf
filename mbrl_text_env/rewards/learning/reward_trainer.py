"""Tune a classifier on preferences with LoRA, through TRL's `RewardTrainer`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.fitting.report import FitReport, pair_report
from mbrl_text_env.fitting.samples import split_by_group
from mbrl_text_env.rewards.learning.features import EMBEDDED
from mbrl_text_env.rewards.learning.learned import (
    FOLDER,
    Fitted,
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
    required,
    write_adapter,
)
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.runs import claim_checkpoints, own_randomness, writing


@dataclass(frozen=True)
class LoraSettings:
    """How a classifier is tuned.

    Args:
        base: A sequence-classification or causal checkpoint: name on the Hub or folder;
            `"embedded"` is the package's SmolLM2. A head that the checkpoint lacks starts random.
        r: Rank of the adapters.
        alpha: Their scale is `alpha / r`.
        targets: Names of the modules that get adapters; None for all linear layers.
        dropout: Of the adapters' input. (TRL turns other dropout off.)
        max_steps: Steps of the optimizer; None for `epochs`.
        epochs: Passes over the pairs, where `max_steps` is None.
        batch_size: Pairs in one step.
        learning_rate: Its highest value; it falls linearly to 0.
        max_length: Most tokens of prompt and response; longer texts are cut as `ClassifierReward`
            cuts them, in tuning and in scoring.
        save_steps: Steps between checkpoints.
        seed: Head, adapters, order of the pairs and held-out prompts follow from it.
        use_margin: Whether a pair's margin is taken off its score difference in the loss, as in
            Llama 2 (Touvron et al., 2023); every pair needs one.

    Raises:
        RewardFitError: A number is out of its range.
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
    that folder is removed at the end. transformers reads its torch files with `weights_only=True`;
    keep checkpoints of others out of it. The final folder has safetensors and JSON alone: adapter,
    head, tokenizer, and the name or path of the base, which is not copied.

    Sources: Hu et al., "LoRA", ICLR 2022; the objective as in `fit_reward`.

    Args:
        pairs: Preference pairs.
        folder: Where the reward is written.
        settings: See `LoraSettings`.
        held_out: Share of the prompts to measure on.
        name: Of the reward; by default `learned(<data_name>)`.
        data_name: What the preferences come from.

    Returns:
        The reward, read back from its folder.

    Raises:
        RewardFitError: There are fewer than five prompts, a margin is missing, or the checkpoints
            are of another fit.
        RewardError: `trl` or `peft` is missing, or the base or the folder cannot be used.

    Example:
        >>> reward = fit_lora(pairs, "my-reward", LoraSettings(max_steps=100))  # doctest: +SKIP
        >>> reward.report_.held_out.accuracy  # doctest: +SKIP
        0.71
    """
    target = Path(folder)
    FOLDER.check_target(target)
    peft, trl = required("peft"), required("trl")
    groups = [pair.prompt.text for pair in pairs]
    test = split_by_group(groups, held_out, settings.seed)
    fitted_on = list(compress(pairs, ~test))
    measured_on = list(compress(pairs, test))
    if settings.use_margin and any(pair.margin is None for pair in fitted_on):
        raise RewardFitError("use_margin=True: expected a margin on every pair, got some without.")
    name = name or f"learned({data_name})"
    checkpoints = target.with_name(f"{target.name}-checkpoints")
    with writing(checkpoints, RewardFitError):
        resumed = _prepare(checkpoints, settings, fitted_on)
    with quiet(), own_randomness(settings.seed):
        base = load_base(settings.base, settings.max_length, name)
        trainer = _trainer(peft, trl, base, settings, fitted_on, checkpoints)
        trainer.train(resume_from_checkpoint=resumed)
    with FOLDER.writing(target) as scratch:
        write_adapter(scratch, trainer.model, base.tokenizer, settings.base)
        # What is measured is what was written.
        scorer = AdapterReward(scratch, settings.base, settings.max_length, name)
        chosen = {**asdict(settings), "steps": int(trainer.state.global_step)}
        report = _fit_report(scorer, fitted_on, measured_on, chosen, data_name)
        kept = {"base": settings.base, "max_length": settings.max_length}
        FOLDER.write_config(scratch, described("lora", Fitted(name, scorer, report), kept))
    shutil.rmtree(checkpoints)
    return LearnedReward(target)


def _fit_report(
    scorer: AdapterReward,
    fitted_on: Sequence[PreferencePair],
    measured_on: Sequence[PreferencePair],
    chosen: dict[str, Any],
    data_name: str,
) -> RewardFitReport:
    return RewardFitReport(
        objective="bradley-terry",
        model="lora",
        data=data_name,
        seed=chosen["seed"],
        num_fitted=len(fitted_on),
        num_fitted_prompts=len({pair.prompt.text for pair in fitted_on}),
        fitted_accuracy=_report(scorer, fitted_on).accuracy,
        held_out=_report(scorer, measured_on),
        chosen=chosen,
    )


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


def _report(scorer: AdapterReward, pairs: Sequence[PreferencePair]) -> FitReport:
    prompts = [pair.prompt for pair in pairs]
    scores = scorer.score(
        prompts * 2, [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    )
    chosen, rejected = np.split(scores, 2)
    lengths = [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    return pair_report(chosen, rejected, [prompt.text for prompt in prompts], lengths)


def _prepare(
    checkpoints: Path, settings: LoraSettings, pairs: Sequence[PreferencePair]
) -> str | None:
    """Make the folder of checkpoints, or find in it the last whole one of the same fit.

    Raises:
        RewardFitError: The folder is of another fit, or of something else.
    """
    rows = [[pair.prompt.text, pair.chosen, pair.rejected, pair.margin] for pair in pairs]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return claim_checkpoints(checkpoints, {**asdict(settings), "pairs": digest}, RewardFitError)
