"""How prompts and steps become the token ids that a process reward model reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from mbrl_text_env.language_models.hf_tokenizer import control_test, plain_text
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import chat_messages
from mbrl_text_env.types import Prompt

StepOutput = Literal["class", "token"]

# Stands for the assistant's message in a rendered chat template; a private character.
_HERE = "\ue000"
_NUMBERED = re.compile(r"Step \d+:")


@dataclass(frozen=True)
class StepFormat:
    """How a process reward model reads a prompt and steps, and which output is a step's score.

    After each step comes `step_end`; the model's output at its last token is the step's score.

    Args:
        step_end: Text after each step.
        output: `"class"`: the probability of the class `label` of a token-classification head.
            `"token"`: the probability that `good` comes next rather than `bad`.
        chat: Whether prompt and response are messages of the tokenizer's chat template.
        before: Written before the first step, where it is no chat; `{prompt}` is the prompt.
        step: A step; `{n}` is its number from 1, `{step}` its text without surrounding white space.
            A step that begins with its number already ("Step 2:") is written as it is.
        between: Written between `step_end` and the next step.
        whole: Whether all is encoded as one text, in which `step_end` has to be a single token;
            otherwise prompt, steps and `step_end` are encoded one by one, the opening token first.
        label: Index or name of the class that is good.
        good: The token that comes after a good step; one token of the vocabulary.
        bad: The one that comes after a bad step.
        system: System message of a chat that has none.

    Example:
        >>> PROCESS_FORMATS["math-shepherd"].step_end
        ' ки'
    """

    step_end: str
    output: StepOutput = "class"
    chat: bool = False
    before: str = "{prompt}"
    step: str = "{step}"
    between: str = ""
    whole: bool = True
    label: int | str = 1
    good: str = "+"
    bad: str = "-"
    system: str | None = None

    def written(self, number: int, step: str) -> str:
        """A step's text as the model reads it."""
        text = step.strip()
        # An empty step leaves no space before `step_end`.
        return text if _NUMBERED.match(text) else self.step.format(n=number, step=text).strip()


