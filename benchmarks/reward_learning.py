"""Can a known reward be learned from preferences? Heads on MiniLM, on pairs of a gold reward.

SmolLM2 answers the builtin prompts that have constraints; the answers are kept in a records folder
and used again. Of each prompt's answers, pairs are made with two gold rewards: the share of the
constraints that are kept, and relevance. A linear Bradley-Terry head is fitted on four fifths of
the prompts and measured on the others. Timed is all that a user waits for once there are pairs:
loading MiniLM, embedding every text, choosing the penalty, fitting, measuring.

Relevance is the cosine of MiniLM's embeddings, which is among the features: it shows that the fit
finds what is there, and no more. Constraints are no function of the features, but the counts among
these were chosen with the kinds of constraints in view: what the figure says is that new prompts of
known kinds are learned, not that new kinds are.

python -m mbrl_text_env.benchmarks.reward_learning --json reward_learning.json
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.encoders import encode_texts
from mbrl_text_env.files import write_text

if TYPE_CHECKING:
    from mbrl_text_env.records import Record
    from mbrl_text_env.rewards.learning.preferences import PreferencePair

PAIRS_PER_PROMPT = 12
# Relevance has no ties, so that fewer answers make enough pairs.
RELEVANCE_SAMPLES = 8


class RememberedTexts:
    """MiniLM, loaded anew at first use; a text that it has seen is not embedded again."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}
        self._encoder: Any = None

    def encode(self, sentences: list[str]) -> Any:
        """float32[len(sentences), 384]."""
        from mbrl_text_env.language_models.registry import embedded_encoder

        if self._encoder is None:
            # Loading is part of what is timed, even where this process has loaded it before.
            self._encoder = embedded_encoder.__wrapped__()
        new = [text for text in sentences if text not in self._seen]
        if new:
            self._seen.update(zip(new, encode_texts(self._encoder, new), strict=True))
        return np.stack([self._seen[text] for text in sentences])

    def __len__(self) -> int:
        return len(self._seen)


def collected(folder: Path, samples: int, tokens: int, seed: int) -> list[Record]:
    """SmolLM2's answers, scored for constraints: those in the folder, and the missing ones."""
    from mbrl_text_env.agents.collection import collect
    from mbrl_text_env.language_models import embedded
    from mbrl_text_env.prompts import load_prompts
    from mbrl_text_env.records import RecordWriter
    from mbrl_text_env.rewards import ConstraintsReward

    prompts = load_prompts(kind="instruct")
    with RecordWriter(folder) as writer:
        collect(
            embedded(),
            ConstraintsReward(),
            prompts,
            writer,
            samples_per_prompt=samples,
            max_response_tokens=tokens,
            batch_prompts=8,
            seed=seed,
            on_batch=lambda records: print(f"{len(records)} answers", file=sys.stderr),
        )
        return writer.existing()


def scored_for_relevance(records: Sequence[Record]) -> list[Record]:
    """The first answers to each prompt, scored for relevance."""
    from mbrl_text_env.rewards import RelevanceReward

    counts: dict[str, int] = {}
    kept = []
    for record in records:
        counts[record.prompt_id] = counts.get(record.prompt_id, 0) + 1
        if counts[record.prompt_id] <= RELEVANCE_SAMPLES:
            kept.append(record)
    reward = RelevanceReward()
    scores = reward.score([r.prompt() for r in kept], [r.response for r in kept])
    return [
        replace(record, score=float(score), rewards={}, reward_name=reward.name)
        for record, score in zip(kept, scores, strict=True)
    ]


def chosen_pairs(records: Sequence[Record], count: int, seed: int) -> list[PreferencePair]:
    """At most `count` pairs, drawn over all prompts."""
    from mbrl_text_env.rewards.learning.preferences import pairs_from_records

    pairs = pairs_from_records(records, pairs_per_prompt=PAIRS_PER_PROMPT, seed=seed)
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:count]]


def measure(pairs: Sequence[PreferencePair], gold: str, seed: int, splits: int) -> dict[str, Any]:
    """Fit and time once, then fit on other splits of the same pairs."""
    from mbrl_text_env.rewards.learning.features import EmbeddingFeatures
    from mbrl_text_env.rewards.learning.fitting import fit_reward

    encoder = RememberedTexts()
    reports = []
    seconds = 0.0
    for split in range(splits):
        start = time.perf_counter()
        features = EmbeddingFeatures(encoder)
        reward = fit_reward(pairs, features=features, seed=seed + split, data_name=gold)
        seconds = seconds or time.perf_counter() - start
        reports.append(reward.report_)
    accuracies = [report.held_out.accuracy for report in reports]
    return {
        "gold": gold,
        "num_pairs": len(pairs),
        "num_prompts": len({pair.prompt.text for pair in pairs}),
        "num_texts": len(encoder),
        "seconds": round(seconds, 1),
        "accuracy": round(accuracies[0], 4),
        "accuracies": [round(accuracy, 4) for accuracy in accuracies],
        "mean_accuracy": round(float(np.mean(accuracies)), 4),
        "report": reports[0].as_dict(),
    }


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    records: Annotated[
        Path, typer.Option(help="Folder of the answers; made if it is not there.")
    ] = Path("reward-learning-records"),
    pairs: Annotated[int, typer.Option(min=10)] = 2000,
    samples: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 24,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 32,
    splits: Annotated[int, typer.Option(min=1, help="Splits into prompts to fit and measure.")] = 5,
    seed: int = 0,
) -> None:
    """Measure and print; the first split is the one that is timed."""
    found = collected(records, samples, max_response_tokens, seed)
    results = []
    for gold, scored in (
        ("constraints", found),
        ("relevance", scored_for_relevance(found)),
    ):
        results.append(measure(chosen_pairs(scored, pairs, seed), gold, seed, splits))
        shown = {key: value for key, value in results[-1].items() if key != "report"}
        print(json.dumps(shown, indent=2))
        if results[-1]["num_pairs"] < pairs:
            print(
                f"Only {results[-1]['num_pairs']} of {pairs} pairs for {gold}: the other answers "
                "to a prompt score the same. Raise --samples."
            )
    figures = {
        "results": results,
        "cpus": os.cpu_count(),
        "command": shlex.join(
            ["python", "-m", "mbrl_text_env.benchmarks.reward_learning", *sys.argv[1:]]
        ),
        "seed": seed,
    }
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
