"""LoRA adapters for the agents' language models, and supervised fine-tuning with them.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; the defaults are
the article's, except for the batch size (1 in the article). Fine-tuning uses TRL's `SFTTrainer`.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mbrl_text_env._lazy import optional
from mbrl_text_env.agents.learning import training
from mbrl_text_env.agents.learning.reports import write_json
from mbrl_text_env.agents.learning.training import TuningError
from mbrl_text_env.files import recover_folder
from mbrl_text_env.fitting.folder import FolderKind
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.learning.lora_classifier import quiet, write_adapter
from mbrl_text_env.runs import digest, own_randomness

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM

BASE = "base.json"
"""File in an adapter's folder that names the model it was trained on."""

ADAPTER = FolderKind(
    noun="LoRA adapter",
    writer="fine_tune, train_grpo or train_rloo (`TransformersLM.with_adapter` serves others)",
    config=BASE,
    weights="adapter_model.safetensors",
    version=1,
    error=TuningError,
)
# Number of values of each weight that go into the fingerprint.
_PROBES = 1024
# Maximum number of examples for the loss before tuning, which would otherwise cost an epoch.
_LOSS_EXAMPLES = 64
_SAVE_STEPS = 25
# Forward passes' worth: forward, and activation gradients; frozen weights have no gradients.
_PASSES = 2
_IGNORED = -100


