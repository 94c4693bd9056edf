"""Transformers tokenizers: encode text, and determine when a response ends.

Message contents are never read as control tokens. A tokenizer that parses text finds control tokens
anywhere in it. A prompt that quotes `<|im_end|>` could then end its own message and start another
one in another role.
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

# Splits a control token's text, so that any tokenizer reads it as ordinary text.
_ZERO_WIDTH_SPACE = "\u200b"
# Encloses placeholders for other text; a private-use character.
_EDGE = "\uf8ff"


class ModelLoadError(ValueError):
    """No model could be loaded from a folder or Hub name."""


class HFTokenizer:
    """A transformers tokenizer with its stop tokens and context length.

    Args:
        source: Hub name, folder, or a loaded transformers tokenizer.
        stop_token_ids: By default the end-of-sequence ids of the tokenizer and of the model's
            generation config, or of the model config if there is none.
        context_length: Maximum tokens of prompt and response; by default from the model config.

    Raises:
        ModelLoadError: `source` could not be loaded.
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
            # transformers creates an empty one if the files are missing.
            raise ModelLoadError(
                f"{str(source)!r} has no tokenizer files. Save the model's tokenizer there, or "
                "pass it as `tokenizer`."
            )
        config = _load_optional("AutoConfig", source) if named else None
        text_config = config.get_text_config() if config is not None else None
        self._content = ContentEncoder(self.tokenizer)
        # If the model has fewer rows than the tokenizer has tokens, it cannot read the others.
        self.vocab_size: int = getattr(text_config, "vocab_size", None) or len(self.tokenizer)
        generation = _load_optional("GenerationConfig", source) if named else None
        known = _stop_ids(self.tokenizer.eos_token_id, generation or text_config)
        self.stop_token_ids = known if stop_token_ids is None else frozenset(stop_token_ids)
        self.context_length: int = context_length or _context_limit(text_config, self.tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HFTokenizer:
        # Read-only. Gymnasium deep-copies an environment's arguments each time its spec is read
        # through a wrapper.
        return self

    def with_model(self, model: Any) -> tuple[frozenset[int], int]:
        """Stop tokens and context length, combined with those of a loaded model."""
        limit = _context_limit(model.config.get_text_config(), self.tokenizer)
        stops = self.stop_token_ids | _stop_ids(None, model.generation_config)
        return stops, min(limit, self.context_length)

    def identity(self) -> dict[str, Any]:
        """What distinguishes this tokenizer: its encoding, and its stop tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        known = backend.to_str() if backend else json.dumps({"vocab": self.tokenizer.get_vocab()})
        return {
            "content": _content_digest(known, json.dumps(self.tokenizer.chat_template)),
            "stop_token_ids": sorted(self.stop_token_ids),
            "context_length": self.context_length,
        }

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Encode a prompt: messages with the chat template, plain text without.

        Plain text gets the tokens that the tokenizer puts before every text (such as a start
        token), but none after it, because the response continues from there.

        Raises:
            PromptTooLongError: The prompt leaves no room for a response.
            UnknownTokenError: The prompt has a token that the model does not know.
            PromptEncodingError: The prompt is a chat, and the tokenizer has no chat template or
                its template rejects the messages (their roles, or their order).
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
        """Encode a text alone. Control tokens written in it are encoded as characters."""
        return self._content.text(text)

    def _chat(self, prompt: Prompt, messages: Sequence[Message]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptEncodingError(
                f"Prompt {prompt.id!r} is a chat, but the tokenizer has no chat template, as is "
                "usual for base models. Load prompts as plain text (chat=False; --plain-prompts on "
                "the command line), or use an instruction-tuned model."
            )
        try:
            return self._content.chat(messages)
        # Templates raise jinja2's errors, and any error of their expressions.
        except Exception as error:
            raise PromptEncodingError(
                f"Prompt {prompt.id!r}: the tokenizer's chat template rejects its messages, whose "
                f"roles are {[message.role for message in messages]} ({error}). Change them to "
                "what the template accepts: many accept a system message only first or not at "
                "all (put its text into the user's), and need user and assistant to alternate, "
                "user first. Or load prompts as plain text (chat=False)."
            ) from error

    def check_prompt(
        self, prompt: Prompt, ids: Sequence[int], context_length: int, vocab_size: int
    ) -> None:
        """Reject a prompt that leaves no room, or has a token outside the model's vocabulary."""
        check_room(prompt, len(ids), context_length)
        unknown = next((token for token in ids if token >= vocab_size), None)
        if unknown is not None:
            raise UnknownTokenError(
                f"Prompt {prompt.id!r} has the token {unknown} "
                f"({self.tokenizer.convert_ids_to_tokens(unknown)!r}), but the model only has "
                f"the tokens 0 to {vocab_size - 1}. Use the model's own tokenizer, resize the "
                "model's embeddings to it, or remove the token from the prompt."
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids, without special tokens."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class Tokenized:
    """Mixin for language models with an `HFTokenizer`. Copying returns the model itself."""

    _tokenizer: HFTokenizer
    vocab_size: int
    context_length: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Read-only: copies of environments and agents share this object.
        return self

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Encode a prompt; see `HFTokenizer.encode_prompt`."""
        ids = self._tokenizer.encode_prompt(prompt)
        # The tokenizer alone may not know all of the model's limits.
        self._tokenizer.check_prompt(prompt, ids, self.context_length, self.vocab_size)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def encode_text(self, text: str) -> list[int]:
        """Encode a text alone; see `HFTokenizer.encode_text`."""
        return self._tokenizer.encode_text(text)


def load(factory: str, source: Any, **options: Any) -> Any:
    """Load with a transformers class from a folder or Hub name, or raise a ModelLoadError."""
    import transformers

    try:
        return getattr(transformers, factory).from_pretrained(str(source), **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"Expected the folder of a transformers causal language model with its tokenizer, or a "
            f"Hugging Face Hub name that is reachable or already downloaded; got {source!r} "
            f"({type(error).__name__}: {reason}). Check the spelling, the network, or "
            "HF_HUB_OFFLINE; `language_models.embedded()` needs no network."
        ) from error


# Cached: it takes half a second, and every resumable command needs it several times.
@functools.lru_cache(maxsize=4)
def _content_digest(tokenizer: str, chat_template: str) -> str:
    known = json.loads(tokenizer)
    # Padding and truncation are set by each call.
    known |= {key: None for key in ("padding", "truncation") if key in known}
    described = [known, json.loads(chat_template)]
    return digest(json.dumps(described, sort_keys=True).encode())


def _load_optional(factory: str, source: Any) -> Any:
    """Load a config that a tokenizer-only folder does not have."""
    import transformers

    try:
        return getattr(transformers, factory).from_pretrained(str(source))
    except (OSError, ValueError):
        return None


def _stop_ids(eos_token_id: int | None, config: Any) -> frozenset[int]:
    """End-of-sequence ids of a tokenizer and of a generation or model config."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [eos_token_id, *listed] if i is not None)


def _context_limit(config: Any, tokenizer: Any) -> int:
    """Maximum tokens of prompt and response, from the config and the tokenizer."""
    # Tokenizers without a limit report a huge number.
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=2**31)


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """Texts of a tokenizer's special tokens, and of added tokens that its template writes.

    Some models mark turns, reasoning or tool results with tokens that are not declared special.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
    written = (t for t in added if added[t].special or (t.strip() and t in source))
    return tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *written]))


def control_test(tokenizer: Any, *others: str) -> Callable[[str], bool]:
    """Make a test for `plain_text`: whether a tokenizer finds control tokens or `others`."""
    texts = control_texts(tokenizer)
    pattern = _pattern([*texts, *others])
    if not _finds_hidden(tokenizer, texts):
        return lambda text: pattern.search(text) is not None
    # Any text can have unknown words.
    control = {tokenizer.convert_tokens_to_ids(t) for t in texts if t != tokenizer.unk_token}
    return lambda text: (
        pattern.search(text) is not None or not control.isdisjoint(_ids(tokenizer, text))
    )


def plain_text(text: str, is_special: Callable[[str], bool]) -> str:
    """Change a text so that no control token is found; for tokenizers without such an option.

    A zero-width space is inserted into each control token's text, which is then read as ordinary
    characters. Most texts are unchanged.

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
    """Encodes texts and chats with a transformers tokenizer, which is read on first use.

    Contents without the text of a control token get exactly the ids of the tokenizer and its
    `apply_chat_template`. If a text contains one, the template is rendered with a placeholder, to
    distinguish it from the template's own control tokens. A copy of the tokenizer with renamed
    control tokens then encodes the result; everything else (pre-tokenization, merges across the
    template's edges, white space) is the tokenizer's own. Tokenizers that are not from the
    `tokenizers` library cannot be copied this way: see `plain_text`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # A copy would lose the setting that special tokens are read as text.
        return {"tokenizer": self.tokenizer}

    def text(self, text: str) -> list[int]:
        """Encode a text, with no tokens before or after it."""
        if not self._careful and self._marks.pattern.search(text) is None:
            return _ids(self.tokenizer, text)
        if self._apart is None:
            return _ids(self.tokenizer, plain_text(text, self._is_control))
        return self._apart.encode(self._apart.plain(text))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode a chat and the generation prompt.

        Raises the chat template's errors, and a ValueError if the template omits a message.
        """
        kept_apart = self._careful or any(self._marks_in(m).meet(m.content) for m in messages)
        apart = self._apart if kept_apart else None
        # The key cannot be known in advance.
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
        """Marks in an assistant message, where templates look for marks of reasoning."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token.content) for token in added if token.special}
        try:
            turn = self._rendered([Message("user", "a")], ["a"])
        except Exception:
            # The template does not accept such a chat.
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
        """Raise a ValueError if the template omits a message, for example of an unknown role."""
        for i, (message, content) in enumerate(zip(messages, contents, strict=True)):
            if content.strip() in rendered:
                continue
            # The template may write it in another form, such as JSON, or partly.
            probe = [_EDGE if k == i else other for k, other in enumerate(contents)]
            if _EDGE not in self._rendered(messages, probe):
                raise ValueError(
                    f"it omits message {i + 1}, whose role {message.role!r} it may not know"
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
    """Finds the texts of control tokens."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self.pattern = _pattern(self.texts)
        self._starts = tuple({t[:k] for t in self.texts for k in range(1, len(t))})
        self._ends = tuple({t[k:] for t in self.texts for k in range(1, len(t))})

    def meet(self, content: str) -> bool:
        """Whether a content has a mark, or part of one at an edge with the template."""
        return self.pattern.search(content) is not None or self._edges(content) != (0, 0)

    def replace(self, content: str, hold: Callable[[str], str]) -> str:
        """Replace each mark by a placeholder, and also parts of marks at the edges."""
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
        """Number of characters at each edge, ignoring white space, that are part of a mark."""
        bare = content.strip()
        return int(bare.startswith(self._ends)), int(bare.endswith(self._starts))


class _Apart:
    """A copy of a tokenizer that finds control tokens only by other names."""

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
        # Special tokens are then encoded like any text; the new names are not special.
        self._tokenizer.encode_special_tokens = True
        flags = ("single_word", "lstrip", "rstrip")
        options = [{"normalized": False, **{flag: t[flag] for flag in flags}} for t in found]
        names = list(self._names.values())
        added = [AddedToken(name, **given) for name, given in zip(names, options, strict=True)]
        self._tokenizer.add_tokens(added)
        self._ids = {
            self._tokenizer.token_to_id(n): t["id"] for n, t in zip(names, found, strict=True)
        }
        # Any text can have unknown words.
        self._control = {t["id"] for t in found if t["content"] != unknown}

    def renamed(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._names.get(match[0], match[0]), text)

    def encode(self, text: str) -> list[int]:
        """Encode a text; control tokens only match their new names."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(token, token) for token in ids]

    def plain(self, text: str) -> str:
        """Change the text only if the word or piece model itself contains a control token."""
        return plain_text(text, lambda part: not self._control.isdisjoint(self.encode(part)))


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches any of the texts, the longest first."""
    wanted = sorted({text for text in texts if text}, key=len, reverse=True)
    # Without any text, it matches nothing.
    return re.compile("|".join(map(re.escape, wanted)) or r"(?!)")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _finds_hidden(tokenizer: Any, texts: Collection[str]) -> bool:
    """Whether control tokens can be found in texts that do not contain them literally.

    This happens if a text is normalized first, or if a word or piece model contains them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True
    tokens = tokenizer.added_tokens_decoder.values()
    if any(token.normalized and str(token.content) in texts for token in tokens):
        return True
    # BERT's words contain no punctuation, which all marks have.
    kinds = type(backend.model).__name__, type(backend.pre_tokenizer).__name__
    return kinds != ("WordPiece", "BertPreTokenizer") and kinds[0] != "BPE"
