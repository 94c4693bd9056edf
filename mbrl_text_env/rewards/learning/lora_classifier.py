"""A classifier whose base and LoRA adapter are kept apart: loading, scoring, writing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import check_complete
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward, LoadedClassifier
from mbrl_text_env.rewards.learning.features import EMBEDDED
from mbrl_text_env.types import Prompt

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
# Modules on top of a model that a checkpoint may lack; they are trained as a whole.
_HEADS = ("score", "classifier", "pooler")
# What a final folder holds; nothing of it is executed when it is read.
_SAFE = (".json", ".jinja", ".model", ".safetensors", ".txt")


class AdapterReward(ClassifierReward):
    """A classifier whose base and adapter are kept apart; `LearnedReward` reads its folder.

    The adapter, which is in the folder with the tokenizer, is merged into the base's weights when
    it is loaded.
    """

    def __init__(self, folder: str | Path, base: str, max_length: int, name: str) -> None:
        super().__init__(folder, max_length=max_length, name=name)
        self.base = base

    def token_ids(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as they are scored: int[B][T]."""
        return [encoding.ids for encoding in self._encode(prompts, responses)]

    def _load(self) -> LoadedClassifier:
        return self._ready(*self._read(self._adapted, "LoRA-tuned classification"))

    def _ready(self, model: Any, tokenizer: Any) -> LoadedClassifier:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.text_format = "article" if tokenizer.chat_template is None else "chat"
        return super()._ready(model, tokenizer)

    def _adapted(self, folder: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The base with the adapter merged in, and the weights that neither of them has."""
        import torch

        peft = optional("peft", RewardError)
        # Heads and adapters start random, before what was tuned takes their place.
        with quiet(), torch.random.fork_rng():
            model, missing = _classifier(self.base, dtype=options["dtype"])
            adapted = peft.PeftModel.from_pretrained(model, folder, torch_device="cpu")
        tuned = set(adapted.peft_config["default"].modules_to_save or ())
        left = [key for key in missing if not tuned & set(key.split("."))]
        return adapted.merge_and_unload(), {"missing_keys": left}


def read_adapter(folder: Path, config: Mapping[str, Any]) -> AdapterReward:
    """The scorer of a folder that `fit_lora` wrote."""
    from safetensors import safe_open

    for file in (_ADAPTER, _ADAPTER_CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {file}")
    with safe_open(folder / _ADAPTER, "numpy") as weights:
        if not list(weights.keys()):
            raise ValueError(f"{_ADAPTER} is empty")
    return AdapterReward(folder, config["base"], config["max_length"], config["name"])


def load_base(base: str, max_length: int, name: str) -> Base:
    """The base as a classifier, with its tokenizer and the encoding that will score later."""
    from transformers import AutoTokenizer

    model, missing = _classifier(base)
    tokenizer = _from_base(AutoTokenizer, base)
    check_complete(model, tokenizer, [], base, "sequence-classification", name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoder = AdapterReward("", base, max_length, name)
    encoder._loaded = encoder._ready(model, tokenizer)
    heads = {_head_of(key, model) for key in missing}
    return Base(model, tokenizer, encoder, sorted(heads))


class Base(NamedTuple):
    """A model to tune; `heads` are its modules that start random."""

    model: Any
    tokenizer: Any
    encoder: AdapterReward
    heads: list[str]


def _classifier(base: str, dtype: Any = None) -> tuple[Any, list[str]]:
    """A checkpoint with one logit, and the weights that it lacks."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with quiet():
        model, info = _from_base(
            AutoModelForSequenceClassification,
            base,
            num_labels=1,
            dtype=dtype or torch.float32,
            output_loading_info=True,
        )
    return model, sorted(info["missing_keys"])


def _from_base(factory: Any, base: str, **options: Any) -> Any:
    from mbrl_text_env.language_models.registry import embedded_folder

    try:
        path = str(embedded_folder()) if base == EMBEDDED else base
        return factory.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RewardError(
            "Expected the base to be a transformers checkpoint with a tokenizer: a folder, a name "
            f"on the Hugging Face Hub, or {EMBEDDED!r}; got {base!r} ({type(error).__name__}: "
            f"{reason}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error


def _head_of(key: str, model: Any) -> str:
    """The head that a missing weight belongs to; one of none is of another architecture."""
    head = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    if head not in _HEADS:
        raise RewardError(
            "Expected the base to have trained weights for all but its head, but it lacks "
            f"{key!r}; its config names {model.config.architectures}. Choose another base."
        )
    return head


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
