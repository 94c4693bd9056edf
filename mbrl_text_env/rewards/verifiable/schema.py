"""A reward for responses that are JSON and satisfy a JSON Schema."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, RewardModel, Scores, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated
from mbrl_text_env.rewards.verifiable.partial_json import (
    Unfinished,
    UnfinishedObject,
    UnfinishedString,
    is_json,
    unfinished_json,
)
from mbrl_text_env.types import FloatArray, Prompt

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_HERE = "mbrl_text_env.rewards.verifiable.schema"

# A fence's opening line, a prefix of it, and a prefix of its closing line.
_OPENING = re.compile(r"```(?:json)?[ \t]*\n", re.IGNORECASE)
_BEFORE_OPENING = re.compile(r"`{0,3}|```(?:j|js|jso|json)?[ \t]*", re.IGNORECASE)
_CLOSING = re.compile(r"\n[ \t]*`{1,3}\s*\Z")
# Keywords that stay violated however an unfinished object, array or string continues.
_LASTING = frozenset(
    ("$ref", "$dynamicRef", "allOf", "anyOf", "properties", "patternProperties", "items",
     "additionalProperties", "prefixItems", "propertyNames", "maxItems", "maxProperties",
     "maxLength", "type")
)  # fmt: skip


@named("json-schema")
@dataclass(eq=False)
class JSONSchemaReward(RewardModel):
    """1 if the response is JSON that satisfies a schema, `partial_credit` for other JSON, else 0.

    The response must be a single JSON value (RFC 8259), optionally surrounded by white space. NaN,
    Infinity, nesting deeper than 100 levels, and integers of more than 4300 digits are not
    accepted. The schema dialect is draft 2020-12, in which `format` is not checked. References
    (`$ref`) are followed inside the schema; nothing is downloaded.

    The check runs in a process that is killed after `seconds` (`rewards.verifiable.isolated`), as
    patterns in a schema can take exponential time. A timeout is an error, as in `RegexReward`.

    `bound` is 0 if no text with the prefix is JSON, and `partial_credit` if none satisfies the
    schema according to types, names, enumerations, lengths and the complete values.

    The parts `parses` and `valid` are 0 or 1.

    Args:
        schema: The schema; None to read `prompt.metadata["schema"]`.
        code_fence: Also accept a value inside one Markdown code fence (```json).
        unique_names: Reject objects with duplicate names (RFC 7493). Otherwise the last value of a
            name counts, so for `bound`, no value in an unfinished object is final.
        partial_credit: The score, from 0 to 1, of JSON that does not satisfy the schema.
        seconds: Wall-clock time limit per check.

    Raises:
        RewardError: The schema is invalid, or the extra `verify` is not installed. Also when
            scoring, if a prompt has no schema, a reference cannot be resolved inside the schema, or
            the check takes too long. The message names the prompt.

    Example:
        >>> schema = {"type": "object", "required": ["name"]}
        >>> prompt = Prompt.from_text("Describe Ann in JSON.", "ann")
        >>> reward = JSONSchemaReward(schema, partial_credit=0.25)
        >>> reward.score([prompt] * 3, ['{"name": "Ann"}', "{}", "Ann"])  # doctest: +SKIP
        array([1.  , 0.25, 0.  ])
    """

    name = "json-schema"
    is_verifier = True
    part_names = ("parses", "valid")

    schema: Mapping[str, Any] | bool | None = None
    _: KW_ONLY
    code_fence: bool = False
    unique_names: bool = False
    partial_credit: float = 0.0
    seconds: float = 5.0
    _slow: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.partial_credit <= 1:
            raise ValueError(
                f"partial_credit: expected a number from 0 to 1, got {self.partial_credit!r}."
            )
        check_finite(self, "seconds", above=0)
        if self.schema is not None:
            _checked_schema(self.schema, f"Reward model {self.name!r}")

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether there is a schema, in the constructor or the prompt."""
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

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B] of 0, `partial_credit` or 1, see `RewardModel.bound`."""
        return np.array([self._bound(*row) for row in zip(prompts, prefixes, strict=True)])

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        schema, text = self._schema_of(prompt), prefix
        stripped = prefix.lstrip()
        if self.code_fence and stripped[:1] in ("", "`"):
            opening = _OPENING.match(stripped)
            if opening is None:
                return float(_BEFORE_OPENING.fullmatch(stripped) is not None)
            text = stripped[opening.end() :]
            if closing := _CLOSING.search(text):
                whole = f"```\n{text[: closing.start()]}\n```"
                return float(self.score([prompt], [whole])[0])
        try:
            unfinished_json(text, self.unique_names)
        except ValueError:
            return 0.0
        if schema in self._slow:
            return 1.0
        arguments = schema, text, self.unique_names
        # Only patterns and references can be slow.
        is_quick = '"pattern' not in schema and '"$' not in schema
        try:
            ask = may_satisfy if is_quick else partial(self._isolated, "may_satisfy")
            return 1.0 if ask(*arguments) else self.partial_credit
        except IsolatedError:
            self._slow.add(schema)
            return 1.0

    def _schema_of(self, prompt: Prompt) -> str:
        given = prompt.metadata.get("schema") if self.schema is None else self.schema
        return _checked_schema(given, f"Reward model {self.name!r}, prompt {prompt.id!r}")

    def _isolated(self, function: str, *arguments: Any) -> Any:
        prepare = [f"{_HERE}:load_jsonschema"]
        return call_isolated(
            f"{_HERE}:{function}", *arguments, seconds=self.seconds, prepare=prepare
        )

    def _verdict(self, prompt: Prompt, response: str) -> tuple[bool, bool]:
        context = f"Reward model {self.name!r}, prompt {prompt.id!r}"
        schema = self._schema_of(prompt)
        fence = _FENCE.fullmatch(response.strip()) if self.code_fence else None
        text = response if fence is None else fence[1]
        if not is_json(text, self.unique_names):
            return False, False
        try:
            problem, valid = self._isolated("validate", schema, text)
        except IsolatedError as error:
            problem, valid = str(error), False
        if problem is not None:
            raise RewardError(
                f"{context}, response {response[:80]!r}: expected a schema that can be checked, "
                f"got {schema[:200]} ({problem}). Fix the schema: put the definitions that it "
                "refers to into its `$defs`, and rewrite patterns with nested repetitions."
            )
        return True, valid


def load_jsonschema() -> None:
    """Import jsonschema, in the helper process."""
    optional("jsonschema", RewardError)
    # The validator needs several frames per level of a value.
    sys.setrecursionlimit(5000)


def validate(schema: str, text: str) -> tuple[str | None, bool]:
    """Return the problem of a schema, or None, and whether a JSON text satisfies the schema."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry downloads nothing, unlike the validator's default one.
    validator = Draft202012Validator(json.loads(schema), registry=Registry())
    try:
        return None, validator.is_valid(json.loads(text))
    except Unresolvable as error:
        return f"it refers to {error.ref!r}, which is not in the schema", False
    except RecursionError:
        return "it has an infinite reference loop", False


def may_satisfy(schema: str, text: str, unique_names: bool) -> bool:
    """Return whether JSON with a prefix can satisfy a schema; True if that is not known."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        value = unfinished_json(text, unique_names)
        return bool(_lenient()(json.loads(schema), registry=Registry()).is_valid(value))
    except (Unresolvable, RecursionError):
        # Scoring reports the problem of the schema.
        return True


@lru_cache(maxsize=1)
def _lenient() -> Any:
    """Return jsonschema's validator, changed to accept unfinished values that can become valid."""
    jsonschema = optional("jsonschema", RewardError)
    strict = jsonschema.Draft202012Validator.VALIDATORS

    def lenient(keyword: str) -> Any:
        def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            if not isinstance(instance, Unfinished):
                yield from strict[keyword](validator, value, instance, schema) or ()
            elif keyword in ("enum", "const"):
                wanted = value if keyword == "enum" else [value]
                if not any(_may_become(instance, each) for each in wanted):
                    yield jsonschema.ValidationError("no allowed value starts with this")
            elif keyword == "oneOf":
                yield from strict["anyOf"](validator, value, instance, schema) or ()
            elif keyword in _LASTING and (keyword != "type" or type(instance) is not Unfinished):
                yield from strict[keyword](validator, value, instance, schema) or ()
            closed = keyword == "additionalProperties" and value is False
            if closed and not _may_be_named(instance, schema):
                yield jsonschema.ValidationError("no property name starts with this")

        return check

    checks = {keyword: lenient(keyword) for keyword in strict}
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, checks)


