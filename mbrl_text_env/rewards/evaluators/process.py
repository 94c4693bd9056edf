"""Process reward models from the Hugging Face Hub: one score per step of a response."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from mbrl_text_env.language_models.hf_tokenizer import control_test, plain_text
from mbrl_text_env.rewards.base import ProcessRewardModel, RewardError
from mbrl_text_env.rewards.evaluators._hub import (
    HubReward,
    chat_messages,
    class_index,
    input_limit,
    padded,
)
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt, one_of

if TYPE_CHECKING:
    import torch

StepOutput = Literal["class", "token"]
_Parts: TypeAlias = tuple[list[int], list[list[int]]]
# A private-use character that marks the assistant's message in a rendered chat template.
_HERE = "\ue000"
_AGGREGATIONS: dict[str, Any] = {
    "min": np.min, "product": np.prod, "last": lambda scores: scores[-1], "mean": np.mean,
}  # fmt: skip
_NUMBERED = re.compile(r"Step \d+:")


@dataclass(frozen=True)
class StepFormat:
    """The input format of a process reward model, and the output that is a step's score.

    `step_end` follows each step. The score is computed from the model's output at its last token.

    Args:
        step_end: Text after each step.
        output: `"class"`: the probability of the class `label` of a token-classification head.
            `"token"`: the probability that the next token is `good` rather than `bad`.
        chat: Whether prompt and response are messages of the tokenizer's chat template.
        before: Text before the first step if `chat` is False; `{prompt}` is the prompt.
        step: Format of a step; `{n}` is its number from 1, `{step}` its text, stripped. A step that
            already starts with a number ("Step 2:") is not formatted.
        between: Text between `step_end` and the next step.
        whole: Whether to encode everything as one text, in which `step_end` must be a single token.
            Otherwise the BOS token, prompt, steps and `step_end` are encoded separately.
        label: Index or name of the good class.
        good, bad: The tokens that follow a good and a bad step; each a single vocabulary token.
        system: System message to add to chats without one.
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

    def __post_init__(self) -> None:
        if "{step}" not in self.step or not (self.chat or "{prompt}" in self.before):
            raise ValueError(
                "StepFormat: expected {step} in step and {prompt} in before, got "
                f"{self.step!r} and {self.before!r}."
            )

    def written(self, number: int, step: str) -> str:
        """Return a step's text in the format of the model."""
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


