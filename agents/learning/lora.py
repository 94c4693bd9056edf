"""LoRA adapters of the language models that agents use: made, written, checked and served.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; the defaults are
the article's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbrl_text_env.agents.learning.notes import write_json
from mbrl_text_env.agents.learning.training import (
    TuningError,
    check_above_zero,
    checkpoints_of,
    claim,
    refuse_other_folder,
    run,
    storage,
)
from mbrl_text_env.files import recover_folder, write_folder
from mbrl_text_env.rewards.learning.lora_classifier import quiet, required, write_adapter
from mbrl_text_env.runs import own_randomness

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM

BASE = "base.json"
"""The file of an adapter's folder that says which model it was trained on."""

_FORMAT = 1
# Values of each weight that its fingerprint is made of.
_PROBES = 1024


@dataclass(frozen=True)
class AdapterSettings:
    """The form of an adapter.

    Args:
        r: Rank of the adapters.
        alpha: Their scale is `alpha / r`.
        targets: Names of the modules that get adapters.
        dropout: Of the adapters' input, while they are trained.

    Raises:
        TuningError: A number is out of its range, or there are no targets.
    """

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero(self, "r", "alpha")
        if not 0 <= self.dropout < 1:
            raise TuningError(f"dropout: expected 0 or more and below 1, got {self.dropout!r}.")
        if isinstance(self.targets, str) or not self.targets:
            raise TuningError(
                f"targets: expected names of modules such as ('q_proj',), got {self.targets!r}."
            )
        # JSON gives a list back.
        object.__setattr__(self, "targets", tuple(self.targets))


def trainable(
    language_model: TransformersLM,
    settings: AdapterSettings,
    start_from: str | Path | None = None,
) -> Any:
    """A peft model of the language model's weights, for a trainer; a new adapter changes nothing.

    The frozen weights are the language model's own where these are float32 (also under int8
    products), else a float32 copy. The language model itself does not change.

    Args:
        language_model: Whose policy is tuned.
        settings: The adapter's form; an adapter to start from keeps its own.
        start_from: Folder of an adapter to go on from; None for a new one, which torch's global
            generator draws.

    Raises:
        TuningError: No module has the name of a target, or `start_from` is for another base.
        RewardError: `peft` is not installed.
    """
    import torch

    peft = required("peft")
    model = _shared_copy(language_model.model).to(torch.float32)
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
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        raise TuningError(
            f"targets: expected names among {sorted(linear)}, the linear layers of "
            f"{language_model.name!r}; got {list(settings.targets)} ({error})."
        ) from error


def _shared_copy(model: Any) -> Any:
    import torch

    # Detached tensors share memory and version counter, so a write would be noticed in both.
    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared)


def train_adapter(
    language_model: TransformersLM,
    folder: str | Path,
    settings: Any,
    start_from: str | Path | None,
    described: Mapping[str, Any],
    make: Callable[[Any, Path], Any],
) -> Any:
    """Train an adapter, or go on from a checkpoint, to the end; `keep` then writes its folder.

    Args:
        language_model: The base.
        folder: Where the adapter will be written; its checkpoints lie beside it.
        settings: An `AdapterSettings` with a `seed`.
        start_from: Folder of an adapter to go on from; None for a new one.
        described: What the adapter depends on beside these. JSON values.
        make: From a peft model and the folder of checkpoints to a trainer of transformers, which
            is returned.
    """
    check_target(Path(folder))
    for package in ("trl", "peft"):
        required(package)
    parts = {
        "settings": asdict(settings),
        "base": base_of(language_model),
        "start_from": adapter_digest(start_from),
    }
    checkpoints = checkpoints_of(Path(folder))
    resumed = claim(checkpoints, {**parts, **described})
    with own_randomness(settings.seed):
        model = trainable(language_model, settings, start_from)
        with quiet():
            trainer = make(model, checkpoints)
        run(trainer, checkpoints, resumed)
    return trainer


def keep(
    folder: str | Path, model: Any, language_model: TransformersLM, notes: Mapping[str, Any]
) -> None:
    """`write` an adapter at the end of its training, and remove the checkpoints."""
    target = Path(folder)
    with storage(target):
        write(target, model, language_model, notes)
    shutil.rmtree(checkpoints_of(target))


