"""Supervised fine-tuning of a policy on its own best responses, through TRL's `SFTTrainer`."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from mbrl_text_env.agents.learning.lora import (
    AdapterSettings,
    keep,
    serve,
    tokenizer_of,
    train_adapter,
)
from mbrl_text_env.agents.learning.notes import from_json, to_json
from mbrl_text_env.agents.learning.training import (
    TuningError,
    check_above_zero,
    common_arguments,
)
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.runs import digest
from mbrl_text_env.types import Usage

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM


# The loss before tuning is of this many examples, so that it does not cost an epoch.
_LOSS_EXAMPLES = 64
_SAVE_STEPS = 25
# Forward, and the gradients of the activations; frozen weights have none.
_PASSES = 2
_IGNORED = -100
# What transformers accepts as a seed.
_SEEDS = 2**31


@dataclass(frozen=True)
class FineTuneSettings(AdapterSettings):
    """How a policy is fine-tuned; the defaults are the article's, except for `batch_size` (1).

    For the adapter's fields see `AdapterSettings`.

    Args:
        learning_rate: Its highest value; it falls linearly to 0.
        epochs: Passes over the examples.
        batch_size: Examples in one forward pass.
        gradient_accumulation: Passes in one step of the optimizer.
        max_length: Most tokens of prompt and response; longer examples are left out.
        seed: Adapters and order of the examples follow from it.

    Raises:
        TuningError: A number is out of its range.
    """

    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch_size: int = 4
    gradient_accumulation: int = 4
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(
            self, "learning_rate", "epochs", "batch_size", "gradient_accumulation", "max_length"
        )


@dataclass(frozen=True)
class FineTuneReport:
    """What fine-tuning did and took.

    Args:
        num_examples: Records that were fitted.
        steps: Steps of the optimizer.
        loss_before: Mean loss (nats a response token, averaged over batches) of the first examples,
            at most 64, before the first step.
        losses: The same of each step's examples, before that step.
        seconds: Wall time; of the last call alone where an earlier one was stopped.
        tokens: Tokens of prompts and responses passed through the model in training.
        flops: Twice a forward pass (frozen weights need no gradients), padding not counted.
    """

    num_examples: int
    steps: int
    loss_before: float | None
    losses: tuple[float, ...]
    seconds: float
    tokens: int
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FineTuneReport:
        """The report that `to_dict` described."""
        return from_json(cls, values)


class Example(NamedTuple):
    """Token ids of prompt and response, and the label of each: -100 for the prompt."""

    input_ids: list[int]
    labels: list[int]


def fine_tune(
    language_model: TransformersLM,
    records: Sequence[Record],
    folder: str | Path,
    settings: FineTuneSettings = FineTuneSettings(),
    *,
    start_from: str | Path | None = None,
) -> FineTuneReport:
    """Raise the likelihood of recorded responses with a LoRA adapter.

    Prompts are encoded by the language model's own template and responses are the recorded token
    ids, with a stop token at the end where the response ended by itself. The loss is of the
    responses alone. Training is in float32; on a CPU the same records and settings give the same
    adapter.

    Checkpoints lie in `<folder>-checkpoints`, from which a call that was stopped goes on if
    records and settings are the same; they are removed at the end. They hold the optimizer's state
    in torch's format and `training_args.bin`, a pickle, which nothing here reads: keep checkpoints
    of others out of that folder. The final folder has safetensors and JSON alone, and is there as a
    whole or not at all.

    Args:
        language_model: The base.
        records: At least two, with the token ids of their responses.
        folder: Where the adapter is written, with `fine_tuning.json`; `serve` takes it.
        settings: See `FineTuneSettings`.
        start_from: Folder of an adapter to go on training; None for a new one.

    Raises:
        TuningError: There are fewer than two records, one has no token ids or is of another
            language model, `start_from` is for another base, the checkpoints are of another run,
            or there is no space left.
        RewardError: `trl` or `peft` is not installed.
        KeyboardInterrupt: It was stopped; a checkpoint is saved and the same call goes on.

    Example:
        >>> best = [r for r in read_records("records") if r.score > 0.9]  # doctest: +SKIP
        >>> report = fine_tune(lm, best, "tuned")  # doctest: +SKIP
        >>> policy = serve(lm, "tuned")  # doctest: +SKIP
    """
    start = time.perf_counter()
    examples = examples_of(language_model, records, settings.max_length)
    trainer = train_adapter(
        language_model,
        folder,
        settings,
        start_from,
        {"examples": digest(repr(examples).encode())},
        functools.partial(_trainer, language_model, examples, settings),
    )
    lengths = [len(example.input_ids) for example in examples]
    forward = sum(language_model.usage_bound(length, []).lm_flops for length in lengths)
    report = FineTuneReport(
        num_examples=len(examples),
        steps=int(trainer.state.global_step),
        loss_before=trainer.loss_before,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        seconds=time.perf_counter() - start,
        tokens=round(settings.epochs * sum(lengths)),
        flops=settings.epochs * _PASSES * forward,
    )
    notes = {"settings": asdict(settings), "report": report.to_dict()}
    keep(folder, trainer.model, language_model, {"fine_tuning.json": notes})
    return report


def examples_of(
    language_model: TransformersLM, records: Sequence[Record], max_length: int
) -> list[Example]:
    """What is learned from each record; longer ones than `max_length` are left out.

    A response that ended by itself ends with a stop token, also where the record lacks it. The
    prompt is the record's own in the template, without a hint that it was sampled with.
    """
    if len(records) < 2:
        raise TuningError(
            f"Expected at least two records to fine-tune on, got {len(records)}. Collect more, or "
            "loosen the filter."
        )
    made = [_example(language_model, record) for record in records]
    limit = min(max_length, language_model.context_length)
    kept = [example for example in made if len(example.input_ids) <= limit]
    if len(kept) < len(made):
        warnings.warn(
            f"{len(made) - len(kept)} of {len(made)} records have more than {limit} tokens of "
            "prompt and response, and are left out. Raise max_length to keep them.",
            stacklevel=3,
        )
    if len(kept) < 2:
        raise TuningError(
            f"Expected at least two records of at most {limit} tokens, got {len(kept)} of "
            f"{len(made)}. Raise max_length, or collect shorter responses."
        )
    return kept


def _example(language_model: TransformersLM, record: Record) -> Example:
    # Tuned generations of a model are named "<base>+<adapter>"; they have the base's tokens.
    response, stops = list(record.response_ids), language_model.stop_token_ids
    fault = None
    if record.language_model.partition("+")[0] != language_model.name.partition("+")[0]:
        fault = (
            f"a response of {language_model.name!r}, got one of {record.language_model!r}, whose "
            "token ids mean other texts. Collect responses with this model."
        )
    elif not response:
        fault = (
            "the token ids of its response, got none. Leave it out, or collect it with "
            "`mbrl_text_env.agents.collection.collect`."
        )
    elif max(response) >= language_model.vocab_size or min(response) < 0:
        fault = (
            f"token ids from 0 to {language_model.vocab_size - 1}, got {max(response)}. It is of "
            "another model."
        )
    if fault is not None:
        raise TuningError(f"Record of prompt {record.prompt_id!r}: expected {fault}")
    if record.finish_reason == "stop" and response[-1] not in stops and stops:
        own = tokenizer_of(language_model).eos_token_id
        response.append(int(own if own is not None else min(stops)))
    prompt = list(language_model.encode_prompt(record.prompt()))
    return Example(prompt + response, [_IGNORED] * len(prompt) + response)


def _trainer(
    language_model: TransformersLM,
    examples: Sequence[Example],
    settings: FineTuneSettings,
    model: Any,
    checkpoints: Path,
) -> Any:
    import trl
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    dataset = Dataset.from_list([example._asdict() for example in examples])
    arguments = trl.SFTConfig(
        **common_arguments(checkpoints, settings.seed, _SAVE_STEPS),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        # Ids and labels are final: nothing is encoded, cut or packed.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    trainer: Any = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(min(len(dataset), _LOSS_EXAMPLES))),
        processing_class=tokenizer_of(language_model),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.loss_before = float(trainer.evaluate()["eval_loss"])
    return trainer


@dataclass(frozen=True)
class Improvement:
    """What an improver did.

    Args:
        num_examples: Records that were learned.
        usage: What it took.
        details: What else there is to say. JSON values.
    """

    num_examples: int
    usage: Usage = field(default_factory=Usage)
    details: Mapping[str, Any] = field(default_factory=dict)


class Improver(Protocol):
    """Makes a policy's folder from answers, and a language model from a policy's folder.

    Example:
        >>> class Copying:  # always serves the base
        ...     def described(self):
        ...         return {"kind": "copying"}
        ...     def improve(self, base, records, folder, *, start_from=None, seed=0):
        ...         Path(folder).mkdir()
        ...         return Improvement(len(records))
        ...     def serve(self, base, folder):
        ...         return base
    """

    def described(self) -> Mapping[str, Any]:
        """Kind and settings, as JSON values: all that its results depend on."""
        ...

    def improve(
        self,
        base: LanguageModel,
        records: Sequence[Record],
        folder: Path,
        *,
        start_from: Path | None = None,
        seed: int = 0,
    ) -> Improvement:
        """Write a policy that gives the recorded answers more often.

        Args:
            base: The base model.
            records: At least two.
            folder: Where the policy is written, as a whole or not at all.
            start_from: Folder of a policy to go on from; None for the base.
            seed: All randomness follows from it.
        """
        ...

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The policy of a folder, with the base's tokens and a name of its own.

        The name differs between policies, since it is how a value model knows whose responses it
        was fitted on.
        """
        ...


class LoraImprover:
    """Supervised fine-tuning with LoRA: `fine_tune`.

    Args:
        settings: See `FineTuneSettings`; None for its defaults, which are the article's. Its seed
            is replaced by the loop's.
    """

    def __init__(self, settings: FineTuneSettings | None = None) -> None:
        self.settings = FineTuneSettings() if settings is None else settings

    def described(self) -> Mapping[str, Any]:
        """The settings."""
        settings = dataclasses.asdict(self.settings)
        settings.pop("seed")
        return {"kind": "lora", **settings}

    def improve(
        self,
        base: LanguageModel,
        records: Sequence[Record],
        folder: Path,
        *,
        start_from: Path | None = None,
        seed: int = 0,
    ) -> Improvement:
        """Tune an adapter; see `fine_tune`, which raises the same."""
        settings = dataclasses.replace(self.settings, seed=seed % _SEEDS)
        report = fine_tune(_trainable(base), records, folder, settings, start_from=start_from)
        usage = Usage(lm_flops=report.flops, seconds=report.seconds)
        return Improvement(report.num_examples, usage, report.to_dict())

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The base with the adapter, named after the adapter's weights."""
        return serve(_trainable(base), folder)


def _trainable(base: LanguageModel) -> TransformersLM:
    if not hasattr(base, "with_adapter"):
        raise TypeError(
            f"Expected a language model that runs here (TransformersLM) to fine-tune, got "
            f"{base.name!r} ({type(base).__name__}). Load it here, or give the loop an improver "
            "of its own."
        )
    return cast("TransformersLM", base)