@named("process", argument="NAME_OR_FOLDER")
@dataclass(eq=False, repr=False)
class ProcessReward(HubReward, ProcessRewardModel):
    """The scores of a process reward model for the steps of a response, in [0, 1].

    `score_steps` returns exactly one score per step. `score` splits a response into steps at
    `separator` and aggregates their scores. An empty response counts as one empty step. Formats:

    - `"qwen"`: Qwen2.5-Math-PRM-7B, -72B and Qwen2.5-Math-7B-PRM800K. `<extra_0>` follows each step
      in the assistant's message; the score is the probability of class 1 there. The code in the
      models' repositories is not run.
    - `"math-shepherd"`: peiyi9979/math-shepherd-mistral-7b-prm. Each line is "Step 1: ... ки"; the
      score is the probability of "+" rather than "-" at "ки".
    - `"trl"`: models trained with TRL's PRMTrainer. A line break follows each step; the score is
      the probability of class 1 of `AutoModelForTokenClassification` there.
    - Others: a `StepFormat`. Formats with one chat turn per step (RLHFlow) are not supported.

    Special tokens and `step_end` inside a text get a zero-width space (line breaks stay, as in
    training). A text that is too long is cut: first the prompt's start, to half of the limit, then
    the ends of the longest steps. Every step keeps a score. The first cut gives a warning.

    Sources: Zhang et al., "The Lessons of Developing Process Reward Models in Mathematical
    Reasoning", 2025; Wang et al., "Math-Shepherd", ACL 2024; the models' cards; and
    `PRMTrainer.tokenize_row` of TRL 0.16. Deviations: surrounding white space of steps is stripped,
    and texts are cut as above (TRL drops the last steps).

    Args (see `HubReward` for the others):
        step_format: A name of `PROCESS_FORMATS`, or a `StepFormat`.
        separator: Text between the steps of a response; blank steps are removed.
        aggregation: How to combine step scores: `"min"`, `"product"`, `"last"` or `"mean"`.

    Raises:
        RewardError: At first use, if the model does not exist, has no trained head of this kind, or
            lacks the format's tokens in its vocabulary. Later, if a response has too many steps.

    Example:
        >>> reward = ProcessReward("Qwen/Qwen2.5-Math-PRM-7B", "qwen")
        >>> prompt = Prompt.from_text("What is 2 + 2 * 3?")
        >>> reward.score_steps(prompt, ["2 * 3 = 6.", "2 + 6 = 9."])  # doctest: +SKIP
        array([0.99..., 0.01...])
    """

    step_format: str | StepFormat = "qwen"
    _: KW_ONLY
    separator: str = "\n\n"
    aggregation: str = "min"
    max_length: int = 4096

    cut = "text(s) to {} tokens: the start of the prompt or the ends of long steps are ignored"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the aggregated scores of each response's steps."""
        rows = self.score_steps_batch(prompts, list(map(self.steps, responses)))
        return np.array([_AGGREGATIONS[self.aggregation](row) for row in rows], dtype=np.float64)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the score of each step given the previous steps."""
        return self.score_steps_batch([prompt], [steps])[0]

    def score_steps_batch(
        self, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]]
    ) -> list[FloatArray]:
        """Score the steps of several responses together: float64[len(steps[i])] for each."""
        scores = [np.zeros(0) for _ in steps]
        asked = [i for i, row in enumerate(steps) if row]
        if asked:
            texts = [self._model().encode(prompts[i], steps[i]) for i in asked]
            for i, found in zip(asked, self._outputs(texts, self.batch_size), strict=True):
                scores[i] = found
        return scores

    def steps(self, response: str) -> list[str]:
        """Split a response into steps; an empty response has one empty step."""
        if not self.separator:
            raise ValueError("separator: expected text between steps, such as '\\n\\n', got ''.")
        found = [step for step in response.split(self.separator) if step.strip()]
        return found or [""]

    def _encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[_StepText]:
        encode = self._model().encode
        return [encode(*row) for row in zip(prompts, map(self.steps, responses), strict=True)]

    def _forward(self, texts: Sequence[_StepText]) -> list[FloatArray]:
        import torch

        loaded: _Loaded = self._model()
        ids, mask = padded([text.ids for text in texts], 0, loaded.model.device)
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": mask}
        places = list(range(ids.shape[1]))
        if loaded.format.output == "token":
            # The vocabulary is large, so compute logits only at the ends of steps.
            places = sorted({end for text in texts for end in text.ends})
            inputs["logits_to_keep"] = torch.tensor(places, device=ids.device)
        with torch.inference_mode():
            logits = loaded.model(**inputs).logits[:, :, loaded.columns].double().cpu()
        if logits.shape[1] != len(places):
            # Some models ignore `logits_to_keep` and compute all logits.
            places = list(range(ids.shape[1]))
        row_of = {place: row for row, place in enumerate(places)}
        return [
            logits[i, [row_of[end] for end in text.ends]].softmax(dim=-1)[:, 0].numpy()
            for i, text in enumerate(texts)
        ]

    def _load(self) -> _Loaded:
        one_of("aggregation", self.aggregation, _AGGREGATIONS)
        step_format = self.step_format
        if not isinstance(step_format, StepFormat):
            one_of("step_format", step_format, PROCESS_FORMATS)
            step_format = PROCESS_FORMATS[step_format]
        one_of("output", step_format.output, StepOutput)
        if step_format.output == "class":
            model, tokenizer = self._read(_classifier, "token-classification")
        else:
            model, tokenizer = self._read("AutoModelForCausalLM", "causal language")
        limit = input_limit(model, tokenizer, self.max_length)
        return _Loaded(model, tokenizer, step_format, self.name, limit)


def _classifier(source: str, **options: Any) -> Any:
    """Load a token-classification model; Qwen's head is built here, without Qwen's code."""
    import transformers
    from torch import nn

    found = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = transformers.AutoConfig.from_pretrained(source, **found)
    if config.architectures != ["Qwen2ForProcessRewardModel"]:
        return transformers.AutoModelForTokenClassification.from_pretrained(source, **options)

    class Qwen2ForProcessRewardModel(transformers.Qwen2ForTokenClassification):
        """Qwen2 with a two-layer head; the names match the checkpoint."""

        def __init__(self, config: transformers.Qwen2Config) -> None:
            super().__init__(config)
            size: Any = config.hidden_size
            head: Any = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
            self.score = head
            self.post_init()

    config.num_labels = 2
    return Qwen2ForProcessRewardModel.from_pretrained(source, config=config, **options)


@dataclass(frozen=True)
class _StepText:
    """The token ids of prompt and steps, int[T], and the positions of the steps' ends, int[S]."""

    ids: list[int]
    ends: list[int]
    truncated: bool


