"""What the evaluators share: loading from the Hub or a folder, batches, padding, and FLOPs.

Code that comes with a model is never run. Weights that transformers would make up, because the
files lack them, are an error.
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
    """What rewards that read texts with a network share: it is loaded when it is first used."""

    num_truncated = 0
    """Texts that were cut so far."""
    cut = "text(s) to {} tokens, so the rest of them does not count"
    """What the warning says of texts that are too long."""
    counts: ClassVar[tuple[str, ...]] = ("max_length",)
    """Arguments that are at least 1."""
    _loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Weights are not pickled; a copy loads them again when it is first used.
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
            "it, or shorten prompts and responses"
        )
        self._note("num_truncated", count, message)

    def _note(self, counter: str, count: int, message: str) -> None:
        """Count what is not as it should be, and warn of the first time."""
        before = getattr(self, counter)
        if count and not before:
            message = f"Reward model {self.name!r} {message}. `{counter}` counts further ones."
            warnings.warn(message, stacklevel=4)
        setattr(self, counter, before + count)


@dataclass(eq=False, repr=False)
class HubReward(Evaluator):
    """A model of transformers from the Hub or a folder; see its subclasses.

    Args:
        model: Name on the Hub, or folder with a model and its tokenizer.
        batch_size: Most responses in one forward pass.
        batch_tokens: Most tokens in one, padding included, so that long texts go in small batches.
        max_length: Most tokens of a text; the model's input may allow fewer.
        device: By default `"cuda"` where there is one, otherwise `"cpu"`.
        dtype: By default float32 on a CPU and bfloat16 elsewhere.
        name: What reports call it; by default the last part of the model's name or folder.
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
        """Return float64[B], the floating-point operations of each response: `forward_flops`."""
        if not responses:
            return np.zeros(0)
        lengths = [len(text.ids) for text in self._encode(prompts, responses)]
        return forward_flops(self._model().model, lengths)

    def flops_bound(self) -> float:
        """The most that one response can take: a text that fills the model's input."""
        loaded = self._model()
        return float(forward_flops(loaded.model, [loaded.max_length])[0])

    @abstractmethod
    def _encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Any]:
        """Each text, cut to the model's input, as an object with `ids` and `truncated`."""

    @abstractmethod
    def _forward(self, texts: Sequence[Any]) -> Sequence[Any]:
        """The output for each text, from one forward pass."""

    def _outputs(self, texts: Sequence[Any], rows: int) -> list[Any]:
        self._check_tokens(texts)
        self._note_truncated(sum(text.truncated for text in texts), self._model().max_length)
        found: dict[int, Any] = {}
        for part in batches([len(text.ids) for text in texts], rows, self.batch_tokens):
            found.update(zip(part, self._forward([texts[i] for i in part]), strict=True))
        return [found[i] for i in range(len(texts))]

    def _check_tokens(self, texts: Sequence[Any]) -> None:
        """Refuse tokens for which the model has no row among its embeddings."""
        loaded = self._model()
        rows = loaded.model.get_input_embeddings().num_embeddings
        unknown = next((token for text in texts for token in text.ids if token >= rows), None)
        if unknown is not None:
            token = loaded.tokenizer.convert_ids_to_tokens(unknown)
            raise RewardError(
                f"Reward model {self.name!r}: a text has the token {unknown} ({token!r}), but the "
                f"model knows {rows}. Use its own tokenizer, or resize its embeddings."
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
                "with its tokenizer, or a name on the Hugging Face Hub that is reachable or "
                f"already downloaded; got {source!r} ({type(error).__name__}: {reason}). Check the "
                "spelling, the network and HF_HUB_OFFLINE."
            ) from error
        check_complete(model, tokenizer, report["missing_keys"], source, kind, self.name)
        return model.to(device).eval(), tokenizer


def check_complete(
    model: Any, tokenizer: Any, missing_keys: Iterable[str], source: str, kind: str, name: str
) -> None:
    """Refuse what transformers makes up for missing files and weights."""
    vocab_size = model.config.get_text_config().vocab_size
    # Where there are no files, it makes a tokenizer that knows special tokens alone.
    if len(tokenizer) * 10 < vocab_size:
        raise RewardError(
            f"Reward model {name!r}: expected {source!r} to hold a tokenizer for the model's "
            f"{vocab_size} tokens, got one of {len(tokenizer)}. Save the tokenizer there too, with "
            "`tokenizer.save_pretrained(folder)`."
        )
    # Missing weights are filled with random numbers, which is only logged.
    if missing_keys:
        raise RewardError(
            f"Reward model {name!r}: {source!r} has no trained weights for "
            f"{', '.join(sorted(missing_keys))}, so its scores would be random. Choose a trained "
            f"{kind} model; its config names {model.config.architectures}."
        )


def input_limit(model: Any, tokenizer: Any, wanted: int) -> int:
    """Most tokens of a text: `wanted`, or less where model or tokenizer take less."""
    import torch

    config = model.config.get_text_config()
    limits = [wanted, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    for module_name, module in model.named_modules():
        # RoBERTa counts positions from the padding token's id on, so some of them are not used.
        if module_name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - taken)
    # Some configs have -1 where they mean none.
    return min(limit for limit in limits if limit is not None and limit > 0)


def class_index(config: Any, label: str | int | None) -> tuple[list[str], int | None]:
    """The names of a classifier's classes, and the index of the one that `label` means."""
    labels = [config.id2label[i] for i in range(config.num_labels)]
    index = labels.index(label) if label in labels else label
    return labels, index if isinstance(index, int) and 0 <= index < len(labels) else None


def batches(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Indices of texts of similar length, the shortest first."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) == rows or (len(part) + 1) * lengths[i] > tokens):
            yield part
            part = []
        part.append(i)
    yield part


def padded(rows: Sequence[Sequence[int]], value: int, device: Any) -> tuple[Any, Any]:
    """Rows of ids as one tensor, padded on the right, and its mask: both int64[B, T]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True, padding_value=value).to(device), mask.to(device)


def forward_flops(model: Any, tokens: Sequence[int]) -> FloatArray:
    """Operations of reading texts of `tokens` tokens, float64[B]; padding is not counted.

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
    """A prompt's messages for a chat template, without special tokens in them."""
    content = prompt.content
    messages = (Message("user", content),) if isinstance(content, str) else content
    return [{"role": m.role, "content": plain_text(m.content, is_special)} for m in messages]


def language_model_of(source: LanguageModel | str | Path | None, name: str) -> LanguageModel:
    """A language model: as it is, loaded by name or folder, or for None the embedded one."""
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
            f"its folder, or None for the embedded one; got {type(source).__name__}."
        )
    return source
