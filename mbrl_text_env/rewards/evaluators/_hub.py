"""Helpers of the evaluators: loading from the Hub or a folder, batches, padding and FLOPs.

Code in a model's repository is never run. It is an error if weights are missing, which transformers
would initialise randomly.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.language_models.hf_tokenizer import plain_text
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.types import FloatArray, Message, Prompt, check_positive

if TYPE_CHECKING:
    import torch


class Evaluator(RewardModel):
    """Base class of rewards with a neural network, which is loaded at first use."""

    num_truncated = 0
    """The number of texts truncated so far."""
    cut = "text(s) to {} tokens, and the rest of each text is ignored"
    """The part of the warning that describes the truncation."""
    counts: ClassVar[tuple[str, ...]] = ("max_length",)
    """The arguments that must be at least 1."""
    _loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Weights are not pickled; a copy loads them again at first use.
        return {**self.__dict__, "_loaded": None}

    @abstractmethod
    def _load(self) -> Any: ...

    def _model(self) -> Any:
        if self._loaded is None:
            check_positive(**{name: getattr(self, name) for name in self.counts})
            self._loaded = self._load()
        return self._loaded

    def _note_truncated(self, count: int, limit: int) -> None:
        message = (
            f"cut {count} {self.cut.format(limit)}. Raise max_length if the model's context allows "
            "it, or shorten the prompts and responses"
        )
        self._note("num_truncated", count, message)

    def _note(self, counter: str, count: int, message: str) -> None:
        """Count the problematic texts, and warn the first time."""
        before = getattr(self, counter)
        if count and not before:
            message = f"Reward model {self.name!r} {message}. `{counter}` counts all such cases."
            warnings.warn(message, stacklevel=4)
        setattr(self, counter, before + count)


@dataclass(eq=False, repr=False)
class HubReward(Evaluator):
    """Base class of rewards with a transformers model from the Hub or a folder.

    Args:
        model: Name on the Hub, or folder with a model and its tokenizer.
        batch_size: Maximum number of responses per forward pass.
        batch_tokens: Maximum number of tokens per forward pass, padding included.
        max_length: Maximum number of tokens per text; the model's own limit can be lower.
        device: By default `"cuda"` if available, otherwise `"cpu"`.
        dtype: By default float32 on CPU, otherwise bfloat16.
        name: Name in reports; by default the last part of the model's name or folder.
        revision: Branch, tag or commit on the Hub.
    """

    model: str | Path
    _: KW_ONLY
    batch_size: int = 16
    batch_tokens: int = 8192
    max_length: int = 512
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    name: str = ""
    revision: str | None = None

    counts = ("batch_size", "batch_tokens", "max_length")

    def __post_init__(self) -> None:
        self.model = str(self.model)
        self.name = self.name or Path(self.model).name

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations per response, see `forward_flops`."""
        if not responses:
            return np.zeros(0)
        lengths = [len(text.ids) for text in self._encode(prompts, responses)]
        return forward_flops(self._model().model, lengths)

    def flops_bound(self) -> float:
        """Return the upper bound for one response: the FLOPs of a text of maximum length."""
        loaded = self._model()
        return float(forward_flops(loaded.model, [loaded.max_length])[0])

    @abstractmethod
    def _encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Any]:
        """Return an object with `ids` (at most the model's limit) and `truncated` for each text."""

    @abstractmethod
    def _forward(self, texts: Sequence[Any]) -> Sequence[Any]:
        """Return the output for each text, from one forward pass."""

    def _outputs(self, texts: Sequence[Any], rows: int) -> list[Any]:
        self._check_tokens(texts)
        self._note_truncated(sum(text.truncated for text in texts), self._model().max_length)
        found: dict[int, Any] = {}
        for part in batches([len(text.ids) for text in texts], rows, self.batch_tokens):
            found.update(zip(part, self._forward([texts[i] for i in part]), strict=True))
        return [found[i] for i in range(len(texts))]

    def _check_tokens(self, texts: Sequence[Any]) -> None:
        """Raise `RewardError` for tokens without an embedding."""
        loaded = self._model()
        rows = loaded.model.get_input_embeddings().num_embeddings
        unknown = next((token for text in texts for token in text.ids if token >= rows), None)
        if unknown is not None:
            token = loaded.tokenizer.convert_ids_to_tokens(unknown)
            raise RewardError(
                f"Reward model {self.name!r}: a text has the token {unknown} ({token!r}), but the "
                f"model has {rows} embeddings. Use its own tokenizer, or resize the embeddings."
            )

    def _read(self, factory: str | Callable[..., Any], kind: str) -> tuple[Any, Any]:
        import torch
        import transformers

        source = str(self.model)
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        options: dict[str, Any] = {"revision": self.revision} if self.revision else {}
        options["trust_remote_code"] = False
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            load: Any = factory
            if isinstance(factory, str):
                load = getattr(transformers, factory).from_pretrained
            model, report = load(source, dtype=dtype, output_loading_info=True, **options)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise RewardError(
                f"Reward model {self.name!r}: expected the folder of a transformers {kind} model "
                "with its tokenizer, or the name of a model that is on the Hugging Face Hub or "
                f"already downloaded, got {source!r} ({type(error).__name__}: {reason}). Check the "
                "spelling, the network and HF_HUB_OFFLINE."
            ) from error
        check_complete(model, tokenizer, report["missing_keys"], source, kind, self.name)
        return model.to(device).eval(), tokenizer


def check_complete(
    model: Any, tokenizer: Any, missing_keys: Iterable[str], source: str, kind: str, name: str
) -> None:
    """Raise `RewardError` if tokenizer files or weights are missing."""
    vocab_size = model.config.get_text_config().vocab_size
    # Without files, transformers creates a tokenizer that has only special tokens.
    if len(tokenizer) * 10 < vocab_size:
        raise RewardError(
            f"Reward model {name!r}: expected {source!r} to contain a tokenizer for the model's "
            f"{vocab_size} tokens, got one with {len(tokenizer)} tokens. Save the right tokenizer "
            "in the same folder with `tokenizer.save_pretrained(folder)`."
        )
    # transformers initialises missing weights randomly and only logs it.
    if missing_keys:
        raise RewardError(
            f"Reward model {name!r}: {source!r} has no trained weights for "
            f"{', '.join(sorted(missing_keys))}, so its scores would be random. Choose a trained "
            f"{kind} model; the config of this one names {model.config.architectures}."
        )


def input_limit(model: Any, tokenizer: Any, wanted: int) -> int:
    """Return the maximum length of a text: `wanted`, or less if model or tokenizer allow less."""
    import torch

    config = model.config.get_text_config()
    limits = [wanted, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    for module_name, module in model.named_modules():
        # RoBERTa's positions start after the padding token's id, so the first are not used.
        if module_name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - taken)
    # Some configs use -1 for "no limit".
    return min(limit for limit in limits if limit is not None and limit > 0)


def class_index(config: Any, label: str | int | None) -> tuple[list[str], int | None]:
    """Return the names of a classifier's classes, and the index of the class `label` (or None)."""
    labels = [config.id2label[i] for i in range(config.num_labels)]
    index = labels.index(label) if label in labels else label
    return labels, index if isinstance(index, int) and 0 <= index < len(labels) else None


def batches(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of texts of similar length, the shortest first."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) == rows or (len(part) + 1) * lengths[i] > tokens):
            yield part
            part = []
        part.append(i)
    yield part


def padded(rows: Sequence[Sequence[int]], value: int, device: Any) -> tuple[Any, Any]:
    """Return ids padded on the right, and their attention mask, both int64[B, T]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True, padding_value=value).to(device), mask.to(device)


def forward_flops(model: Any, tokens: Sequence[int]) -> FloatArray:
    """Return float64[B], the FLOPs of a forward pass over texts of `tokens` tokens, unpadded.

    2 x parameters (without embedding tables) x tokens + 4 x layers x width x tokens^2.
    """
    import torch

    config = model.config.get_text_config()
    modules = [m for m in model.modules() if not isinstance(m, torch.nn.Embedding)]
    parameters = sum(p.numel() for m in modules for p in m.parameters(recurse=False))
    counts = np.asarray(tokens, dtype=np.float64)
    attention = 4.0 * config.num_hidden_layers * config.hidden_size
    return np.asarray(2.0 * parameters * counts + attention * counts**2)


def chat_messages(prompt: Prompt, is_special: Callable[[str], bool]) -> list[dict[str, str]]:
    """Return a prompt's messages for a chat template, with special tokens made plain text."""
    content = prompt.content
    messages = (Message("user", content),) if isinstance(content, str) else content
    return [{"role": m.role, "content": plain_text(m.content, is_special)} for m in messages]


def language_model_of(source: LanguageModel | str | Path | None, name: str) -> LanguageModel:
    """Return a language model unchanged, load it by name or folder, or use the embedded one."""
    if source is None:
        from mbrl_text_env.language_models.registry import embedded

        return embedded()
    if isinstance(source, str | Path):
        from mbrl_text_env.language_models.transformers_lm import TransformersLM

        try:
            return TransformersLM(source)
        except ValueError as error:
            raise RewardError(f"Reward model {name!r}: {error}") from error
    if not isinstance(source, LanguageModel):
        raise RewardError(
            f"Reward model {name!r}: expected a language model, its name on the Hugging Face Hub, "
            f"its folder, or None for the embedded one, got {type(source).__name__}."
        )
    return source
