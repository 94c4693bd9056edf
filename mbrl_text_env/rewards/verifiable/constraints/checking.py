"""Check constraints on responses and prefixes, and score the fraction that is satisfied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import ProcessRewardModel, RewardError
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.constraints.kinds import (
    CONSTRAINT_TYPES,
    COUNTED,
    LANGUAGES,
    RELATIONS,
    Kind,
    LanguageCode,
    Letter,
    Verdict,
)
from mbrl_text_env.rewards.verifiable.constraints.suggestions import suggestions
from mbrl_text_env.types import FloatArray, Prompt, nearest


class ConstraintError(ValueError):
    """Raised if a constraint has an unknown type or wrong arguments, or a prompt has none."""


def check_constraint(
    constraint: Mapping[str, Any], response: str, prompt: str | None = None
) -> bool:
    """Return whether a response satisfies a constraint; an empty response satisfies none.

    Args:
        constraint: `{"type": name, ...arguments}`; the name is one of `CONSTRAINT_TYPES`.
        response: The response's text.
        prompt: The prompt's text; required by `repeats_prompt`.

    Raises:
        ConstraintError: The type is unknown, an argument is missing, unexpected or of a wrong type,
            or the constraint needs the prompt.

    Example:
        >>> check_constraint({"type": "max_words", "value": 3}, "Short and sweet.")
        True
    """
    kind, arguments = _read(constraint, prompt)
    return bool(response.strip()) and kind(response, **arguments)


def prefix_verdict(
    constraint: Mapping[str, Any], prefix: str, prompt: str | None = None
) -> Verdict:
    """Return the result of `check_constraint` for every response with a prefix, or None if open.

    It can also be None if the result is not known. For an empty prefix, it is None.

    Example:
        >>> prefix_verdict({"type": "no_commas"}, "Well, ")
        False
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river")  # "rivers"?
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river ")
        True
    """
    kind, arguments = _read(constraint, prompt)
    return kind.decide(prefix, False, **arguments) if prefix.strip() else None


def count_behind(constraint: Mapping[str, Any], prompt: str | None = None) -> tuple[str, ...]:
    """Return the names, in `world_model`, of the counts that decide a constraint.

    Raises:
        ConstraintError: Counts do not decide the constraint.
    """
    _, given = _read(constraint, prompt)
    name = constraint["type"]
    if name in RELATIONS:
        counted, _ = RELATIONS[name]
        argument = COUNTED[counted].argument
        if argument is None:
            return (counted,)
        # Letters are counted ignoring case.
        value = given[argument]
        return (f"{counted}:{value.lower() if counted == 'letters' else value}",)
    if name not in _OF_FEATURES:
        known = sorted({*RELATIONS, *_OF_FEATURES})
        raise ConstraintError(
            f"Expected constraints on counts, of the types {known}, got {name!r}. Remove the "
            "prompt, or use another value model."
        )
    return _OF_FEATURES[name][0]


def check_counts(
    constraint: Mapping[str, Any], features: Mapping[str, Any], prompt: str | None = None
) -> Any:
    """Return bool[N], whether responses with these counts satisfy it; see `count_behind`."""
    found = [features[name] for name in count_behind(constraint, prompt)]
    name = constraint["type"]
    if name not in RELATIONS:
        return _OF_FEATURES[name][1](*found)
    return RELATIONS[name][1](found[0], constraint["value"])


# The features that decide other constraints, and the decision.
_OF_FEATURES: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "no_commas": (("commas",), lambda commas: commas == 0),
    "lowercase": (("capitals", "small_letters"), lambda big, small: (big == 0) & (small > 0)),
    "uppercase": (("capitals", "small_letters"), lambda big, small: (small == 0) & (big > 0)),
}


def _read(constraint: Mapping[str, Any], prompt: str | None) -> tuple[Kind, dict[str, Any]]:
    """Return the constraint's type, and the arguments of its check besides the response."""
    name = constraint.get("type") if isinstance(constraint, Mapping) else None
    if not isinstance(name, str):
        raise ConstraintError(
            f"Expected a constraint such as {{'type': 'max_words', 'value': 50}}, got "
            f"{constraint!r}. Pass an object whose 'type' is a string."
        )
    kind = CONSTRAINT_TYPES.get(name)
    if kind is None:
        raise ConstraintError(
            f"Expected a known constraint type, got {name!r}.{nearest(name, CONSTRAINT_TYPES)} "
            f"Change it to one of: {', '.join(sorted(CONSTRAINT_TYPES))}."
        )
    # In tables (Arrow, pandas), every row has the keys of all rows, with None for missing values.
    given = {key: value for key, value in constraint.items() if value is not None and key != "type"}
    expected = {key: hint for key, hint in kind.arguments.items() if key != "prompt"}
    for change, keys in (
        ("Add", expected.keys() - given.keys()),
        ("Remove", given.keys() - expected.keys()),
    ):
        if keys:
            raise ConstraintError(
                f"Constraint {name!r}: expected {_listed(expected)}, got {_listed(given)}. "
                f"{change} {_listed(keys)}."
            )
    for key, hint in expected.items():
        if not _is_a(hint, given[key]):
            raise ConstraintError(
                f"Constraint {name!r}: expected {key!r} to be {_DESCRIPTIONS[hint]}, got "
                f"{given[key]!r}. Change it."
            )
    if "prompt" not in kind.arguments:
        return kind, given
    if prompt is None:
        raise ConstraintError(
            f"Constraint {name!r}: expected the prompt's text, got none. Call "
            "check_constraint(constraint, response, prompt)."
        )
    return kind, {**given, "prompt": prompt}


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names))) or "no arguments"


