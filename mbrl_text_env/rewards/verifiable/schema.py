"""Responses that are JSON and satisfy a JSON Schema."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mbrl_text_env.files import refuse_constant
from mbrl_text_env.rewards.base import RewardError, RewardModel, Scores
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated, import_optional
from mbrl_text_env.types import FloatArray, Prompt

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_HERE = "mbrl_text_env.rewards.verifiable.schema"

MAX_DEPTH = 100
"""JSON that is nested deeper counts as not parsed, wherever the parser itself gives up."""


@named("json-schema")
@dataclass(eq=False)
class JSONSchemaReward(RewardModel):
    """1 if the response is JSON that satisfies a schema, else 0, or part of 1 for any JSON.

    The response has to be one JSON value as RFC 8259 defines it, with nothing but white space
    around it: NaN and Infinity are none, and neither is a value nested more than `MAX_DEPTH` deep,
    nor an integer of more than 4300 digits. The schema is of draft 2020-12; as there, `format` is
    not checked. References (`$ref`) are followed inside the schema; none is fetched.

    The check runs in a process that is killed after `seconds` (`rewards.verifiable.isolated`), for
    a schema's own patterns can take exponential time. That is an error, as in `RegexReward`.

    Parts: `parses` and `valid`, zeros and ones.

    Args:
        schema: The schema; None to read `prompt.metadata["schema"]`.
        code_fence: Accept the value inside one Markdown code fence (```json), too.
        partial_credit: The score, from 0 to 1, of JSON that does not satisfy the schema.
        seconds: Wall-clock time that one check may take.

    Raises:
        RewardError: The schema is not valid, or the extra `verify` is not installed. When scoring,
            too: a prompt, which the message names, has none, or one that refers to something
            outside itself, or the check took too long.

    Example:
        >>> schema = {"type": "object", "required": ["name"]}
        >>> prompt = Prompt.from_text("Describe Ann in JSON.", "ann")
        >>> reward = JSONSchemaReward(schema, partial_credit=0.25)
        >>> reward.score([prompt] * 3, ['{"name": "Ann"}', "{}", "Ann"])  # doctest: +SKIP
        array([1.  , 0.25, 0.  ])
    """

    name = "json-schema"
    part_names = ("parses", "valid")

    schema: Mapping[str, Any] | bool | None = None
    _: KW_ONLY
    code_fence: bool = False
    partial_credit: float = 0.0
    seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.partial_credit <= 1:
            raise ValueError(
                f"partial_credit: expected a number from 0 to 1, got {self.partial_credit!r}."
            )
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds: expected a positive number, got {self.seconds!r}.")
        if self.schema is not None:
            _checked_schema(self.schema, f"Reward model {self.name!r}")

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether there is a schema, the constructor's or the prompt's."""
        return self.schema is not None or prompt.metadata.get("schema") is not None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B] in [0, 1]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the scores with the parts `parses` and `valid`, each float64[B] of 0 and 1."""
        rows = [self._verdict(*row) for row in zip(prompts, responses, strict=True)]
        parses, valid = np.array(rows, dtype=np.float64).reshape(-1, 2).T
        total = np.where(valid == 1, 1.0, self.partial_credit * parses)
        return Scores(total, {"parses": parses, "valid": valid})

    def _verdict(self, prompt: Prompt, response: str) -> tuple[bool, bool]:
        context = f"Reward model {self.name!r}, prompt {prompt.id!r}"
        given = prompt.metadata.get("schema") if self.schema is None else self.schema
        schema = _checked_schema(given, context)
        fence = _FENCE.fullmatch(response.strip()) if self.code_fence else None
        text = response if fence is None else fence[1]
        if not _is_json(text):
            return False, False
        limits: Any = {"seconds": self.seconds, "prepare": [f"{_HERE}:load_jsonschema"]}
        try:
            problem, valid = call_isolated(f"{_HERE}:validate", schema, text, **limits)
        except IsolatedError as error:
            problem, valid = str(error), False
        if problem is not None:
            raise RewardError(
                f"{context}, response {response[:80]!r}: expected a schema that can be checked, "
                f"got {schema[:200]} ({problem}). Mend the schema: put what it refers to into its "
                "`$defs`, and rewrite patterns with repetitions inside repetitions."
            )
        return True, valid


def load_jsonschema() -> None:
    """Import jsonschema, in the helper process."""
    import_optional("jsonschema", "jsonschema", "verify")
    # Each level of a value takes several frames of the validator.
    sys.setrecursionlimit(5000)


def validate(schema: str, text: str) -> tuple[str | None, bool]:
    """What is wrong with a schema, if anything, and whether a JSON text satisfies it."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry fetches nothing; the validator's default one asks the network.
    validator = Draft202012Validator(json.loads(schema), registry=Registry())
    try:
        return None, validator.is_valid(json.loads(text))
    except Unresolvable as error:
        return f"it refers to {error.ref!r}, which is not in it", False
    except RecursionError:
        return "it refers to itself without end", False


def _checked_schema(schema: Any, context: str) -> str:
    """The schema as JSON text; the error that it is none begins with the context."""
    try:
        text = json.dumps(schema, allow_nan=False)
        problem = "it is null" if schema is None else _schema_problem(text)
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise RewardError(
            f"{context}: expected a JSON Schema of draft 2020-12, got {str(schema)[:200]} "
            f"({problem}). Mend it, or put one into metadata['schema']."
        )
    return text


@lru_cache(maxsize=1000)
def _schema_problem(schema: str) -> str | None:
    jsonschema = import_optional("jsonschema", "jsonschema", "verify")
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    except jsonschema.SchemaError as error:
        return f"at {error.json_path}: {error.message}"
    return None


def _is_json(text: str) -> bool:
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        parents = [each for each in level if isinstance(each, dict | list)]
        level = [c for each in parents for c in (each.values() if isinstance(each, dict) else each)]
    return not level
