"""Responses that each family of rewards scores a second: in one batch, and one by one.

The two are timed in turns, and the fastest of each is taken. Models are loaded, and helper
processes started, before. Classifier and process reward model are small networks with random
weights (6 layers of 384, as MiniLM): time does not depend on the weights.

python -m mbrl_text_env.benchmarks.reward_throughput --json reward_throughput.json
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from mbrl_text_env import rewards
from mbrl_text_env.benchmarks.terminal import console
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import embedded
from mbrl_text_env.prompts import load_prompts, reasoning_gym_prompts
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import Prompt

TEXT = (
    "The sky is blue because the air scatters short waves of light more than long ones. At noon "
    "the path is short, and at sunset it is long! Is it not wonderful, to see it change? In the "
    "end what is left of the light is red, warm and slow, and then the stars come out."
)


class Family(NamedTuple):
    """A family of rewards: how one is made in a scratch folder, and what it scores.

    Args:
        make: Makes the reward.
        metadata: What its prompts need.
        response: The i-th text that is scored; None for English of 20 to 50 words. All differ, for
            equal ones are scored once.
        prompts: The prompts' source; None for builtin ones.
    """

    make: Callable[[Path], RewardModel]
    metadata: Mapping[str, Any] = {}
    response: Callable[[int], str] | None = None
    prompts: Callable[[int], list[Prompt]] | None = None


def _classifier(folder: Path) -> RewardModel:
    from transformers import AutoModelForSequenceClassification

    _random_minilm(AutoModelForSequenceClassification, folder / "classifier", 1)
    return rewards.ClassifierReward(folder / "classifier")


def _process(folder: Path) -> RewardModel:
    from transformers import AutoModelForTokenClassification

    _random_minilm(AutoModelForTokenClassification, folder / "process", 2)
    # A BERT tokenizer has no token for a line break.
    return rewards.ProcessReward(
        folder / "process", rewards.StepFormat(" ;", whole=False), separator=". "
    )


def _random_minilm(factory: Any, folder: Path, num_labels: int) -> None:
    import torch
    from transformers.utils import logging

    from mbrl_text_env.language_models import embedded_encoder

    logging.disable_progress_bar()

    encoder: Any = embedded_encoder()
    config = type(encoder[0].auto_model.config).from_dict(encoder[0].auto_model.config.to_dict())
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        factory.from_config(config).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


def _ensemble(folder: Path) -> RewardModel:
    return rewards.Ensemble([rewards.SentimentReward(), rewards.RelevanceReward()], "mean-std")


def _fraction(i: int) -> str:
    return rf"It is $\frac{{{42 * (i + 1)}}}{{{i + 1}}}$."


def _program(i: int) -> str:
    return f"```python\ndef add(a, b):  # {i}\n    return a + b\n```"


ANSWER = {"reference_answer": "42"}
FAMILIES: Mapping[str, Family] = {
    "function": Family(lambda folder: rewards.as_reward_model(lambda prompt, response: 1.0)),
    "sentiment": Family(lambda folder: rewards.SentimentReward()),
    "relevance": Family(lambda folder: rewards.RelevanceReward()),
    "classifier": Family(_classifier),
    "process": Family(_process),
    "fluency": Family(lambda folder: rewards.FluencyReward(embedded())),
    "judge": Family(lambda folder: rewards.JudgeReward(embedded())),
    "constraints": Family(
        lambda folder: rewards.ConstraintsReward(),
        {"constraints": [{"type": "no_commas"}, {"type": "max_words", "value": 40}]},
    ),
    "exact-match": Family(lambda folder: rewards.ExactMatchReward(), ANSWER),
    "numeric": Family(lambda folder: rewards.NumericReward(), ANSWER),
    "math": Family(lambda folder: rewards.MathReward(), ANSWER, _fraction),
    "regex": Family(lambda folder: rewards.RegexReward(r"(?s).*\bsky\b.*")),
    "json-schema": Family(
        lambda folder: rewards.JSONSchemaReward({"required": ["name"], "type": "object"}),
        response=lambda i: f'{{"name": "Ada", "born": {1815 + i}}}',
    ),
    "reasoning-gym": Family(
        lambda folder: rewards.ReasoningGymReward(),
        response=str,
        prompts=lambda count: reasoning_gym_prompts("chain_sum", size=count, seed=0),
    ),
    "unit-tests": Family(
        lambda folder: rewards.UnitTestReward(), {"tests": ["assert add(1, 2) == 3"]}, _program
    ),
    "ensemble": Family(_ensemble),
    "cached": Family(
        lambda folder: rewards.CachedReward(rewards.RelevanceReward(), folder / "scores.sqlite")
    ),
}


def measure(family: Family, folder: Path, responses: int, repeats: int) -> dict[str, float]:
    """Responses a second in one batch and one by one, and the ratio of the two."""
    reward = family.make(folder)
    prompts, texts = _prompts(family, responses), _responses(family, responses)
    pairs = list(zip(prompts, texts, strict=True))

    # A text that was read a moment ago is in a language model's prefix cache.
    forget = getattr(getattr(reward, "language_model", None), "clear_cache", lambda: None)

    def together() -> None:
        score_responses(reward, prompts, texts)

    def alone() -> None:
        for prompt, text in pairs:
            score_responses(reward, [prompt], [text])

    # Loads what is loaded once. What is cached is then found: a cache is timed when it is warm.
    together()
    times = [[_seconds(way, forget) for way in (together, alone)] for _ in range(repeats)]
    batched, single = (responses / min(column) for column in zip(*times, strict=True))
    return {"batched": batched, "single": single, "ratio": batched / single}


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    responses: Annotated[int, typer.Option(min=2, help="Scored at a time.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    family: Annotated[
        list[str] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
) -> None:
    """Measure and print."""
    unknown = sorted(set(family or ()) - set(FAMILIES))
    if unknown:
        raise typer.BadParameter(f"Expected families among {list(FAMILIES)}, got {unknown}.")
    table = Table("family", "in a batch", "one by one", "ratio", title="Responses a second")
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in family or FAMILIES:
            figures[name] = measure(FAMILIES[name], Path(folder), responses, repeats)
            shown = [f"{figures[name][key]:.3g}" for key in ("batched", "single", "ratio")]
            table.add_row(name, *shown)
    console.print(table)
    if json_file is not None:
        content = {
            "command": shlex.join(
                ["python", "-m", "mbrl_text_env.benchmarks.reward_throughput", *sys.argv[1:]]
            ),
            "responses": responses,
            "repeats": repeats,
            "families": figures,
        }
        write_text(json_file, json.dumps(content, indent=2))


def _prompts(family: Family, count: int) -> list[Prompt]:
    if family.prompts is not None:
        return family.prompts(count)
    texts = [prompt.text for prompt in load_prompts(split="test")]
    return [
        Prompt.from_text(text, f"{text}-{i}", metadata=dict(family.metadata))
        for i, text in enumerate(islice(cycle(texts), count))
    ]


def _responses(family: Family, count: int) -> list[str]:
    """Different responses of 20 to 50 words, or the family's own."""
    if family.response is not None:
        return [family.response(i) for i in range(count)]
    words = TEXT.split()
    return [" ".join(islice(cycle(words), i, i + 20 + 7 * i % 31)) for i in range(count)]


def _seconds(function: Callable[[], None], forget: Callable[[], None]) -> float:
    forget()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
