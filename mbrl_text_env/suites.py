"""Prompt suites with verifiable answers: prompts, reward and reference answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any, NamedTuple

from mbrl_text_env.prompts import (
    PromptError,
    check_filters,
    load_prompts,
    only,
    reasoning_gym_prompts,
)
from mbrl_text_env.types import Message, Prompt, Split, nearest

REASONING_TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 1},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "fraction_simplification": {"max_value": 100, "max_factor": 10, "styles": ("plain",)},
    "gcd": {"max_value": 50},
    "group_anagrams": {"max_anagram_groups": 3, "max_words_per_group": 3},
    "needle_haystack": {"min_num_statements": 5, "max_num_statements": 12},
    "number_filtering": {"max_numbers": 6},
    "number_sequence": {"max_complexity": 2},
    "products": {"max_digits": 2},
    "word_sequence_reversal": {"max_words": 6},
}
"""The tasks of `suite:reasoning` with their settings. Tasks on which a constant answer is right
as often as a model (letter_counting, binary_alternation, count_primes, count_bits,
isomorphic_strings) are left out."""

_REASONING_SEED = 20_000
_CANDIDATES = 240
# Questions per task; every second one is a test question.
_QUESTIONS, _VALIDATION = 80, 12
# At most a fifth of the questions have the same answer; without this, 1 is right in 60% of gcd.
_SAME_ANSWER = _QUESTIONS // 5
_ANSWER_WITH_SQL = "Answer with one SQLite query in a ```sql block, and nothing else."


class Suite(NamedTuple):
    """A suite: name of its reward, loader of its prompts (by kind) and default `shots`."""

    reward: str
    load: Callable[[str | None], list[Prompt]]
    shots: int = 0


def load_suite(
    name: str, *, split: str | None = None, kind: str | None = None, shots: int | None = None
) -> list[Prompt]:
    """Load the prompts of a suite: `"constraints"`, `"reasoning"`, `"code"` or `"sql"`.

    Except in `"constraints"`, prompts have a `metadata["reference_answer"]`, which gets 1 from the
    suite's reward (`SUITES[name].reward`). The prompts are the same in every call, and no question
    is in two splits. In `"reasoning"`, each of ten tasks has 40 test questions.

    Args:
        split: Keep only `"train"`, `"validation"` or `"test"`.
        kind: Keep only prompts with this `metadata["kind"]`: a task of `"reasoning"` or a database
            of `"sql"`.
        shots: Number of examples with answers before each question, as chat turns. They are the
            first train prompts of the question's kind, which are then left out. All prompts of a
            kind start with the same examples, so a prefix cache stores them once. By default 4 in
            `"reasoning"`, else 0.

    Raises:
        PromptError: The suite is unknown, no prompt is left, there are too few examples, or, for
            `"reasoning"`, the extra `data` is not installed.

    Example:
        >>> prompts = load_suite("sql", split="test", kind="library")
        >>> len(prompts), prompts[0].metadata["reference_answer"]
        (10, 'SELECT count(*) FROM books')
    """
    suite = SUITES.get(name)
    if suite is None:
        raise PromptError(
            f"Expected a suite, one of {list(SUITES)}, got {name!r}.{nearest(name, SUITES)}"
        )
    check_filters(split)
    shots = suite.shots if shots is None else shots
    return only(f"suite:{name}", _with_examples(name, suite.load(kind), shots), split, kind)


def _with_examples(name: str, prompts: list[Prompt], shots: int) -> list[Prompt]:
    """Put the examples before each prompt; drop the prompts that are examples."""
    if shots == 0:
        return prompts
    examples: dict[str, list[Prompt]] = {prompt.metadata["kind"]: [] for prompt in prompts}
    for prompt in prompts:
        if prompt.split == "train" and "reference_answer" in prompt.metadata:
            examples[prompt.metadata["kind"]].append(prompt)
    most = min(map(len, examples.values()))
    if not 0 <= shots <= most:
        raise PromptError(f"suite:{name}: expected shots from 0 to {most}, got {shots}.")
    turns: dict[str, tuple[Message, ...]] = {}
    for kind, own in examples.items():
        pairs = [(Message("user", p.text), Message("assistant", _answer(p))) for p in own[:shots]]
        turns[kind] = tuple(message for pair in pairs for message in pair)
    used = {prompt.id for own in examples.values() for prompt in own[:shots]}
    return [
        replace(prompt, content=(*turns[prompt.metadata["kind"]], Message("user", prompt.text)))
        for prompt in prompts
        if prompt.id not in used
    ]


def _answer(prompt: Prompt) -> str:
    """The reference answer as a response, with programs in a code block."""
    answer = str(prompt.metadata["reference_answer"])
    language = next((v for k, v in {"tests": "python", "database": "sql"}.items()
                     if k in prompt.metadata), None)  # fmt: skip
    return f"```{language}\n{answer}\n```" if language else answer


def _reasoning(kind: str | None) -> list[Prompt]:
    tasks = REASONING_TASKS if kind not in REASONING_TASKS else {kind: REASONING_TASKS[kind]}
    return [prompt for task in tasks for prompt in _questions(task)]


def _questions(task: str) -> list[Prompt]:
    seen, answers, kept = set[str](), Counter[str](), list[Prompt]()
    settings = REASONING_TASKS[task]
    found = reasoning_gym_prompts(task, size=_CANDIDATES, seed=_REASONING_SEED, **settings)
    for prompt in found:
        answer = prompt.metadata["reference_answer"]
        if prompt.text not in seen and answers[answer] < _SAME_ANSWER:
            seen.add(prompt.text)
            answers[answer] += 1
            kept.append(prompt)
    others: list[Split] = ["validation"] * _VALIDATION
    others += ["train"] * (_QUESTIONS // 2 - _VALIDATION)
    splits = [split for other in others for split in ("test", other)]
    # The splits have similar answers; left-over questions are dropped.
    return [replace(p, split=s) for p, s in zip(kept, splits, strict=False)]


def _sql() -> list[Prompt]:
    """The questions, each with the tables of its database."""
    prompts = []
    for prompt in _of_file("sql.jsonl"):
        database = (_DATA / f"{prompt.metadata['kind']}.sql").read_text("utf-8")
        tables = database.partition("INSERT")[0].strip()
        text = f"A database has these tables:\n\n{tables}\n\n{prompt.text} {_ANSWER_WITH_SQL}"
        metadata = {**prompt.metadata, "database": database}
        prompts.append(replace(prompt, content=(Message("user", text),), metadata=metadata))
    return prompts


_DATA = resources.files("mbrl_text_env") / "data"


def _of_file(name: str) -> list[Prompt]:
    with resources.as_file(_DATA / name) as path:
        return load_prompts(path)


SUITES = {
    "constraints": Suite(
        "constraints", lambda _: [p for p in load_prompts() if "constraints" in p.metadata]
    ),
    "reasoning": Suite("reasoning-gym", _reasoning, shots=4),
    "code": Suite("unit-tests", lambda _: _of_file("code.jsonl")),
    "sql": Suite("sql", lambda _: _sql()),
}
"""The suites by name, as in `--prompts suite:NAME`."""