class _Loaded:
    """A model and the encoder of its inputs.

    The score is the softmax over the outputs `columns`, of which the first is the good one.
    """

    def __init__(
        self, model: Any, tokenizer: Any, step_format: StepFormat, name: str, max_length: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.format, self.name, self.max_length = step_format, name, max_length
        tag = step_format.step_end.strip()
        # White space occurs in any text, and a single character cannot be split.
        self._is_special = control_test(tokenizer, *([tag] if len(tag) > 1 else []))
        if step_format.chat and tokenizer.chat_template is None:
            raise self.error("the tokenizer has no chat template. Use a format with chat=False")
        # Strip spaces, because tokenizers attach them differently.
        self._end_ids = (
            [self.token(tag, "step_end")] if step_format.whole else self._ids(step_format.step_end)
        )
        if not self._end_ids:
            raise self.error(f"step_end={step_format.step_end!r} has no tokens. Use another text")
        self.columns = self._columns()

    def _columns(self) -> list[int]:
        if self.format.output == "token":
            return [self.token(self.format.good, "good"), self.token(self.format.bad, "bad")]
        labels, index = class_index(self.model.config, self.format.label)
        if len(labels) < 2 or index is None:
            raise self.error(
                "expected two or more classes, and label to be the name or index of the good one, "
                f"got the classes {labels} and label={self.format.label!r}. Pass another label="
            )
        return [index, *(i for i in range(len(labels)) if i != index)]

    def encode(self, prompt: Prompt, steps: Sequence[str]) -> _StepText:
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
        return _StepText([*head, *itertools.chain(*parts)], ends.tolist(), truncated)

    def token(self, text: str, argument: str) -> int:
        ids = self._ids(text)
        unknown = ids == [self.tokenizer.unk_token_id] and text != self.tokenizer.unk_token
        if len(ids) != 1 or unknown:
            raise self.error(
                f"expected {argument}={text!r} to be a single token of the vocabulary, got "
                f"{self.tokenizer.convert_ids_to_tokens(ids)}. Pass the model's own StepFormat(...)"
            )
        return ids[0]

    def error(self, reason: str) -> RewardError:
        return RewardError(f"Reward model {self.name!r}: {reason}.")

    def _chat(self, prompt: Prompt) -> str:
        """Render the chat up to the assistant's message."""
        messages = chat_messages(prompt, self._is_special)
        if self.format.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.format.system})
        messages.append({"role": "assistant", "content": _HERE})
        text = cast("str", self.tokenizer.apply_chat_template(messages, tokenize=False))
        head, found, _ = text.rpartition(_HERE)
        if not found:
            raise self.error("the chat template omits the assistant's message. Use another")
        return head

    def _as_one(self, prompt: Prompt, before: str, steps: Sequence[str]) -> _Parts:
        """Encode one text; return the ids before the steps, and the ids of each step."""
        text, ends = before, []
        for i, step in enumerate(steps):
            text += (self.format.between if i else "") + step + self.format.step_end
            ends.append(len(text))
        encoded = self.tokenizer(
            text,
            # A chat template adds them itself.
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
                f"prompt {prompt.id!r}: step_end={self.format.step_end!r} is not a separate token "
                "after each step. Use another step_end, or StepFormat(whole=False)"
            )
        return ids[:first], [ids[a:b] for a, b in itertools.pairwise(bounds)]

    def _one_by_one(self, prompt: Prompt, before: str, steps: Sequence[str]) -> _Parts:
        """Encode each part separately; return the same as `_as_one`."""
        opening = self.tokenizer.bos_token_id
        first = [] if self.format.chat or opening is None else [opening]
        between = self._ids(self.format.between)
        parts = [
            (between if i else []) + self._ids(step) + self._end_ids for i, step in enumerate(steps)
        ]
        return first + self._ids(before), parts

    def _shortened(self, prompt: Prompt, parts: list[list[int]], room: int) -> list[list[int]]:
        """Shorten the longest steps to `room` tokens in total, keeping their `step_end`."""
        end = len(self._end_ids)
        if len(parts) * end > room:
            raise self.error(
                f"prompt {prompt.id!r}: a response of {len(parts)} steps does not fit into "
                f"{self.max_length} tokens, even if all steps are empty. Raise max_length if the "
                "model's context allows it, or split the response into fewer steps"
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
