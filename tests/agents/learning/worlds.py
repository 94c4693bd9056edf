"""A solvable world for the loop: policies that are tables of counts, and rewards with a known best.

A policy's next token depends on the last character of the prompt and on the response so far, so
that what is learned on train prompts is known on validation prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.learning import ExpertIteration, Improvement, LoopSettings
from mbrl_text_env.agents.values import StackedValue
from mbrl_text_env.files import write_folder
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.language_models.toy import STOP, ExactLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record
from mbrl_text_env.types import Prompt, Usage
from tests.toys import CountReward, ExactValue

LETTERS = "abcde"
TOKENS = 4
BASE = NGramLM(LETTERS, order=2, seed=1, concentration=2.0, stop_probability=0.1)

Counts = dict[str, dict[int, int]]


def prompts(kind: str, starts: str = LETTERS, endings: str = LETTERS[:3]) -> list[Prompt]:
    """Prompts that end in a few letters; the answer is the letter after the last."""
    return [
        Prompt(
            f"{kind}-{first}{last}",
            f"{first}{last}" if kind == "train" else f"{first}{first}{last}",
            {"reference_answer": LETTERS[LETTERS.index(last) + 1]},
        )
        for first in starts
        for last in endings
    ]


TRAIN, VALIDATION = prompts("train"), prompts("validation", "ab")


class TabularLM(ExactLM):
    """Shares of next tokens in what was learned; where nothing was, the base."""

    def __init__(self, base: ExactLM, counts: Counts, name: str) -> None:
        super().__init__(base.alphabet)
        self.base, self.counts, self.name = base, counts, name

    def next_probabilities(self, prompt_ids, response_ids):
        found = self.counts.get(key(prompt_ids, response_ids))
        if found is None:
            return self.base.next_probabilities(prompt_ids, response_ids)
        row = np.zeros(self.vocab_size)
        for token, count in found.items():
            row[int(token)] = count
        return row / row.sum()


class CopyLM(ExactLM):
    """Writes the last letter of the prompt or, sometimes, its own start, and stops."""

    name = "copy"

    def __init__(self, others: float = 0.0) -> None:
        super().__init__(LETTERS)
        self.others = others

    def next_probabilities(self, prompt_ids, response_ids):
        row = np.zeros(self.vocab_size)
        if response_ids:
            row[STOP] = 1.0
            return row
        row[1:] = self.others / len(LETTERS)
        row[prompt_ids[-1]] += 1 - self.others
        return row


class TabularImprover:
    """Maximum likelihood by counting."""

    def described(self) -> Mapping[str, Any]:
        return {"kind": "tabular"}

    def improve(
        self, base, records: Sequence[Record], folder: Path, *, start_from=None, seed=0
    ) -> Improvement:
        counts: Counts = {} if start_from is None else read_counts(start_from)
        for record in records:
            prompt_ids = base.encode_prompt(record.prompt())
            for t, token in enumerate(record.response_ids):
                row = counts.setdefault(key(prompt_ids, record.response_ids[:t]), {})
                row[str(token)] = row.get(str(token), 0) + 1
        with write_folder(folder) as scratch:
            (scratch / "counts.json").write_text(json.dumps(counts, sort_keys=True))
        return Improvement(
            len(records), Usage(lm_flops=len(records)), {"went_on": bool(start_from)}
        )

    def serve(self, base, folder: Path) -> TabularLM:
        counts = read_counts(folder)
        digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()
        return TabularLM(base, counts, f"{base.name}+{digest[:8]}")


def key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    return f"{prompt_ids[-1]}|{','.join(map(str, response_ids))}"


def read_counts(folder: Path) -> Counts:
    return json.loads((Path(folder) / "counts.json").read_text())


class AnswerReward:
    """1 for the reference answer, 0 for anything else."""

    name = "answer"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [
            float(response == prompt.metadata["reference_answer"])
            for prompt, response in zip(prompts, responses, strict=True)
        ]


def make_value(lm, reward):
    return StackedValue(lm, reward, max_response_tokens=TOKENS)


def make_loop(folder: Path, settings: LoopSettings, **options: Any) -> ExpertIteration:
    """A loop in which the best policy writes nothing but the letter a, unless it is changed."""
    lm = options.pop("language_model", BASE)
    reward = options.pop("reward_model", CountReward())
    options.setdefault("improver", TabularImprover())
    train, validation = options.pop("train", TRAIN), options.pop("validation", VALIDATION)
    return ExpertIteration(lm, reward, train, validation, folder, settings, **options)


def expected_score(policy: ExactLM, reward: Any = None, tokens: int = TOKENS) -> float:
    """The exact mean score of plain sampling at temperature 1 on the validation prompts."""
    states = [initial(prompt, policy) for prompt in VALIDATION]
    value = ExactValue(policy, reward or CountReward(), tokens)
    return float(value.predict(states).mean.mean())