def _may_become(value: Unfinished, wanted: Any) -> bool:
    if isinstance(value, UnfinishedString):
        return isinstance(wanted, str) and wanted.startswith(value)
    kinds = [kind for kind in (dict, list, float) if isinstance(value, kind)]
    number = kinds == [float] and isinstance(wanted, int | float) and not isinstance(wanted, bool)
    return not kinds or number or isinstance(wanted, kinds[0])


def _may_be_named(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether an object's unfinished name can become one of the schema's properties."""
    begun = value.name if isinstance(value, UnfinishedObject) else None
    if begun is None or schema.get("patternProperties"):
        return True
    return any(name.startswith(begun) for name in schema.get("properties", {}))


def _checked_schema(schema: Any, context: str) -> str:
    """Return the schema as JSON text, or raise an error that starts with the context."""
    try:
        text = json.dumps(schema, allow_nan=False)
        problem = "it is null" if schema is None else _schema_problem(text)
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise RewardError(
            f"{context}: expected a JSON Schema of draft 2020-12, got {str(schema)[:200]} "
            f"({problem}). Fix it, or set metadata['schema']."
        )
    return text


@lru_cache(maxsize=1000)
def _schema_problem(schema: str) -> str | None:
    jsonschema = optional("jsonschema", RewardError)
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    except jsonschema.SchemaError as error:
        return f"at {error.json_path}: {error.message}"
    return None
