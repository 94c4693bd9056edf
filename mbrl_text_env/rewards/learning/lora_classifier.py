"""Classifiers that are tuned with LoRA through TRL's `RewardTrainer`."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.fitting.report import split_by_group
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import check_complete
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.learning.features import EMBEDDED
from mbrl_text_env.rewards.learning.learned import (
    FOLDER,
    Fitted,
    LearnedReward,
    RewardData,
    RewardFitError,
)
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.runs import claim_checkpoints, own_randomness, writing

# Modules on top of a model that a checkpoint may lack; they are trained as a whole.
_HEADS = ("score", "classifier", "pooler")
# What a folder holds; nothing of it is executed when it is read.
_SAFE = (".json", ".jinja", ".model", ".safetensors", ".txt")


@dataclass(frozen=True)
class LoraSettings:
    """How a classifier is tuned.

    Args:
        base: A sequence-classification or causal checkpoint: name on the Hub or folder;
            `"embedded"` is the package's SmolLM2. A head that the checkpoint lacks starts random.
        r: Rank of the adapters; their scale is `alpha / r`.
        targets: Names of the modules that get adapters; None for all linear layers.
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
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    learning_rate: float = 1e-4
    max_length: int = 512
    save_steps: int = 50
    seed: int = 0
    use_margin: bool = False

    def __post_init__(self) -> None:
        numbers = {n: v for n, v in vars(self).items() if n not in ("seed", "use_margin")}
        for name, value in numbers.items():
            if isinstance(value, int | float) and not value > 0:
                raise RewardFitError(f"{name}: expected more than 0, got {value!r}.")


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
    it is removed at the end. Keep checkpoints of others out of it. The final folder has safetensors
    and JSON alone: the whole classifier, with the adapter merged into the base, and its tokenizer.

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
    target, name = Path(folder), name or f"learned({data_name})"
    FOLDER.check_target(target)
    optional("peft", RewardError), optional("trl", RewardError)
    data = RewardData.of_pairs(pairs)
    test = split_by_group(data.groups, held_out, settings.seed)
    fitted_on = list(compress(pairs, ~test))
    if settings.use_margin and any(pair.margin is None for pair in fitted_on):
        raise RewardFitError("use_margin=True: expected a margin on every pair, got some without.")
    checkpoints = target.with_name(f"{target.name}-checkpoints")
    rows = [[pair.prompt.text, pair.chosen, pair.rejected, pair.margin] for pair in fitted_on]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    with writing(checkpoints, RewardFitError):
        ours = {**asdict(settings), "pairs": digest}
        resumed = claim_checkpoints(checkpoints, ours, RewardFitError)
    with quiet(), own_randomness(settings.seed):
        base, heads = _load_base(settings, name)
        trainer = _trainer(base, heads, settings, fitted_on, checkpoints)
        trainer.train(resume_from_checkpoint=resumed)
    with FOLDER.writing(target) as scratch:
        # One file, which is checked when the folder is read.
        trainer.model.merge_and_unload().save_pretrained(scratch, max_shard_size="1TB")
        trainer.processing_class.save_pretrained(scratch)
        # What is measured is what was written.
        scorer = replace(base, model=scratch)
        told = scorer.score(data.prompts, data.responses)
        facts = {"objective": "bradley-terry", "model": "lora", "data": data_name}
        chosen = {**asdict(settings), "steps": int(trainer.state.global_step)}
        report = data.report(told, test, seed=settings.seed, chosen=chosen, **facts)
        kept = {"text_format": scorer.text_format, "max_length": settings.max_length}
        config = Fitted(name, scorer, report).described("lora", classifier=kept)
        FOLDER.write_config(scratch, config)
    shutil.rmtree(checkpoints)
    return LearnedReward(target)


def _load_base(settings: LoraSettings, name: str) -> tuple[ClassifierReward, list[str]]:
    """The base, which tokenizes as it will score, and the modules of it that start random."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from mbrl_text_env.language_models.registry import embedded_folder

    base = settings.base
    path = str(embedded_folder()) if base == EMBEDDED else base
    own = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **own)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, output_loading_info=True, **own
        )
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RewardError(
            "Expected the base to be a transformers checkpoint with a tokenizer: a folder, a name "
            f"on the Hugging Face Hub, or {EMBEDDED!r}; got {base!r} ({type(error).__name__}: "
            f"{reason}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error
    check_complete(model, tokenizer, [], base, "sequence-classification", name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    encoder = ClassifierReward(
        path,
        text_format="article" if tokenizer.chat_template is None else "chat",
        max_length=settings.max_length,
        name=name,
    )
    encoder._loaded = encoder._ready(model, tokenizer)
    prefix = f"{model.base_model_prefix}."
    heads = {key.removeprefix(prefix).partition(".")[0]: key for key in info["missing_keys"]}
    for head, key in heads.items():
        if head not in _HEADS:
            raise RewardError(
                "Expected the base to have trained weights for all but its head, but it lacks "
                f"{key!r}; its config names {model.config.architectures}. Choose another base."
            )
    return encoder, sorted(heads)


def _trainer(
    base: ClassifierReward,
    heads: list[str],
    settings: LoraSettings,
    pairs: Sequence[PreferencePair],
    checkpoints: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    peft, trl = optional("peft", RewardError), optional("trl", RewardError)
    prompts = [pair.prompt for pair in pairs]
    columns: dict[str, list[Any]] = {
        f"{which}_ids": [
            text.ids for text in base._encode(prompts, [getattr(pair, which) for pair in pairs])
        ]
        for which in ("chosen", "rejected")
    }
    if settings.use_margin:
        columns["margin"] = [pair.margin for pair in pairs]
    adapter = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules="all-linear" if settings.targets is None else list(settings.targets),
        modules_to_save=heads or None,
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
        model=base._loaded.model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=base._loaded.tokenizer,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def write_adapter(folder: Path, model: Any, tokenizer: Any, base: str) -> None:
    """Write adapter, tuned heads and tokenizer, and nothing that is executed when it is read."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix not in _SAFE:
            path.unlink()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of things that are meant, such as heads that start random."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # TRL sets arguments that transformers is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
