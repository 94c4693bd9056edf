"""Tokenizers of transformers: text to token ids, and when a response ends.

What a text says is never read as a control token. A tokenizer that parses text finds its control
tokens wherever they are written: a prompt that quotes `<|im_end|>` could so end its own message and
begin another one, in another role.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mbrl_text_env.language_models.base import PromptEncodingError, UnknownTokenError, check_room
from mbrl_text_env.runs import digest
from mbrl_text_env.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Breaks a control token's text, so that any tokenizer reads it as ordinary text.
_ZERO_WIDTH_SPACE = "\u200b"
# Encloses what stands for other text; a private character.
_EDGE = "\uf8ff"


class ModelLoadError(ValueError):
    """A folder or Hub name from which no model could be loaded."""


class HFTokenizer:
    """A transformers tokenizer, with what it takes to know when a response ends.

    Args:
        source: Name on the Hub, folder, or a loaded transformers tokenizer.
        stop_token_ids: By default the end-of-sequence ids of the tokenizer and of the model's
            generation config, or of its config where it has none.
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
        self.tokenizer = load("AutoTokenizer", source) if named else loaded
        if named and not self.tokenizer("text", add_special_tokens=False)["input_ids"]:
            # transformers makes an empty one where the files are missing.
            raise ModelLoadError(
                f"{str(source)!r} has no tokenizer files. Save the model's tokenizer there, or "
                "pass it as `tokenizer`."
            )
        config = _load_optional("AutoConfig", source) if named else None
        text_config = config.get_text_config() if config is not None else None
        self._content = ContentEncoder(self.tokenizer)
        # Where the model has fewer rows than the tokenizer has tokens, it cannot read the rest.
        self.vocab_size: int = getattr(text_config, "vocab_size", None) or len(self.tokenizer)
        generation = _load_optional("GenerationConfig", source) if named else None
        known = _stop_ids(self.tokenizer.eos_token_id, generation or text_config)
        self.stop_token_ids = known if stop_token_ids is None else frozenset(stop_token_ids)
        self.context_length: int = context_length or _context_limit(text_config, self.tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HFTokenizer:
        # Read-only. Gymnasium deep-copies the arguments of an environment whenever its spec is
        # read through a wrapper.
        return self

    def with_model(self, model: Any) -> tuple[frozenset[int], int]:
        """Stop tokens and context length, as far as a loaded model knows them too."""
        limit = _context_limit(model.config.get_text_config(), self.tokenizer)
        stops = self.stop_token_ids | _stop_ids(None, model.generation_config)
        return stops, min(limit, self.context_length)

    def identity(self) -> dict[str, Any]:
        """What tells this tokenizer from others: how it encodes, and where responses end."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        known = backend.to_str() if backend else json.dumps({"vocab": self.tokenizer.get_vocab()})
        return {
            "content": _content_digest(known, json.dumps(self.tokenizer.chat_template)),
            "stop_token_ids": sorted(self.stop_token_ids),
            "context_length": self.context_length,
        }

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: chat messages through the chat template, plain text as it is.

        Plain text follows what the tokenizer puts before every text (a token for its beginning),
        and nothing is put behind it, since the response goes on from there.

        Raises:
            PromptTooLongError: It leaves no room for a response.
            UnknownTokenError: It has a token that the model does not know.
            PromptEncodingError: It is a chat, and the tokenizer has no chat template, or one that
                refuses it (for its roles, or their order).
        """
        if isinstance(prompt.content, str):
            ids = [*self._content.opening, *self.encode_text(prompt.content)]
        else:
            ids = self._chat(prompt, prompt.content)
        if not ids:
            raise PromptEncodingError(
                f"Prompt {prompt.id!r} has no tokens: {prompt.text!r}. Give it text."
            )
        self.check_prompt(prompt, ids, self.context_length, self.vocab_size)
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

    def check_prompt(
        self, prompt: Prompt, ids: Sequence[int], context_length: int, vocab_size: int
    ) -> None:
        """Refuse a prompt that leaves no room, or has a token for which the model has no row."""
        check_room(prompt, len(ids), context_length)
        unknown = next((token for token in ids if token >= vocab_size), None)
        if unknown is not None:
            raise UnknownTokenError(
                f"Prompt {prompt.id!r} has the token {unknown} "
                f"({self.tokenizer.convert_ids_to_tokens(unknown)!r}), but the model knows the "
                f"tokens 0 to {vocab_size - 1} alone. Use the model's own tokenizer, resize the "
                "model's embeddings to it, or leave that token out of the prompt."
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class Tokenized:
    """What language models with an `HFTokenizer` share; copies are the model itself."""

    _tokenizer: HFTokenizer
    vocab_size: int
    context_length: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Shared and read-only: environments and agents that are copied go on using this one.
        return self

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; see `HFTokenizer.encode_prompt`."""
        ids = self._tokenizer.encode_prompt(prompt)
        # The tokenizer alone may know less of the model's limits.
        self._tokenizer.check_prompt(prompt, ids, self.context_length, self.vocab_size)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode(token_ids)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text alone; see `HFTokenizer.encode_text`."""
        return self._tokenizer.encode_text(text)


def load(factory: str, source: Any, **options: Any) -> Any:
    """What a class of transformers loads from a folder or Hub name, or a ModelLoadError."""
    import transformers

    try:
        return getattr(transformers, factory).from_pretrained(str(source), **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"Expected the folder of a transformers causal language model with its tokenizer, or a "
            f"name on the Hugging Face Hub that is reachable or already downloaded; got {source!r} "
            f"({type(error).__name__}: {reason}). Check the spelling, the network, or "
            "HF_HUB_OFFLINE; `language_models.embedded()` needs no network."
        ) from error


# It takes half a second, and every command that can be resumed asks for it several times.
@functools.lru_cache(maxsize=4)
def _content_digest(tokenizer: str, chat_template: str) -> str:
    known = json.loads(tokenizer)
    # Padding and truncation are set anew by each call.
    known |= {key: None for key in ("padding", "truncation") if key in known}
    described = [known, json.loads(chat_template)]
    return digest(json.dumps(described, sort_keys=True).encode())


def _load_optional(factory: str, source: Any) -> Any:
    """A config that a folder with a tokenizer alone does not have."""
    import transformers

    try:
        return getattr(transformers, factory).from_pretrained(str(source))
    except (OSError, ValueError):
        return None


def _stop_ids(eos_token_id: int | None, config: Any) -> frozenset[int]:
    """A tokenizer's end-of-sequence id and those of a generation or model config."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [eos_token_id, *listed] if i is not None)


def _context_limit(config: Any, tokenizer: Any) -> int:
    """Most tokens of prompt and response together, as far as config and tokenizer know."""
    # Tokenizers without a limit report a huge number.
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=2**31)


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts of a tokenizer's special tokens, and of the added ones that its template writes.

    Some models mark turns, reasoning or results of tools with tokens that are not called special.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
    written = (t for t in added if added[t].special or (t.strip() and t in source))
    return tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *written]))


def control_test(tokenizer: Any, *others: str) -> Callable[[str], bool]:
    """A test for `plain_text`: whether a tokenizer finds control tokens, or `others`, in a text."""
    texts = control_texts(tokenizer)
    pattern = _pattern([*texts, *others])
    if not _finds_hidden(tokenizer, texts):
        return lambda text: pattern.search(text) is not None
    # Any text may have unknown words.
    control = {tokenizer.convert_tokens_to_ids(t) for t in texts if t != tokenizer.unk_token}
    return lambda text: (
        pattern.search(text) is not None or not control.isdisjoint(_ids(tokenizer, text))
    )


def plain_text(text: str, is_special: Callable[[str], bool]) -> str:
    """A text in which a tokenizer finds no control token, for tokenizers that cannot be told.

    A control token's text gets a zero-width space in its middle and is then read as ordinary
    characters; most texts come back as they are.

    Example:
        >>> plain_text("a<s>", lambda text: "<s>" in text) == "a<" + chr(0x200B) + "s>"
        True
    """
    if len(text) < 2 or not is_special(text):
        return text
    middle = len(text) // 2
    left, right = (plain_text(part, is_special) for part in (text[:middle], text[middle:]))
    return left + (_ZERO_WIDTH_SPACE if is_special(left + right) else "") + right


class ContentEncoder:
    """Encodes texts and chats with a transformers tokenizer, which is read at first use.

    The ids of contents without control tokens' texts are exactly those that the tokenizer and its
    `apply_chat_template` give. Where a text holds one, the template is rendered with something else
    in its place, so that the template's own control tokens can be told from it. Then the whole is
    encoded by a copy of the tokenizer that knows control tokens by other names: everything else
    (pre-tokenization, merges across the template's edges, white space) is the tokenizer's own.
    Tokenizers that are not made of the `tokenizers` library cannot be copied so: see `plain_text`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # The copy would forget that it reads special tokens as text.
        return {"tokenizer": self.tokenizer}

    def text(self, text: str) -> list[int]:
        """Token ids of a text, with nothing before or behind it."""
        if not self._careful and self._marks.pattern.search(text) is None:
            return _ids(self.tokenizer, text)
        if self._apart is None:
            return _ids(self.tokenizer, plain_text(text, self._is_control))
        return self._apart.encode(self._apart.plain(text))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat and of what begins the answer to it.

        Raises what the chat template does, and a ValueError where it leaves out a message.
        """
        kept_apart = self._careful or any(self._marks_in(m).meet(m.content) for m in messages)
        apart = self._apart if kept_apart else None
        # Nobody can write the key beforehand.
        key, pieces = str(secrets.randbits(64)), list[str]()

        def hold(piece: str) -> str:
            pieces.append(piece)
            return f"{_EDGE}{key}+{len(pieces) - 1}{_EDGE}"

        contents = [message.content for message in messages]
        if apart is not None:
            contents = [self._marks_in(m).replace(apart.plain(m.content), hold) for m in messages]
        elif self._careful:
            contents = [plain_text(content, self._is_control) for content in contents]
        rendered = self._rendered(messages, contents)
        self._check_complete(messages, contents, rendered)
        if apart is None:
            return _ids(self.tokenizer, rendered)
        held = rf"{_EDGE}{key}\+(\d+){_EDGE}"
        return apart.encode(re.sub(held, lambda m: pieces[int(m[1])], apart.renamed(rendered)))

    @functools.cached_property
    def opening(self) -> list[int]:
        """Control tokens that the tokenizer puts before every text."""
        inner, whole = _ids(self.tokenizer, "a"), list(self.tokenizer("a")["input_ids"])
        places = (i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return whole[: next(places, 0)]

    @functools.cached_property
    def _is_control(self) -> Callable[[str], bool]:
        return control_test(self.tokenizer)

    @functools.cached_property
    def _marks(self) -> _Marks:
        return _Marks(control_texts(self.tokenizer))

    @functools.cached_property
    def _turn_marks(self) -> _Marks:
        """Marks in an assistant's message, in which templates look for the marks of reasoning."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token.content) for token in added if token.special}
        try:
            turn = self._rendered([Message("user", "a")], ["a"])
        except Exception:
            # It takes no such chat.
            turn = ""
        return _Marks(t for t in self._marks.texts if t in special or t in turn)

    @functools.cached_property
    def _careful(self) -> bool:
        return _finds_hidden(self.tokenizer, self._marks.texts)

    @functools.cached_property
    def _apart(self) -> _Apart | None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        return _Apart(backend, self._marks, self.tokenizer.unk_token)

    def _marks_in(self, message: Message) -> _Marks:
        return self._turn_marks if message.role == "assistant" else self._marks

    def _check_complete(
        self, messages: Sequence[Message], contents: Sequence[str], rendered: str
    ) -> None:
        """Refuse a template that leaves a message out, as those do that do not know its role."""
        for i, (message, content) in enumerate(zip(messages, contents, strict=True)):
            if content.strip() in rendered:
                continue
            # It may be written in another way, as JSON or in part.
            probe = [_EDGE if k == i else other for k, other in enumerate(contents)]
            if _EDGE not in self._rendered(messages, probe):
                raise ValueError(
                    f"it leaves out message {i + 1}, whose role {message.role!r} it may not know"
                )

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        pairs = zip(messages, contents, strict=True)
        text: str = self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": content} for message, content in pairs],
            add_generation_prompt=True,
            tokenize=False,
        )
        return text


class _Marks:
    """The texts of control tokens, and how they are found."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self.pattern = _pattern(self.texts)
        self._starts = tuple({t[:k] for t in self.texts for k in range(1, len(t))})
        self._ends = tuple({t[k:] for t in self.texts for k in range(1, len(t))})

    def meet(self, content: str) -> bool:
        """Whether a content has a mark in it, or a part of one where it meets the template."""
        return self.pattern.search(content) is not None or self._edges(content) != (0, 0)

    def replace(self, content: str, hold: Callable[[str], str]) -> str:
        """The content with something else for each mark, and for parts of marks at its edges."""
        first, last = self._edges(content)
        bare = content.strip()
        before = content[: len(content) - len(content.lstrip())]
        behind = content[len(before) + len(bare) :]
        if len(bare) < first + last:
            return before + hold(bare) + behind
        middle = self.pattern.sub(lambda match: hold(match[0]), bare[first : len(bare) - last])
        start = hold(bare[:first]) if first else ""
        end = hold(bare[len(bare) - last :]) if last else ""
        return before + start + middle + end + behind

    def _edges(self, content: str) -> tuple[int, int]:
        """Characters at the start and at the end, white space left out, that are part of a mark."""
        bare = content.strip()
        return int(bare.startswith(self._ends)), int(bare.endswith(self._starts))


class _Apart:
    """A copy of a tokenizer that finds control tokens by other names alone."""

    def __init__(self, backend: Any, marks: _Marks, unknown: str | None) -> None:
        from tokenizers import AddedToken, Tokenizer

        key = str(secrets.randbits(64))
        data = json.loads(backend.to_str())
        found = [token for token in data["added_tokens"] if token["content"] in marks.texts]
        for token in found:
            token["special"] = True
        self._pattern = marks.pattern
        self._names = {t["content"]: f"{_EDGE}{key}-{i}{_EDGE}" for i, t in enumerate(found)}
        self._tokenizer = Tokenizer.from_str(json.dumps(data))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Special tokens are then encoded as any text; the new names are not special.
        self._tokenizer.encode_special_tokens = True
        flags = ("single_word", "lstrip", "rstrip")
        options = [{"normalized": False, **{flag: t[flag] for flag in flags}} for t in found]
        names = list(self._names.values())
        added = [AddedToken(name, **given) for name, given in zip(names, options, strict=True)]
        self._tokenizer.add_tokens(added)
        self._ids = {
            self._tokenizer.token_to_id(n): t["id"] for n, t in zip(names, found, strict=True)
        }
        # Any text may have unknown words.
        self._control = {t["id"] for t in found if t["content"] != unknown}

    def renamed(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._names.get(match[0], match[0]), text)

    def encode(self, text: str) -> list[int]:
        """Token ids, control tokens only where their new names are."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(token, token) for token in ids]

    def plain(self, text: str) -> str:
        """The text, changed only where a model of words or pieces has a control token itself."""
        return plain_text(text, lambda part: not self._control.isdisjoint(self.encode(part)))


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the first of the texts, and of those that begin at one place the longest."""
    wanted = sorted({text for text in texts if text}, key=len, reverse=True)
    # Without any, nothing is found.
    return re.compile("|".join(map(re.escape, wanted)) or r"(?!)")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _finds_hidden(tokenizer: Any, texts: Collection[str]) -> bool:
    """Whether control tokens may be found in texts that do not contain them as they are written.

    So it is where a text is normalized before, or a model of words or pieces has them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True
    tokens = tokenizer.added_tokens_decoder.values()
    if any(token.normalized and str(token.content) in texts for token in tokens):
        return True
    # BERT's words have no punctuation, which all marks have.
    kinds = type(backend.model).__name__, type(backend.pre_tokenizer).__name__
    return kinds != ("WordPiece", "BertPreTokenizer") and kinds[0] != "BPE"
