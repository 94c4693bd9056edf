"""Puzzles of reasoning-gym, scored by each task's own scorer."""

from __future__ import annotations

import ast
import copy
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.answers import AnswerReward, extract_answer
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated
from mbrl_text_env.types import Prompt

_HERE = "mbrl_text_env.rewards.verifiable.puzzles"
_SOURCE = "reasoning_gym_source"
_SOURCE_KEYS = frozenset({"task", "seed", "size", "config", "index"})

EVALUATED_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorers would `eval` the response."""

EXPRESSION_TASKS = frozenset(
    ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
     "simple_integration")
)  # fmt: skip
"""Tasks whose scorers pass the response to `sympy.parse_expr`, which runs it as Python."""

UNREPEATABLE_TASKS = frozenset(
    ("isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication",
     "ransom_note", "word_ladder")
)  # fmt: skip
"""Tasks that make other puzzles in each Python process, as they draw from sets; their scorers need
nothing but what the prompt's metadata hold."""

MISJUDGED_TASKS = frozenset({"game_of_life_halting"})
"""Tasks whose scorers accept any answer: the reference answer is compared with instead."""

_FUNCTIONS = (
    "Abs|acos|acosh|acot|asin|asinh|atan|atanh|cos|cosh|cot|coth|csc|erf|exp|ln|log|pi|sec|sin|"
    "sinh|sqrt|tan|tanh"
)
# Numbers, variables of one letter, known functions and operators: no attribute, text or call of
# anything else can be written with them.
_EXPRESSION = re.compile(
    rf"(?:\s|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?![\w.])|\.\d+(?![\w.])|[-+*/^(),]"
    rf"|(?<!\w)(?:{_FUNCTIONS}|[A-Za-z])(?!\w))+"
)


