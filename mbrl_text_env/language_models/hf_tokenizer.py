"""Tokenizers of transformers: text to token ids, and when a response ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from mbrl_text_env.language_models.base import (
    PromptEncodingError,
    PromptTooLongError,
    UnknownTokenError,
)
from mbrl_text_env.language_models.content import ContentEncoder
from mbrl_text_env.runs import digest
from mbrl_text_env.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelLoadError(ValueError):
    """A folder or Hub name from which no model could be loaded."""


class HFTokenizer:
    """A transformers tokenizer, with what it takes to know when a response ends.

    Args:
        source: Name on the Hub, folder, or a loaded transformers tokenizer.
        stop_token_ids: Ids that end a response; by default the end-of-sequence ids of the
            tokenizer and of the model's generation config, or of its config where it has none.
        context_length: Most tokens of prompt and response together; by default the model config's.

    Raises:
        ModelLoadError: Nothing could be loaded from `source`.
    """

    def __init__(
        self,
        source: str | Path | PreTrainedTokenizerBase,
        stop_token_ids: Iterable[int] | None = None,
        context_length: int | None = None,
    ) -> None:
        named = isinstance(source, (str, Path))
        loaded: Any = source
        self.tokenizer = load(AutoTokenizer, source) if named else loaded
        if named and not self.tokenizer("text", add_special_tokens=False)["input_ids"]:
            # transformers makes an empty one where the files are missing.
            raise ModelLoadError(
                f"{str(source)!r} has no tokenizer files. Save the model's tokenizer there, or "
                "pass it as `tokenizer`."
            )
        config = _load_optional(AutoConfig, source) if named else None
        text_config = config.get_text_config() if config is not None else None
        self._content = ContentEncoder(self.tokenizer)
        # Where the model has fewer rows than the tokenizer has tokens, it cannot read the rest.
        self.vocab_size: int = getattr(text_config, "vocab_size", None) or len(self.tokenizer)
        generation = _load_optional(GenerationConfig, source) if named else None
        self.stop_token_ids = (
            frozenset(stop_token_ids)
            if stop_token_ids is not None
            else stop_ids(self.tokenizer.eos_token_id, generation or text_config)
        )
        self.context_length: int = context_length or context_limit(text_config, self.tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HFTokenizer:
        # Read-only. Gymnasium deep-copies the arguments of an environment whenever its spec is
        # read through a wrapper.
        return self

    def identity(self) -> dict[str, Any]:
        """What tells this tokenizer from others: how it encodes, and where responses end."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        known: dict[str, Any] = {"vocab": self.tokenizer.get_vocab()}
        if backend is not None:
            # Padding and truncation are set anew by each call.
            known = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
        described = [known, self.tokenizer.chat_template]
        return {
            "content": digest(json.dumps(described, sort_keys=True).encode()),
            "stop_token_ids": sorted(self.stop_token_ids),
            "context_length": self.context_length,
        }

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: chat messages through the chat template, plain text as it is.

        Contents are encoded as text: a control token that is written out in one, such as
        `<|im_end|>`, is read as its characters. The template's own are tokens. Plain text follows
        what the tokenizer puts before every text (a token for its beginning), and nothing behind
        it, since the response goes on from there.

        Raises:
            PromptTooLongError: It leaves no room for a response.
            UnknownTokenError: It has a token that the model does not know.
            ValueError: It is a chat, and the tokenizer has no chat template, or one that refuses
                it (for its roles, or their order).
        """
        if isinstance(prompt.content, str):
            ids = [*self._content.opening, *self._content.text(prompt.content)]
        else:
            ids = self._chat(prompt, prompt.content)
        if not ids:
            raise PromptEncodingError(
                f"Prompt {prompt.id!r} has no tokens: {prompt.text!r}. Give it text."
            )
        check_room(prompt, len(ids), self.context_length)
        check_known(prompt, ids, self.vocab_size, self)
        return tuple(ids)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text alone: control tokens that are written out in it are characters."""
        return self._content.text(text)

    def _chat(self, prompt: Prompt, messages: Sequence[Message]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptEncodingError(
                f"Prompt {prompt.id!r} is a chat, but the tokenizer has no chat template, as base "
                "models have none. Load prompts as plain text (chat=False; --plain-prompts on the "
                "command line), or use an instruction-tuned model."
            )
        try:
            return self._content.chat(messages)
        # Templates raise errors of jinja2, and whatever their expressions do.
        except Exception as error:
            raise PromptEncodingError(
                f"Prompt {prompt.id!r}: the tokenizer's chat template refuses its messages, whose "
                f"roles are {[message.role for message in messages]} ({error}). Change them to "
                "what the template takes: many take a system message only as the first or not at "
                "all (put its text into the user's), and users and assistants in turns, the user "
                "first. Or load prompts as plain text (chat=False)."
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load(factory: Any, source: Any, **options: Any) -> Any:
    """What a class of transformers loads from a folder or Hub name.

    Raises:
        ModelLoadError: It could not.
    """
    try:
        return factory.from_pretrained(str(source), **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"Expected the folder of a transformers causal language model with its tokenizer, or a "
            f"name on the Hugging Face Hub that is reachable or already downloaded; got {source!r} "
            f"({type(error).__name__}: {reason}). Check the spelling, the network, or "
            "HF_HUB_OFFLINE; `language_models.embedded()` needs no network."
        ) from error


def _load_optional(factory: Any, source: Any) -> Any:
    """A config that a folder with a tokenizer alone does not have."""
    try:
        return factory.from_pretrained(str(source))
    except (OSError, ValueError):
        return None


def check_room(prompt: Prompt, length: int, context_length: int) -> None:
    """Refuse a prompt that leaves no room for a response.

    Raises:
        PromptTooLongError: It has as many tokens as the context, or more.
    """
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {prompt.id!r} has {length} tokens, but the model's context holds "
            f"{context_length} tokens of prompt and response together. Shorten it, or use a model "
            "with a longer context."
        )


def check_known(
    prompt: Prompt, ids: Sequence[int], vocab_size: int, tokenizer: HFTokenizer
) -> None:
    """Refuse tokens for which the model has no row among its embeddings.

    Raises:
        UnknownTokenError: The tokenizer knows more tokens than the model, and the prompt has one.
    """
    unknown = next((token for token in ids if token >= vocab_size), None)
    if unknown is not None:
        raise UnknownTokenError(
            f"Prompt {prompt.id!r} has the token {unknown} "
            f"({tokenizer.tokenizer.convert_ids_to_tokens(unknown)!r}), but the model knows the "
            f"tokens 0 to {vocab_size - 1} alone. Use the model's own tokenizer, resize the "
            "model's embeddings to it, or leave that token out of the prompt."
        )


def stop_ids(eos_token_id: int | None, config: Any) -> frozenset[int]:
    """A tokenizer's end-of-sequence id and those of a generation or model config."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [eos_token_id, *listed] if i is not None)


def context_limit(config: Any, tokenizer: Any) -> int:
    """Most tokens of prompt and response together, as far as config and tokenizer know."""
    # Tokenizers without a limit report a huge number.
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and limit < 10**9]
    return min(known) if known else 2**31
