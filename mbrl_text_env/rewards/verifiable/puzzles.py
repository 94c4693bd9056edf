"""A reward for reasoning-gym puzzles, which uses the scorer of each task."""

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
"""Tasks whose scorers `eval` the response."""

EXPRESSION_TASKS = frozenset(
    ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
     "simple_integration")
)  # fmt: skip
"""Tasks whose scorers pass the response to `sympy.parse_expr`, which runs it as Python code."""

UNREPEATABLE_TASKS = frozenset(
    ("isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication",
     "ransom_note", "word_ladder")
)  # fmt: skip
"""Tasks that generate different puzzles in each Python process because they draw from sets. Their
scorers need only the prompt's metadata."""

MISJUDGED_TASKS = frozenset({"game_of_life_halting"})
"""Tasks whose scorers accept any answer; here, the answer must equal the reference answer."""

_FUNCTIONS = (
    "Abs|acos|acosh|acot|asin|asinh|atan|atanh|cos|cosh|cot|coth|csc|erf|exp|ln|log|pi|sec|sin|"
    "sinh|sqrt|tan|tanh"
)
# Numbers, one-letter variables, known functions and operators. Attributes, strings and calls of
# other functions do not match.
_EXPRESSION = re.compile(
    rf"(?:\s|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?![\w.])|\.\d+(?![\w.])|[-+*/^(),]"
    rf"|(?<!\w)(?:{_FUNCTIONS}|[A-Za-z])(?!\w))+"
)


@named("reasoning-gym")
@dataclass(eq=False)
class ReasoningGymReward(AnswerReward):
    """The score of reasoning-gym's own scorer for the prompt's task, usually 0 to 1.

    It scores answers to the prompts of `prompts.reasoning_gym_prompts`. Scorers need objects that
    JSON cannot represent, so the puzzle is generated again from `metadata["reasoning_gym_source"]`,
    and compared with the prompt. (`UNREPEATABLE_TASKS` are scored with the prompt's other metadata
    instead.) The task decides which wrong answers get partial credit; an empty answer scores 0.

    Responses are untrusted, and some scorers run them as Python. All scorers run in a process that
    is killed after `seconds` (`rewards.verifiable.isolated`). In addition:

    - `EVALUATED_TASKS`: `eval` is replaced by `ast.literal_eval`, which accepts only literals.
    - `EXPRESSION_TASKS`: an answer that is not an expression of numbers, one-letter variables,
      operators and common functions scores 0 and is not parsed.
    - `MISJUDGED_TASKS`: 1 for the reference answer, otherwise 0.
    - An answer for which the scorer raises, or runs out of time or memory, scores 0.

    Source: Stojanovski et al., "Reasoning Gym: Reasoning Environments for Reinforcement Learning
    with Verifiable Rewards", 2025, https://github.com/open-thought/reasoning-gym.

    Args:
        extract: How to find the answer in the response; see `rewards.verifiable.answers`.
        seconds: Wall-clock time limit per score.

    Raises:
        RewardError: When scoring, if the extra `data` is not installed, or a prompt has no source
            or one that gives another puzzle (another version). The message names the prompt.

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
        """Return whether the prompt has the source of its puzzle."""
        source = prompt.metadata.get(_SOURCE)
        return isinstance(source, Mapping) and set(source) == _SOURCE_KEYS

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        return math.inf  # Not all tasks guarantee a maximum of 1.

    def _score(self, prompt: Prompt, response: str) -> float:
        source = prompt.metadata.get(_SOURCE)
        if not self.applies_to(prompt):
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected metadata[{_SOURCE!r}] "
                f"with {sorted(_SOURCE_KEYS)}, got {source!r}. Create the prompts with "
                "`mbrl_text_env.prompts.reasoning_gym_prompts`, or remove those that the reward "
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
    """Return, as JSON, a puzzle's source and, for `UNREPEATABLE_TASKS`, the puzzle itself."""
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
    """Generate a puzzle, in the helper process; `RewardError` unless it is in the prompt's text."""
    given = json.loads(puzzle)
    source, stored = given["source"], given["entry"]
    if stored and None in stored.values():
        raise RewardError(
            f"expected metadata['reference_answer'] and metadata['reasoning_gym'], because "
            f"{source['task']!r} cannot be scored without, got {stored}. Create the prompt again."
        )
    try:
        _, _, entry = _made(puzzle)
    except RewardError:
        raise
    except Exception as error:  # Tasks check their settings with assertions, among others.
        raise RewardError(
            f"expected the source of a reasoning-gym puzzle, got {source} "
            f"({type(error).__name__}: {error}). Recreate the prompt with the installed version."
        ) from error
    if entry["question"] not in text:
        raise RewardError(
            f"expected the question generated from {source}, {entry['question'][:80]!r}, got a "
            "prompt without it. Recreate the prompt with the installed version of reasoning-gym."
        )


def score_answer(puzzle: str, answer: str) -> float:
    """Return the task's score of an answer, in the helper process; raise if it is not finite."""
    task, dataset, entry = _made(puzzle)
    if task in EXPRESSION_TASKS and not _EXPRESSION.fullmatch(answer):
        return 0.0
    if task in MISJUDGED_TASKS:
        return float(answer == entry["answer"])
    # Some scorers modify the entry.
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
        # A name in the module takes precedence over the builtin.
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset
