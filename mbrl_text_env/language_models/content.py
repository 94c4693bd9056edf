"""Users' texts as token ids: what a text says is never read as a control token.

A tokenizer that parses text finds its control tokens wherever they are written. A prompt that
quotes `<|im_end|>` could so end its own message and begin another one, in another role.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from mbrl_text_env.types import Message

# Breaks a control token's text, so that any tokenizer reads it as ordinary text.
_ZERO_WIDTH_SPACE = "\u200b"
# Encloses what stands for other text; a private character.
_EDGE = "\uf8ff"


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts that a transformers tokenizer reads as control tokens.

    These are its special tokens, and those of its added tokens that its chat template writes: some
    models mark turns, reasoning or the results of tools with tokens that are not called special.
    """
    added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
    template = _template_source(tokenizer)
    written = (t for t in added if added[t].special or (t.strip() and t in template))
    return tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *written]))


def control_test(tokenizer: Any, *others: str) -> Callable[[str], bool]:
    """A test for `plain_text`: whether a tokenizer finds control tokens, or `others`, in a text."""
    texts = control_texts(tokenizer)
    pattern = _pattern([*texts, *others])
    if not _finds_hidden(tokenizer, texts):
        return lambda text: pattern.search(text) is not None
    control = _control_ids(tokenizer, texts)
    return lambda text: (
        pattern.search(text) is not None or not control.isdisjoint(_ids(tokenizer, text))
    )


def plain_text(text: str, is_special: Callable[[str], bool]) -> str:
    """A text in which a tokenizer finds no control token, for tokenizers that cannot be told.

    A control token's text gets a zero-width space in its middle and is then read as ordinary
    characters.

    Args:
        text: Any text; most come back as they are.
        is_special: Whether control tokens are found in a text.

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
    """Encodes texts and chats with a transformers tokenizer, their contents as text.

    The ids of contents without control tokens' texts are exactly those that the tokenizer and its
    `apply_chat_template` give. Where a text holds one, the template is rendered with something else
    in its place, so that the template's own control tokens can be told from it. Then the whole is
    encoded by a copy of the tokenizer that knows control tokens by other names: everything else
    (pre-tokenization, merges across the template's edges, white space) is the tokenizer's own.
    Tokenizers that are not made of the `tokenizers` library cannot be copied so; there, the texts
    of control tokens get a zero-width space.

    Args:
        tokenizer: A transformers tokenizer; read at first use.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # The copy would forget that it reads special tokens as text.
        return {"tokenizer": self.tokenizer}

    def text(self, text: str) -> list[int]:
        """Token ids of a text, with nothing before or behind it."""
        if not self._careful and not self._marks.contained_in(text):
            return _ids(self.tokenizer, text)
        apart = self._apart
        if apart is None:
            return _ids(self.tokenizer, plain_text(text, self._is_control))
        return apart.encode(apart.plain(text))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat and of what begins the answer to it.

        Raises:
            Exception: Whatever the chat template raises.
            ValueError: The chat template leaves out a message.
        """
        apart, held = self._apart if self._is_apart(messages) else None, _Held()
        contents = [self._kept_apart(message, apart, held) for message in messages]
        rendered = self._rendered(messages, contents)
        self._check_complete(messages, contents, rendered)
        if apart is None:
            return _ids(self.tokenizer, rendered)
        return apart.encode(held.put_back(apart.renamed(rendered)))

    @functools.cached_property
    def opening(self) -> list[int]:
        """Control tokens that the tokenizer puts before every text, such as the first of a text.

        What it puts behind a text, as for classification, is not for texts that go on.
        """
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

    def _is_apart(self, messages: Sequence[Message]) -> bool:
        """Whether contents have to be told from the template."""
        return self._careful or any(self._marks_in(m).meet(m.content) for m in messages)

    def _kept_apart(self, message: Message, apart: _Apart | None, held: _Held) -> str:
        if apart is not None:
            return self._marks_in(message).replace(apart.plain(message.content), held)
        # There is no such copy, or no need of one.
        return plain_text(message.content, self._is_control) if self._careful else message.content

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
        text: str = self.tokenizer.apply_chat_template(
            _rows(messages, contents), add_generation_prompt=True, tokenize=False
        )
        return text


class _Held:
    """Pieces of texts, and what stands for them while a template is rendered."""

    def __init__(self) -> None:
        # Nobody can write it beforehand.
        self._key = str(secrets.randbits(64))
        self._pieces: list[str] = []

    def hold(self, piece: str) -> str:
        self._pieces.append(piece)
        return f"{_EDGE}{self._key}+{len(self._pieces) - 1}{_EDGE}"

    def put_back(self, text: str) -> str:
        pattern = rf"{_EDGE}{self._key}\+(\d+){_EDGE}"
        return re.sub(pattern, lambda match: self._pieces[int(match[1])], text)


class _Marks:
    """The texts of control tokens, and how they are found."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self.pattern = _pattern(self.texts)
        self._starts = tuple({t[:k] for t in self.texts for k in range(1, len(t))})
        self._ends = tuple({t[k:] for t in self.texts for k in range(1, len(t))})

    def contained_in(self, text: str) -> bool:
        """Whether a text has a mark in it."""
        return self.pattern.search(text) is not None

    def meet(self, content: str) -> bool:
        """Whether a content has a mark in it, or a part of one where it meets the template."""
        return self.contained_in(content) or self._edges(content) != (0, 0)

    def replace(self, content: str, held: _Held) -> str:
        """The content with something else for each mark, and for parts of marks at its edges."""
        first, last = self._edges(content)
        bare = content.strip()
        before = content[: len(content) - len(content.lstrip())]
        behind = content[len(before) + len(bare) :]
        if len(bare) < first + last:
            return before + held.hold(bare) + behind
        middle = self.pattern.sub(lambda match: held.hold(match[0]), bare[first : len(bare) - last])
        start = held.hold(bare[:first]) if first else ""
        end = held.hold(bare[len(bare) - last :]) if last else ""
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
        self._tokenizer.add_tokens(
            [
                AddedToken(
                    self._names[t["content"]], normalized=False, **{flag: t[flag] for flag in flags}
                )
                for t in found
            ]
        )
        self._ids = {self._tokenizer.token_to_id(self._names[t["content"]]): t["id"] for t in found}
        # Any text may have unknown words.
        self._control = {t["id"] for t in found if t["content"] != unknown}

    def renamed(self, text: str) -> str:
        """A text with the new names of its control tokens."""
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


def _control_ids(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    # Any text may have unknown words.
    return {tokenizer.convert_tokens_to_ids(t) for t in texts if t != tokenizer.unk_token}


def _finds_hidden(tokenizer: Any, texts: Collection[str]) -> bool:
    """Whether control tokens may be found in texts that do not contain them as they are written.

    So it is where a text is normalized before, or where a model of words or pieces has them.
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


def _rows(messages: Sequence[Message], contents: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"role": message.role, "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]


def _template_source(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template
