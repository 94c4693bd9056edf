"""Process reward models of the Hugging Face Hub: one score a step of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mbrl_text_env.rewards.base import Aggregation, ProcessRewardModel
from mbrl_text_env.rewards.evaluators._hub import (
    HubReward,
    batches,
    check_choices,
    check_rows,
    forward_flops,
    input_limit,
    padded,
)
from mbrl_text_env.rewards.evaluators._steps import (
    PROCESS_FORMATS,
    StepEncoder,
    StepFormat,
    StepOutput,
    StepText,
)
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt

if TYPE_CHECKING:
    import torch

__all__ = ["PROCESS_FORMATS", "ProcessReward", "StepFormat"]

_QWEN_ARCHITECTURE = "Qwen2ForProcessRewardModel"


@named("process", argument="NAME_OR_FOLDER")
@dataclass(eq=False, repr=False)
class ProcessReward(HubReward, ProcessRewardModel):
    """The scores that a process reward model gives to the steps of a response, in [0, 1].

    `score_steps` gives exactly one score a step, `score` aggregates the steps that `separator`
    makes of a response. A response without text is scored as one empty step. Formats:

    - `"qwen"`: Qwen2.5-Math-PRM-7B, -72B and Qwen2.5-Math-7B-PRM800K. `<extra_0>` after each step
      in the assistant's message; the probability of class 1 there. Their head, two linear layers,
      is read from the checkpoint; the code that comes with the models is not run.
    - `"math-shepherd"`: peiyi9979/math-shepherd-mistral-7b-prm. "Step 1: ... ки" a line; the
      probability of "+" against "-" at each "ки".
    - `"trl"`: what TRL's PRMTrainer trains. A line break after each step; the probability of class
      1 of `AutoModelForTokenClassification` there.
    - Others: a `StepFormat`.

    Formats with a turn of the chat for each step (RLHFlow's) are not among them. Special tokens and
    `step_end` written out in a prompt or step get a zero-width space and are read as ordinary text
    (line breaks stay, as in training), so what a step contains never moves the places of scores.

    A text longer than `max_length`, or than the model's input, is cut: first the prompt's start, to
    half of the limit, then the ends of the longest steps, each of which keeps a score of its own.
    The first cut gives a warning.

    Source: Zhang et al., "The Lessons of Developing Process Reward Models in Mathematical
    Reasoning", 2025, and the model card of Qwen/Qwen2.5-Math-PRM-7B; Wang et al., "Math-Shepherd:
    Verify and Reinforce LLMs Step-by-step without Human Annotations", ACL 2024, and its model card;
    Uesato et al., "Solving math word problems with process- and outcome-based feedback", 2022, as
    in `PRMTrainer.tokenize_row` of TRL 0.16. Deviations: steps are stripped of surrounding white
    space, and texts are cut as above (TRL cuts the last steps off).

    Args (see `HubReward` for the others):
        model: Name on the Hub, or folder with a model and its tokenizer.
        step_format: A name of `PROCESS_FORMATS`, or a `StepFormat`.
        separator: What stands between the steps of a response; blank steps are left out.
        aggregation: How the steps make one score: `"min"`, `"product"`, `"last"` or `"mean"`.
        max_length: Most tokens of prompt and steps.

    Attributes:
        num_truncated: Texts that were cut so far.

    Raises:
        RewardError: At first use: there is no such model, it has no trained head of this kind, or
            the format's tokens are not in its vocabulary. Later: a response has so many steps that
            their ends alone do not fit.
        ValueError: At first use: an argument is out of its range.

    Example:
        >>> reward = ProcessReward("Qwen/Qwen2.5-Math-PRM-7B", "qwen")
        >>> prompt = Prompt.from_text("What is 2 + 2 * 3?")
        >>> reward.score_steps(prompt, ["2 * 3 = 6.", "2 + 6 = 9."])  # doctest: +SKIP
        array([0.99..., 0.01...])
    """

    step_format: str | StepFormat = "qwen"
    _: KW_ONLY
    separator: str = "\n\n"
    aggregation: Aggregation | str = "min"
    max_length: int = 4096

    cuts = (
        "text(s) to {} tokens: the start of the prompt, or the ends of the longest steps, do not "
        "count",
        "model's input",
    )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the aggregated scores of each response's steps."""
        rows = self.score_steps_batch(prompts, [self.steps(response) for response in responses])
        aggregation = Aggregation(self.aggregation)
        return np.array([aggregation.of(row) for row in rows], dtype=np.float64)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the score of each step given those before it."""
        return self.score_steps_batch([prompt], [steps])[0]

    def score_steps_batch(
        self, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]]
    ) -> list[FloatArray]:
        """Score the steps of several responses together.

        Args:
            prompts: One a response.
            steps: The steps of each response; there may be none.

        Returns:
            float64[len(steps[i])] for each response.
        """
        scores = [np.zeros(0) for _ in steps]
        asked = [i for i, row in enumerate(steps) if row]
        if not asked:
            return scores
        loaded = self._model()
        texts = [loaded.encode(prompts[i], steps[i]) for i in asked]
        for text in texts:
            check_rows(text.ids, loaded.model, loaded.encode.tokenizer, self.name)
        self._note_truncated(sum(text.truncated for text in texts), loaded.encode.max_length)
        for part in batches([len(t.ids) for t in texts], self.batch_size, self.batch_tokens):
            for k, row in zip(part, loaded.outputs([texts[k] for k in part]), strict=True):
                scores[asked[k]] = row
        return scores

    def steps(self, response: str) -> list[str]:
        """The steps of a response; one empty step where it has none."""
        if not self.separator:
            raise ValueError("separator: expected text between steps, such as '\\n\\n'; got ''.")
        found = [step for step in response.split(self.separator) if step.strip()]
        return found or [""]

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of each response: `forward_flops`."""
        if not responses:
            return np.zeros(0)
        loaded = self._model()
        lengths = [
            len(loaded.encode(prompt, self.steps(response)).ids)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return forward_flops(loaded.model, lengths)

    def flops_bound(self) -> float:
        """The most that one response can take: a text that fills the model's input."""
        loaded = self._model()
        return float(forward_flops(loaded.model, [loaded.encode.max_length])[0])

    def _load(self) -> _Loaded:
        check_choices(self, aggregation=[choice.value for choice in Aggregation])
        if not isinstance(self.step_format, StepFormat):
            check_choices(self, step_format=list(PROCESS_FORMATS))
        named = self.step_format
        step_format = named if isinstance(named, StepFormat) else PROCESS_FORMATS[named]
        if step_format.output not in get_args(StepOutput):
            raise ValueError(
                f"step_format.output: expected one of {list(get_args(StepOutput))}, got "
                f"{step_format.output!r}."
            )
        is_class = step_format.output == "class"
        model, tokenizer = self._read(
            _classifier if is_class else "AutoModelForCausalLM",
            "token-classification" if is_class else "causal language",
        )
        limit = input_limit(model, tokenizer, self.max_length)
        encode = StepEncoder(tokenizer, step_format, self.name, limit)
        return _Loaded(model, encode, _columns(model.config, encode))


def _columns(config: Any, encode: StepEncoder) -> list[int]:
    """The outputs whose softmax gives the score, the good one first."""
    step_format = encode.format
    if step_format.output == "token":
        return [encode.token(step_format.good, "good"), encode.token(step_format.bad, "bad")]
    label = step_format.label
    labels = [config.id2label[i] for i in range(config.num_labels)]
    index = labels.index(label) if label in labels else label
    if len(labels) < 2 or not isinstance(index, int) or not 0 <= index < len(labels):
        raise encode.error(
            "expected two or more classes, and label to be the name or index of the good one; got "
            f"the classes {labels} and label={label!r}. Pass step_format=StepFormat(label=...), or "
            "choose a model that was trained as a process reward model"
        )
    return [index, *(i for i in range(len(labels)) if i != index)]


def _classifier(source: str, **options: Any) -> Any:
    """A token-classification model; Qwen's own head is built here, without Qwen's code."""
    from torch import nn
    from transformers import (
        AutoConfig,
        AutoModelForTokenClassification,
        Qwen2Config,
        Qwen2ForTokenClassification,
    )

    found = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = AutoConfig.from_pretrained(source, **found)
    if config.architectures != [_QWEN_ARCHITECTURE]:
        return AutoModelForTokenClassification.from_pretrained(source, **options)

    class Qwen2ForProcessRewardModel(Qwen2ForTokenClassification):
        """Qwen2 with a head of two layers instead of one; the names are the checkpoint's."""

        def __init__(self, config: Qwen2Config) -> None:
            super().__init__(config)
            size: Any = config.hidden_size
            head: Any = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
            self.score = head
            self.post_init()

    config.num_labels = 2
    return Qwen2ForProcessRewardModel.from_pretrained(source, config=config, **options)


@dataclass(frozen=True)
class _Loaded:
    """A model, its encoder, and the outputs whose softmax gives the score, the good one first."""

    model: Any
    encode: StepEncoder
    columns: list[int]

    def outputs(self, texts: Sequence[StepText]) -> list[FloatArray]:
        """float64[S] for each text, from one forward pass."""
        import torch

        ids, mask = padded([text.ids for text in texts], 0, self.model.device)
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": mask}
        places = list(range(ids.shape[1]))
        if self.encode.format.output == "token":
            # The vocabulary is wide: logits are computed only where a step ends.
            places = sorted({end for text in texts for end in text.ends})
            inputs["logits_to_keep"] = torch.tensor(places, device=ids.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits[:, :, self.columns].double().cpu()
        if logits.shape[1] != len(places):
            # Some models compute all of them, whatever they are asked for.
            places = list(range(ids.shape[1]))
        row_of = {place: row for row, place in enumerate(places)}
        return [
            logits[i, [row_of[end] for end in text.ends]].softmax(dim=-1)[:, 0].numpy()
            for i, text in enumerate(texts)
        ]