def tokenizer_of(language_model: TransformersLM) -> Any:
    """A copy of its transformers tokenizer, for trainers, which change theirs."""
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
    """Write an adapter's folder as a whole: safetensors, JSON, and the tokenizer.

    Args:
        folder: Takes the place of what is there.
        model: What `trainable` made.
        language_model: The model below it.
        notes: JSON values to write beside it, by the name of the file.
    """
    for other in set(model.peft_config) - {"default"}:
        # What trainers measure the divergence from.
        model.delete_adapter(other)
    with write_folder(folder) as scratch:
        write_adapter(scratch, model, tokenizer_of(language_model), language_model.name)
        write_json(scratch / BASE, {"format": _FORMAT, **base_of(language_model)})
        for name, note in (notes or {}).items():
            write_json(scratch / name, note)


def check_target(folder: Path) -> None:
    """Refuse (`TuningError`) to write over anything but an adapter."""
    refuse_other_folder(folder, BASE, "an adapter")


def serve(
    language_model: TransformersLM, folder: str | Path, name: str | None = None
) -> TransformersLM:
    """The language model with a tuned adapter; both can be used side by side.

    Args:
        language_model: The base that the adapter was trained on.
        folder: As `fine_tune`, `train_grpo` and `train_rloo` write it.
        name: What reports call it; by default the model's name and the beginning of the digest of
            the adapter's weights, so that a value model knows whose responses it was fitted on.

    Raises:
        TuningError: The folder holds no such adapter, or one for another base.

    Example:
        >>> fine_tune(lm, records, "tuned")  # doctest: +SKIP
        >>> policy = serve(lm, "tuned")  # doctest: +SKIP
    """
    check_base(folder, language_model)
    with quiet():
        return language_model.with_adapter(folder, name or adapted_name(language_model, folder))


def adapted_name(language_model: TransformersLM, folder: str | Path) -> str:
    """The default name of a language model with an adapter; the same for the same weights."""
    return f"{language_model.name}+{(adapter_digest(folder) or '')[:12]}"


def adapter_digest(folder: str | Path | None) -> str | None:
    """Tells one adapter's weights from another's; None for None. May raise `TuningError`."""
    if folder is None:
        return None
    path = Path(folder) / "adapter_model.safetensors"
    try:
        recover_folder(folder)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TuningError(
            f"{folder}: expected the folder of an adapter, with {path.name} "
            f"({type(error).__name__}: {error}). Check the path."
        ) from error


def check_base(folder: str | Path, language_model: TransformersLM) -> None:
    """Refuse an adapter that was trained on another base.

    Raises:
        TuningError: It was, or the folder holds no whole adapter.
    """
    path = Path(folder) / BASE
    try:
        recover_folder(folder)
        trained_on = json.loads(path.read_text(encoding="utf-8"))
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise FileNotFoundError("there is no adapter_model.safetensors")
        fingerprint, name = trained_on["fingerprint"], trained_on["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningError(
            f"{folder}: expected the folder of an adapter with a {BASE}, as it is written at the "
            f"end of tuning ({type(error).__name__}: {error}). Check the path, or tune anew. An "
            "adapter from elsewhere is served by `TransformersLM.with_adapter`."
        ) from error
    found = base_of(language_model)
    if fingerprint != found["fingerprint"]:
        raise TuningError(
            f"{folder}: expected an adapter for {language_model.name!r}, got one that was trained "
            f"on {name!r} ({fingerprint[:12]} there, {found['fingerprint'][:12]} here). Load that "
            "model, or tune this one."
        )


def base_of(language_model: TransformersLM) -> dict[str, str]:
    """Name and fingerprint of a language model.

    The fingerprint is of the architecture, of all weights' names and shapes, and of values from
    each as bfloat16: the same for float32, bfloat16 and int8 (float16 may have another).
    """
    import torch

    model = language_model.model
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        probes = flat[:: max(1, len(flat) // _PROBES)].to(torch.bfloat16)
        digest.update(probes.view(torch.int16).cpu().numpy().tobytes())
    return {"name": language_model.name, "fingerprint": digest.hexdigest()}