PROCESS_FORMATS: dict[str, StepFormat] = {
    "qwen": StepFormat(
        "<extra_0>",
        chat=True,
        system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    "math-shepherd": StepFormat(
        " ки", output="token", before="{prompt} ", step="Step {n}: {step}", between="\n"
    ),
    "trl": StepFormat("\n", whole=False),
}
"""Formats by name; see `ProcessReward` for their sources."""


@dataclass(frozen=True)
class StepText:
    """Prompt and steps as int[T], and the places of the steps' ends, int[S]."""

    ids: list[int]
    ends: list[int]
    truncated: bool


class StepEncoder:
    """Encodes prompts and steps for one model."""

    def __init__(self, tokenizer: Any, step_format: StepFormat, name: str, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.format = step_format
        self.name = name
        self.max_length = max_length
        tag = step_format.step_end.strip()
        # White space is part of any text, and a single character cannot be broken.
        self._is_special = control_test(tokenizer, *([tag] if len(tag) > 1 else []))
        self._check_fields()
        if step_format.chat and tokenizer.chat_template is None:
            raise self.error(
                "the format writes a chat, and the tokenizer has no chat template. Use a format "
                "with chat=False"
            )
        # Without its spaces: tokenizers differ in where a space belongs.
        self._end_ids = (
            [self.token(tag, "step_end")] if step_format.whole else self._ids(step_format.step_end)
        )
        if not self._end_ids:
            raise self.error(f"step_end={step_format.step_end!r} has no tokens. Use another text")

    def __call__(self, prompt: Prompt, steps: Sequence[str]) -> StepText:
        """Token ids of a prompt and its steps, cut to `max_length`; see `ProcessReward`."""
        written = [
            plain_text(self.format.written(i + 1, step), self._is_special)
            for i, step in enumerate(steps)
        ]
        if self.format.chat:
            before = self._chat(prompt)
        else:
            before = self.format.before.format(prompt=plain_text(prompt.text, self._is_special))
        encode = self._as_one if self.format.whole else self._one_by_one
        head, parts = encode(prompt, before, written)
        total = sum(map(len, parts))
        truncated = len(head) + total > self.max_length
        if truncated:
            kept = max(self.max_length // 2, self.max_length - total)
            head = head[max(0, len(head) - kept) :]
            parts = self._shortened(prompt, parts, self.max_length - len(head))
        ends = np.cumsum([len(head), *map(len, parts)])[1:] - 1
        return StepText([*head, *itertools.chain(*parts)], ends.tolist(), truncated)

    def token(self, text: str, argument: str) -> int:
        """The id of a text that has to be one token."""
        ids = self._ids(text)
        unknown = ids == [self.tokenizer.unk_token_id] and text != self.tokenizer.unk_token
        if len(ids) != 1 or unknown:
            raise self.error(
                f"expected {argument}={text!r} to be a single token of the vocabulary, got "
                f"{self.tokenizer.convert_ids_to_tokens(ids)}. Pass the model's own with "
                "step_format=StepFormat(...), or choose a model of this format"
            )
        return ids[0]

    def error(self, reason: str) -> RewardError:
        """An error that names the reward."""
        return RewardError(f"Reward model {self.name!r}: {reason}.")

    def _check_fields(self) -> None:
        try:
            complete = _HERE in self.format.written(1, _HERE)
            complete &= self.format.chat or _HERE in self.format.before.format(prompt=_HERE)
        except (KeyError, IndexError, ValueError):
            complete = False
        if not complete:
            raise self.error(
                "expected the field {step}, and of others {n} alone, in the format's step, and "
                f"{{prompt}} alone in its before; got step={self.format.step!r} and "
                f"before={self.format.before!r}. Write {{{{ for a brace"
            )

    def _chat(self, prompt: Prompt) -> str:
        """The rendered chat up to the assistant's message."""
        messages = chat_messages(prompt, self._is_special)
        if self.format.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.format.system})
        messages.append({"role": "assistant", "content": _HERE})
        text = cast("str", self.tokenizer.apply_chat_template(messages, tokenize=False))
        head, found, _ = text.rpartition(_HERE)
        if not found:
            raise self.error("the chat template leaves out the assistant's message. Use another")
        return head

    def _as_one(
        self, prompt: Prompt, before: str, steps: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of what comes before the steps and of each step, found by their places in it."""
        text, ends = before, []
        for i, step in enumerate(steps):
            text += (self.format.between if i else "") + step + self.format.step_end
            ends.append(len(text))
        encoded = self.tokenizer(
            text,
            # A chat template writes them itself.
            add_special_tokens=not self.format.chat,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        place = {end: i for i, (start, end) in enumerate(offsets) if end > start}
        first = next(i for i, (_, end) in enumerate(offsets) if end > len(before))
        found = [place.get(end) for end in ends]
        bounds = [first, *(i + 1 for i in found if i is not None and ids[i] == self._end_ids[0])]
        if len(bounds) != len(steps) + 1:
            raise self.error(
                f"prompt {prompt.id!r}: step_end={self.format.step_end!r} is not a token of its "
                "own after each step. Use another, or StepFormat(whole=False)"
            )
        return ids[:first], [ids[a:b] for a, b in itertools.pairwise(bounds)]

    def _one_by_one(
        self, prompt: Prompt, before: str, steps: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of what comes before the steps and of each step, each encoded for itself."""
        opening = self.tokenizer.bos_token_id
        first = [] if self.format.chat or opening is None else [opening]
        between = self._ids(self.format.between)
        parts = [
            (between if i else []) + self._ids(step) + self._end_ids for i, step in enumerate(steps)
        ]
        return first + self._ids(before), parts

    def _shortened(self, prompt: Prompt, parts: list[list[int]], room: int) -> list[list[int]]:
        """Steps that have `room` tokens together; the longest lose the tokens before their ends."""
        end = len(self._end_ids)
        if len(parts) * end > room:
            raise self.error(
                f"prompt {prompt.id!r}: a response of {len(parts)} steps does not fit into "
                f"{self.max_length} tokens, not even the steps' ends. Raise max_length if the "
                "model's input allows it, divide the response into fewer steps, or shorten it"
            )
        most, left = room, room
        for i, length in enumerate(sorted(map(len, parts))):
            most = left // (len(parts) - i)
            if length > most:
                break
            left -= length
        return [p if len(p) <= most else p[: most - end] + p[-end:] for p in parts]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
