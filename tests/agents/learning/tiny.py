"""A tiny language model of a real architecture, shared by the tests that tune policies."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.records import Record
from mbrl_text_env.types import Chunk, FinishReason, Prompt
from tests.language_models.conftest import CHAT_TEMPLATE, make_config, save_model, train_tokenizer

PROMPTS = [Prompt.from_text(f"Say {word}.") for word in ("fox", "dog", "river", "sea", "rain", "a")]


@functools.cache
def tiny_lm(seed: int = 0, family: str = "llama", **options: Any) -> TransformersLM:
    """Random weights, which follow from the seed; loaded anew for other options."""
    tokenizer = train_tokenizer(chat_template=CHAT_TEMPLATE)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "tiny"
        save_model(folder, make_config(family, tokenizer.eos_token_id), tokenizer, seed)
        return TransformersLM(folder, **options)


def record(
    text: str,
    prompt: Prompt = PROMPTS[0],
    *,
    finish_reason: FinishReason = "stop",
    with_stop: bool = True,
    score: float = 1.0,
    language_model: str = "tiny",
) -> Record:
    """A response of the tiny model to a prompt."""
    lm = tiny_lm()
    ids = tuple(lm._tokenizer.tokenizer(text)["input_ids"])
    if finish_reason == "stop" and with_stop:
        ids += (min(lm.stop_token_ids),)
    return Record(
        prompt_id=prompt.id,
        prompt_text=prompt.text,
        split="train",
        prompt_ids=lm.encode_prompt(prompt),
        response_ids=ids,
        logprobs=(),
        finish_reason=finish_reason,
        response=text,
        rewards={},
        score=score,
        reward_name="count",
        agent="sampling",
        language_model=language_model,
        seed=0,
        usage={},
        metadata={},
        messages=prompt.content if isinstance(prompt.content, tuple) else None,
    )


def logprob(lm: TransformersLM, of: Record) -> float:
    """Log-probability (nats) of a recorded response."""
    [found] = lm.logprobs([of.prefix_state(0)], [Chunk(of.response_ids)])
    return sum(found)