@named("reasoning-gym")
@dataclass(eq=False)
class ReasoningGymReward(AnswerReward):
    """The score that reasoning-gym's own scorer of the prompt's task gives, usually 0 to 1.

    It scores answers to the prompts of `prompts.reasoning_gym_prompts`. The puzzle is made again
    from its `metadata["reasoning_gym_source"]`, because scorers need what JSON cannot hold, and has
    to be the one of the prompt. (`UNREPEATABLE_TASKS` are scored by the prompt's other metadata.)
    Which wrong answers get part of the score is up to the task; an empty answer gets 0.

    Responses are untrusted, and some scorers run them as Python. All run in a process that is
    killed after `seconds` (`rewards.verifiable.isolated`); beyond that:

    - `EVALUATED_TASKS`: `eval` is replaced by `ast.literal_eval`, so that an answer may be a
      literal list, and no other Python.
    - `EXPRESSION_TASKS`: an answer other than an expression of numbers, one-letter variables,
      operators and usual functions scores 0 without being read.
    - `MISJUDGED_TASKS`: 1 for the reference answer, else 0.
    - An answer with which the scorer raises, or is out of time or memory, scores 0.

    Source: Stojanovski et al., "Reasoning Gym: Reasoning Environments for Reinforcement Learning
    with Verifiable Rewards", 2025, https://github.com/open-thought/reasoning-gym.

    Args:
        extract: Where in the response the answer stands; see `rewards.verifiable.answers`.
        seconds: Wall-clock time that one scoring may take.

    Raises:
        RewardError: When scoring: the extra `data` is not installed, or a prompt, which the message
            names, has no source, or one that makes another puzzle here, by another version.

    Example:
        >>> from mbrl_text_env.prompts import reasoning_gym_prompts
        >>> prompts = reasoning_gym_prompts("chain_sum", size=1, seed=0)  # doctest: +SKIP
        >>> ReasoningGymReward().score(prompts, ["4"])  # doctest: +SKIP
        array([1.])
    """

    name = "reasoning-gym"

    _: KW_ONLY
    seconds: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, "seconds", above=0)

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt says what its puzzle is made from."""
        source = prompt.metadata.get(_SOURCE)
        return isinstance(source, Mapping) and set(source) == _SOURCE_KEYS

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        return math.inf  # Not all tasks promise that 1 is the most.

    def _score(self, prompt: Prompt, response: str) -> float:
        source = prompt.metadata.get(_SOURCE)
        if not self.applies_to(prompt):
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected metadata[{_SOURCE!r}] "
                f"with {sorted(_SOURCE_KEYS)}, got {source!r}. Make the prompts with "
                "`mbrl_text_env.prompts.reasoning_gym_prompts`, or leave out those that the reward "
                "does not apply to."
            )
        answer = extract_answer(response, self.extract)
        if answer is None:
            return 0.0
        puzzle = _puzzle_of(prompt)
        prepare = [f"{_HERE}:check_puzzle", puzzle, prompt.text]
        work = f"{_HERE}:score_answer"
        try:
            score = call_isolated(work, puzzle, answer, seconds=self.seconds, prepare=prepare)
            return float(score)
        except RewardError as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: {error}"
            ) from error
        except IsolatedError:
            return 0.0


def _puzzle_of(prompt: Prompt) -> str:
    """What the helper process makes a puzzle of: its source and, if it has to, the entry itself."""
    source = dict(prompt.metadata[_SOURCE])
    puzzle: dict[str, Any] = {"source": source, "entry": None}
    if source["task"] in UNREPEATABLE_TASKS:
        puzzle["entry"] = {
            "question": prompt.text,
            "answer": prompt.metadata.get("reference_answer"),
            "metadata": prompt.metadata.get("reasoning_gym"),
        }
    return json.dumps(puzzle, sort_keys=True)


def check_puzzle(puzzle: str, text: str) -> None:
    """Make a puzzle, in the helper process; `RewardError` unless the prompt's text asks it."""
    given = json.loads(puzzle)
    source, stored = given["source"], given["entry"]
    if stored and None in stored.values():
        raise RewardError(
            f"expected metadata['reference_answer'] and metadata['reasoning_gym'], without which "
            f"{source['task']!r} cannot be scored, got {stored}. Make the prompt again."
        )
    try:
        _, _, entry = _made(puzzle)
    except RewardError:
        raise
    except Exception as error:  # The tasks check their settings with assertions, among others.
        raise RewardError(
            f"expected the source of a puzzle of reasoning-gym, got {source} "
            f"({type(error).__name__}: {error}). Make the prompt again with the installed version."
        ) from error
    if entry["question"] not in text:
        raise RewardError(
            f"expected the question that {source} makes, {entry['question'][:80]!r}, got a prompt "
            "without it. Make the prompt again with the installed version of reasoning-gym."
        )


def score_answer(puzzle: str, answer: str) -> float:
    """The task's own score of an answer, in the helper process; a finite number."""
    task, dataset, entry = _made(puzzle)
    if task in EXPRESSION_TASKS and not _EXPRESSION.fullmatch(answer):
        return 0.0
    if task in MISJUDGED_TASKS:
        return float(answer == entry["answer"])
    # Some scorers change the entry.
    score = float(dataset.score_answer(answer, copy.deepcopy(entry)))
    if not math.isfinite(score):
        raise ValueError(f"expected a finite score, got {score}")
    return score


@lru_cache(maxsize=4096)
def _made(puzzle: str) -> tuple[str, Any, dict[str, Any]]:
    given = json.loads(puzzle)
    source, entry = given["source"], given["entry"]
    index = source.pop("index")
    dataset = _dataset(json.dumps(source))
    return source["task"], dataset, dataset[index] if entry is None else entry


@lru_cache(maxsize=64)
def _dataset(source: str) -> Any:
    reasoning_gym = optional("reasoning_gym", RewardError)
    given = json.loads(source)
    task, config = given.pop("task"), given.pop("config")
    dataset = reasoning_gym.create_dataset(task, **given, **config)
    if task in EVALUATED_TASKS:
        # A module's own name comes before the builtin one.
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset
