"""A reward from any sequence-classification model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, cast

import numpy as np

from mbrl_text_env.language_models.hf_tokenizer import control_test, plain_text
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import (
    HubReward,
    chat_messages,
    class_index,
    input_limit,
    padded,
)
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt, one_of

TextFormat = Literal["pair", "chat", "article"]
Output = Literal["logit", "sigmoid", "softmax"]


@named("classifier", argument="NAME_OR_FOLDER", text_format="article")
@dataclass(eq=False, repr=False)
class ClassifierReward(HubReward):
    """The score of a sequence-classification model for a prompt and its response.

    A model with several classes needs `label`. Code in a model's repository is never run. In
    float32, the batch changes a score by at most 1e-5. The first truncated text gives a warning.
    Special tokens inside a text get a zero-width space, so a text cannot end its own message. The
    article's reward is `text_format="article"` with `output="sigmoid"`.

    Source: Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020.

    Args (see `HubReward` for the others):
        text_format: `"pair"`: prompt and response as the tokenizer's two segments; the longer one
            is cut first, at the tokenizer's `truncation_side` (usually the end). `"chat"`: the
            conversation in the tokenizer's chat template, cut at the start, because the head of a
            decoder reads the last token. `"article"`: one text,
            "User: {prompt}\\nAssistant: {response}", cut at the tokenizer's `truncation_side`, as
            the article's pipeline does.
        output: `"logit"`, `"sigmoid"` (of a single logit) or `"softmax"` (over several classes).
        label: Name or index of the class that is the reward; required with several classes.

    Raises:
        RewardError: At first use, if the model does not exist, its classification head has no
            trained weights, `output` or `label` does not fit the model, or the tokenizer has no
            chat template for `"chat"`.

    Example:
        >>> ClassifierReward("OpenAssistant/reward-model-deberta-v3-large-v2").name
        'reward-model-deberta-v3-large-v2'
    """

    _: KW_ONLY
    text_format: TextFormat = "pair"
    output: Output = "logit"
    label: str | int | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the model's output for each prompt and response."""
        if not responses:
            return np.zeros(0)
        rows = 1 if self._model().pad_id is None else self.batch_size
        return np.array(self._outputs(self._encode(prompts, responses), rows), dtype=np.float64)

    def _forward(self, texts: Sequence[_Encoding]) -> list[float]:
        import torch

        loaded: LoadedClassifier = self._model()
        device = loaded.model.device
        ids, mask = padded([text.ids for text in texts], loaded.pad_id or 0, device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if texts[0].type_ids is not None:
            inputs["token_type_ids"], _ = padded([text.type_ids or [] for text in texts], 0, device)
        with torch.inference_mode():
            logits = loaded.model(**inputs).logits.double()
            if self.output == "softmax":
                logits = logits.softmax(dim=-1)
            column = logits[:, loaded.column]
            chosen = column.sigmoid() if self.output == "sigmoid" else column
        return cast("list[float]", chosen.tolist())

    def _load(self) -> LoadedClassifier:
        one_of("text_format", self.text_format, TextFormat)
        one_of("output", self.output, Output)
        model, tokenizer = self._read(
            "AutoModelForSequenceClassification", "sequence-classification"
        )
        if self.text_format == "chat" and tokenizer.chat_template is None:
            raise RewardError(
                f"Reward model {self.name!r}: text_format='chat' needs a tokenizer with a chat "
                f"template, but {str(self.model)!r} has none. Use text_format='pair' or 'article'."
            )
        return self._ready(model, tokenizer)

    def _ready(self, model: Any, tokenizer: Any) -> LoadedClassifier:
        pad_id = model.config.get_text_config().pad_token_id
        return LoadedClassifier(
            model=model,
            tokenizer=tokenizer,
            is_special=control_test(tokenizer),
            column=self._column(model.config),
            max_length=input_limit(model, tokenizer, self.max_length),
            # Some configs use -1 for "none".
            pad_id=None if pad_id is None or pad_id < 0 else pad_id,
        )

    def _column(self, config: Any) -> int:
        labels, index = class_index(config, self.label)
        single = len(labels) == 1
        if (self.output == "softmax" and single) or (self.output == "sigmoid" and not single):
            raise RewardError(
                f"Reward model {self.name!r}: output={self.output!r} does not fit a model with "
                f"{len(labels)} output{'' if single else 's'}. Use output='logit' or "
                f"{'sigmoid' if single else 'softmax'!r}."
            )
        if index is None and not (single and self.label is None):
            raise RewardError(
                f"Reward model {self.name!r} has the classes {labels}: expected label= to be the "
                f"name or index of the class that is the reward, got {self.label!r}. Pass "
                "label=, with output='softmax' or 'logit' if there are several classes."
            )
        return index or 0

    def _encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[_Encoding]:
        limit = self._model().max_length
        encodings = self._tokenize(prompts, responses)
        long = [i for i, encoding in enumerate(encodings) if len(encoding.ids) > limit]
        if not long:
            return encodings
        if self.text_format == "chat":
            cut = [self._without_start(encodings[i], limit) for i in long]
        else:
            asked, said = [prompts[i] for i in long], [responses[i] for i in long]
            cut = self._tokenize(asked, said, truncation=True, max_length=limit)
        for i, encoding in zip(long, cut, strict=True):
            encodings[i] = _Encoding(encoding.ids, encoding.type_ids, truncated=True)
        return encodings

    def _without_start(self, encoding: _Encoding, limit: int) -> _Encoding:
        """Keep the last `limit` tokens, and the first token if it is a BOS or CLS token."""
        tokenizer = self._model().tokenizer
        opened = encoding.ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
        kept = [0] * (opened and limit > 1)
        kept += range(len(encoding.ids) - limit + len(kept), len(encoding.ids))
        types = encoding.type_ids
        return _Encoding([encoding.ids[i] for i in kept], types and [types[i] for i in kept])

    def _tokenize(
        self, prompts: Sequence[Prompt], responses: Sequence[str], **options: Any
    ) -> list[_Encoding]:
        loaded: LoadedClassifier = self._model()
        answers = [plain_text(response, loaded.is_special) for response in responses]
        texts = [self._text(*row) for row in zip(prompts, answers, strict=True)]
        batch = loaded.tokenizer(
            texts,
            answers if self.text_format == "pair" else None,
            # A chat template adds them itself.
            add_special_tokens=self.text_format != "chat",
            verbose=False,
            **options,
        )
        type_ids = batch.get("token_type_ids", [None] * len(texts))
        return [_Encoding(*row) for row in zip(batch["input_ids"], type_ids, strict=True)]

    def _text(self, prompt: Prompt, response: str) -> str:
        """Return the model's input text, or for `"pair"` its first segment."""
        loaded: LoadedClassifier = self._model()
        if self.text_format == "chat":
            messages = chat_messages(prompt, loaded.is_special)
            messages.append({"role": "assistant", "content": response})
            return cast("str", loaded.tokenizer.apply_chat_template(messages, tokenize=False))
        asked = plain_text(prompt.text, loaded.is_special)
        return asked if self.text_format == "pair" else f"User: {asked}\nAssistant: {response}"


@dataclass(frozen=True)
class _Encoding:
    """Token ids of one text, int[T], and its segment ids if the architecture has them."""

    ids: list[int]
    type_ids: list[int] | None
    truncated: bool = False


@dataclass(frozen=True)
class LoadedClassifier:
    """A model; `is_special` detects special tokens in a text, `column` is the reward's logit."""

    model: Any
    tokenizer: Any
    is_special: Callable[[str], bool]
    column: int
    max_length: int
    pad_id: int | None