@dataclass(frozen=True)
class AdapterSettings:
    """Shape of a LoRA adapter.

    `r` is the rank and `alpha / r` the scale. `targets` names the modules that get adapters.
    """

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        training.check_above_zero(self, "r", "alpha")
        training.expect(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        is_listed = bool(self.targets) and not isinstance(self.targets, str)
        training.expect(self, "targets", is_listed, "names of modules such as ('q_proj',)")
        # JSON returns a list.
        object.__setattr__(self, "targets", tuple(self.targets))


@dataclass(frozen=True)
class FineTuneSettings(AdapterSettings):
    """Settings of supervised fine-tuning; for the adapter's fields see `AdapterSettings`.

    The learning rate decays linearly to 0. A step has `batch_size` x `gradient_accumulation`
    examples. Examples longer than `max_length` tokens are dropped.
    """

    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch_size: int = 4
    gradient_accumulation: int = 4
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("batch_size", "gradient_accumulation", "max_length")
        training.check_above_zero(self, "learning_rate", "epochs", *counts)


@dataclass(frozen=True)
class FineTuneReport:
    """Results and cost of fine-tuning.

    `loss_before` is the mean loss before the first step (nats per response token, averaged over
    batches) on the first examples, at most 64; `losses` has the loss of each step. If the run was
    resumed, `seconds` covers the last call only. `tokens` and `flops` (twice a forward pass) count
    prompts and responses, without padding.
    """

    num_examples: int
    steps: int
    loss_before: float | None
    losses: tuple[float, ...]
    seconds: float
    tokens: int
    flops: float


def fine_tune(
    language_model: TransformersLM,
    records: Sequence[Record],
    folder: str | Path,
    settings: FineTuneSettings = FineTuneSettings(),
    *,
    start_from: str | Path | None = None,
) -> FineTuneReport:
    """Fine-tune a LoRA adapter on recorded responses.

    Prompts use the language model's own template. Responses are the recorded token ids, plus a stop
    token if the response ended by itself. The loss covers responses only. Training is in float32;
    on a CPU the same records and settings give the same adapter.

    An interrupted run resumes from its checkpoints in `<folder>-checkpoints`, which are removed at
    the end. Checkpoints contain torch pickles, so never use those of others. The final folder
    has only safetensors and JSON, and is written atomically.

    Args:
        records: At least two records, with the token ids of their responses.
        folder: Output folder of the adapter, with `fine_tuning.json`; load it with `serve`.
        start_from: Folder of an adapter to continue from; None for a new one.

    Raises:
        TuningError: There are fewer than two records, or one has another language model or no token
            ids; `start_from` has another base model, the checkpoints belong to another run, or the
            disk is full.
        RewardError: `trl` or `peft` is not installed.
        KeyboardInterrupt: The run was stopped; a checkpoint is saved and the same call resumes it.

    Example:
        >>> best = [r for r in read_records("records") if r.score > 0.9]  # doctest: +SKIP
        >>> report = fine_tune(lm, best, "tuned")  # doctest: +SKIP
        >>> policy = serve(lm, "tuned")  # doctest: +SKIP
    """
    start = time.perf_counter()
    examples = examples_of(language_model, records, settings.max_length)
    described = {"examples": digest(repr(examples).encode())}
    make = partial(_trainer, examples, settings)
    trainer = train_adapter(language_model, folder, settings, start_from, described, make)
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
    notes = {"settings": asdict(settings), "report": asdict(report)}
    write(folder, trainer.model, language_model, {"fine_tuning.json": notes})
    return report


class Example(NamedTuple):
    """Token ids of prompt and response, and their labels: -100 for the prompt."""

    input_ids: list[int]
    labels: list[int]


def examples_of(
    language_model: TransformersLM, records: Sequence[Record], max_length: int
) -> list[Example]:
    """Convert records to examples with a stop token; drop those that are too long."""
    made = [_example(language_model, record) for record in records]
    limit = min(max_length, language_model.context_length)
    kept = [example for example in made if len(example.input_ids) <= limit]
    if len(kept) < len(made):
        warnings.warn(
            f"{len(made) - len(kept)} of {len(made)} records have more than {limit} tokens of "
            "prompt and response, and are dropped. Raise max_length to keep them.",
            stacklevel=3,
        )
    if len(kept) < 2:
        raise TuningError(
            f"Expected at least two records of at most {limit} tokens to fine-tune on, got "
            f"{len(kept)} of {len(made)}. Collect more, relax the filter, or raise max_length."
        )
    return kept


def _example(language_model: TransformersLM, record: Record) -> Example:
    # Tuned versions of a model are named "<base>+<adapter>" and share the base's tokens.
    response, stops = list(record.response_ids), language_model.stop_token_ids
    fault = None
    if record.language_model.partition("+")[0] != language_model.name.partition("+")[0]:
        fault = (
            f"a response of {language_model.name!r}, got one of {record.language_model!r}, whose "
            "token ids have other meanings. Collect responses with this model."
        )
    elif not response:
        fault = "the token ids of its response, got none. Remove it, or collect it again."
    elif max(response) >= language_model.vocab_size or min(response) < 0:
        top = language_model.vocab_size - 1
        fault = f"token ids from 0 to {top}, got {max(response)}. The record is of another model."
    if fault is not None:
        raise TuningError(f"Record of prompt {record.prompt_id!r}: expected {fault}")
    if record.finish_reason == "stop" and response[-1] not in stops and stops:
        own = tokenizer_of(language_model).eos_token_id
        response.append(int(own if own is not None else min(stops)))
    prompt = list(language_model.encode_prompt(record.prompt()))
    return Example(prompt + response, [_IGNORED] * len(prompt) + response)


def _trainer(
    examples: Sequence[Example], settings: FineTuneSettings, common: Mapping[str, Any], **parts: Any
) -> Any:
    import trl
    from datasets import Dataset

    dataset = Dataset.from_list([example._asdict() for example in examples])
    arguments = trl.SFTConfig(
        **common,
        save_steps=_SAVE_STEPS,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        # Ids and labels are final: no encoding, truncation or packing.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    first = dataset.select(range(min(len(dataset), _LOSS_EXAMPLES)))
    return trl.SFTTrainer(args=arguments, train_dataset=dataset, eval_dataset=first, **parts)


def trainable(
    language_model: TransformersLM, settings: AdapterSettings, start_from: str | Path | None = None
) -> Any:
    """Wrap the language model's weights as a peft model; a new adapter does not change its output.

    Frozen weights are shared with the language model if they are float32, and copied otherwise. A
    new adapter is drawn from torch's global generator. Unknown targets or bases: `TuningError`.
    """
    import torch

    peft = optional("peft", RewardError)
    # Detached tensors share memory and version counter, so writes would be detected in both.
    own = language_model.model
    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in own.parameters()
    }
    shared |= {id(b): b for b in own.buffers()}
    model: Any = copy.deepcopy(own, shared).to(torch.float32)
    if start_from is not None:
        check_base(start_from, language_model)
        with quiet():
            return peft.PeftModel.from_pretrained(model, str(start_from), is_trainable=True)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    try:
        with quiet():
            return peft.get_peft_model(model, config)
    except ValueError as error:
        modules = model.named_modules()
        linear = {n.rpartition(".")[2] for n, m in modules if isinstance(m, torch.nn.Linear)}
        raise TuningError(
            f"targets: expected names among {sorted(linear)}, the linear layers of "
            f"{language_model.name!r}; got {list(settings.targets)} ({error})."
        ) from error


def train_adapter(
    language_model: TransformersLM,
    folder: str | Path,
    settings: Any,
    start_from: str | Path | None,
    described: Mapping[str, Any],
    make: Callable[..., Any],
) -> Any:
    """Train an adapter to the end, or resume from a checkpoint; return the trainer.

    `described` has everything that the adapter depends on besides the settings, as JSON values.
    `make` gets the arguments common to all trainers, a model and a tokenizer, and returns a TRL
    trainer. The trainer's `loss_before` is the loss on its `eval_dataset`, if any, before the first
    step.
    """
    from transformers import PrinterCallback

    ADAPTER.check_target(folder)
    for package in ("trl", "peft"):
        optional(package, RewardError)
    parts = {
        "settings": asdict(settings),
        "base": base_of(language_model),
        "start_from": None if start_from is None else adapter_digest(start_from),
    }
    checkpoints = training.checkpoints_of(Path(folder))
    resumed = training.claim(checkpoints, {**parts, **described})
    on_cpu = language_model.device.type == "cpu"
    common = {
        "output_dir": str(checkpoints),
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "report_to": "none",
        "disable_tqdm": True,
    }
    with own_randomness(settings.seed):
        model = trainable(language_model, settings, start_from)
        with quiet():
            trainer = make(common, model=model, processing_class=tokenizer_of(language_model))
            trainer.remove_callback(PrinterCallback)
            if trainer.eval_dataset is not None:
                trainer.loss_before = float(trainer.evaluate()["eval_loss"])
        training.run(trainer, checkpoints, resumed)
    return trainer


def tokenizer_of(language_model: TransformersLM) -> Any:
    """Copy the transformers tokenizer for a trainer, which modifies it."""
    tokenizer = copy.deepcopy(language_model._tokenizer.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write(
    folder: str | Path,
    model: Any,
    language_model: TransformersLM,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter atomically, with notes by file name, and remove its checkpoints."""
    for other in set(model.peft_config) - {"default"}:
        # The reference adapter, for the KL divergence.
        model.delete_adapter(other)
    with ADAPTER.writing(folder) as scratch:
        write_adapter(scratch, model, tokenizer_of(language_model), language_model.name)
        ADAPTER.write_config(scratch, base_of(language_model))
        for name, note in (notes or {}).items():
            write_json(scratch / name, note)
    shutil.rmtree(training.checkpoints_of(Path(folder)), ignore_errors=True)


def serve(
    language_model: TransformersLM, folder: str | Path, name: str | None = None
) -> TransformersLM:
    """Return a tuned language model that shares the base; a `TuningError` for another base.

    The default name is the base's name plus the start of the digest of the adapter's weights.
    """
    check_base(folder, language_model)
    with quiet():
        return language_model.with_adapter(folder, name or adapted_name(language_model, folder))


def adapted_name(language_model: TransformersLM, folder: str | Path) -> str:
    """Default name of a language model with an adapter; equal weights have equal names."""
    return f"{language_model.name}+{adapter_digest(folder)[:12]}"


def adapter_digest(folder: str | Path) -> str:
    """Digest of an adapter's weights; a `TuningError` if they cannot be read."""
    try:
        recover_folder(folder)
        return hashlib.sha256((Path(folder) / ADAPTER.weights).read_bytes()).hexdigest()
    except OSError as error:
        raise TuningError(
            f"{folder}: expected an adapter folder ({type(error).__name__}: {error}). Check "
            "the path."
        ) from error


def check_base(folder: str | Path, language_model: TransformersLM) -> None:
    """Raise a `TuningError` for an incomplete adapter or one with another base model."""
    with ADAPTER.reading(folder) as (trained_on, _):
        if not (Path(folder) / ADAPTER.weights).is_file():
            raise FileNotFoundError(f"there is no {ADAPTER.weights}")
        fingerprint, name = trained_on["fingerprint"], trained_on["name"]
    found = base_of(language_model)
    if fingerprint != found["fingerprint"]:
        raise TuningError(
            f"{folder}: expected an adapter for {language_model.name!r}, got one that was trained "
            f"on {name!r} ({fingerprint[:12]} there, {found['fingerprint'][:12]} here). Load that "
            "model, or fine-tune this one."
        )


def base_of(language_model: TransformersLM) -> dict[str, str]:
    """Name and fingerprint of a language model.

    The fingerprint covers the architecture, the weights' names and shapes, and values of each as
    bfloat16. It is the same for float32, bfloat16 and int8 (float16 can differ).
    """
    import torch

    model = language_model.model
    sums = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.named_parameters()):
        sums.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        probes = flat[:: max(1, len(flat) // _PROBES)].to(torch.bfloat16)
        sums.update(probes.view(torch.int16).cpu().numpy().tobytes())
    return {"name": language_model.name, "fingerprint": sums.hexdigest()}