_DESCRIPTIONS: Mapping[Any, str] = {
    int: "an integer of at least 1",
    str: "a string that is not blank",
    list[str]: "a list of at least one string, none of them blank",
    Letter: "one letter, digit or mark",
    LanguageCode: f"a language's code, one of {', '.join(sorted(LANGUAGES))}",
}


def _is_a(hint: Any, value: object) -> bool:
    match value:
        case bool():  # A subclass of int, but `true` in a JSON file is not a count.
            return False
        case int():
            return hint is int and value >= 1
        case str() if hint is Letter:
            return len(value) == 1 and not value.isspace()
        case str() if hint is LanguageCode:
            return value in LANGUAGES
        case str():
            return hint is str and bool(value.strip())
        case list() | tuple():
            return hint == list[str] and bool(value) and all(_is_a(str, each) for each in value)
    return False


@named("constraints")
class ConstraintsReward(ProcessRewardModel):
    """The fraction of the prompt's constraints that a response satisfies, in [0, 1].

    The constraints are the list `prompt.metadata["constraints"]`. A prompt without constraints, or
    with a malformed one, raises a `ConstraintError` that names the prompt.

    Example:
        >>> constraints = [{"type": "lowercase"}, {"type": "max_words", "value": 2}]
        >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
        >>> ConstraintsReward().score([prompt, prompt], ["good day", "Good day"])
        array([1. , 0.5])
    """

    name = "constraints"
    is_verifier = True

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt has constraints."""
        return bool(prompt.metadata.get("constraints"))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the fraction of constraints that each response satisfies."""
        return np.array([_fraction(*row) for row in zip(prompts, responses, strict=True)], float)

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B], the fraction of constraints that a prefix can still satisfy."""
        rows = zip(prompts, prefixes, strict=True)
        return np.array([self._within_reach(prompt, [prefix])[0] for prompt, prefix in rows], float)

    def feature_names(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the counts that decide the prompt's constraints, and "visible" (characters)."""
        request = _request(prompt)
        try:
            found = [name for c in _constraints(prompt) for name in count_behind(c, request)]
        except ConstraintError as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: {error}"
            ) from error
        return (*dict.fromkeys(found), "visible")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the fraction of constraints that responses with these counts meet."""
        constraints, request = _constraints(prompt), _request(prompt)
        kept = [check_counts(each, features, request) for each in constraints]
        return np.where(features["visible"] > 0, np.mean(kept, axis=0), 0.0)

    def suggest(self, prompt: Prompt, prefix: str) -> tuple[str, ...]:
        """Return pieces of text that unmet constraints require (see `suggestions`)."""
        constraints, request = _constraints(prompt), _request(prompt)
        unmet = [each for each in constraints if not check_constraint(each, prefix, request)]
        return suggestions(unmet, prefix)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the highest score still possible after each step.

        For a step before the last, this is the fraction of constraints that the response up to its
        end can still satisfy (`prefix_verdict` is not False). After the last step, it is the score
        of the response. The scores therefore never increase.
        """
        if not steps:
            return np.zeros(0)
        final = _fraction(prompt, "".join(steps))
        return np.array([*self._within_reach(prompt, steps[:-1]), final], dtype=np.float64)

    def _within_reach(self, prompt: Prompt, steps: Sequence[str]) -> list[float]:
        constraints = kept = _constraints(prompt)
        prefix, scores, request = "", list[float](), _request(prompt)
        for step in steps:
            prefix += step
            kept = [each for each in kept if prefix_verdict(each, prefix, request) is not False]
            scores.append(len(kept) / len(constraints))
        return scores


def _constraints(prompt: Prompt) -> Sequence[Mapping[str, Any]]:
    constraints: Any = prompt.metadata.get("constraints")
    if not isinstance(constraints, list | tuple) or not constraints:
        raise ConstraintError(
            f"Prompt {prompt.id!r}: expected metadata['constraints'] to be a list of at least one "
            f"constraint, got {constraints!r}. Add constraints, or remove the prompts for which "
            "`ConstraintsReward.applies_to(prompt)` is False."
        )
    return constraints


def _fraction(prompt: Prompt, response: str) -> float:
    constraints = _constraints(prompt)
    try:
        kept = [check_constraint(each, response, _request(prompt)) for each in constraints]
    except ConstraintError as error:
        raise ConstraintError(f"Prompt {prompt.id!r}: {error}") from error
    return sum(kept) / len(kept)


def _request(prompt: Prompt) -> str:
    """Return the text that the response answers: the prompt, or its last user message."""
    if isinstance(prompt.content, str):
        return prompt.content
    asked = [message.content for message in prompt.content if message.role == "user"]
    return asked[-1] if asked else prompt.text
