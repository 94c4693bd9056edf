"""What value models are fitted on: prefixes of scored responses, at many lengths at once.

A search asks for the value of prefixes of every length, so every length is fitted. The prefixes are
cut in tokens, and all prefixes of a prompt's responses are kept together when some are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mbrl_text_env.fitting.samples import FitError, Samples
from mbrl_text_env.types import FloatArray, TextState
from mbrl_text_env.values import LENGTHS

if TYPE_CHECKING:
    from mbrl_text_env.agents.values.fitted import FittedValue
    from mbrl_text_env.records import Record


def cut_prefixes(
    records: Sequence[Record], lengths: Sequence[int] = LENGTHS
) -> tuple[list[TextState], list[Record]]:
    """Cut partial responses out of complete ones.

    Every length below a response's own gives one prefix; a response that is too short for all of
    them, but has two tokens, gives its first half. The whole response is left out: its value is
    its score, and nothing is to be learned.

    Returns:
        The states, and the record that each is a prefix of.

    Raises:
        FitError: A record has no token ids, or no response has two tokens.

    Example:
        >>> states, of = cut_prefixes(records, lengths=(8, 16))  # doctest: +SKIP
        >>> [len(state.response_ids) for state in states[:2]]  # doctest: +SKIP
        [8, 16]
    """
    states, owners = [], []
    for record in records:
        size = len(record.response_ids)
        if not record.prompt_ids or (record.response and not size):
            raise FitError(
                f"Record of prompt {record.prompt_id!r}: expected token ids of prompt and "
                f"response, got {len(record.prompt_ids)} and {size}. Collect the records with "
                "`mbrl-text collect`, which keeps them."
            )
        below = [length for length in lengths if length < size]
        for length in below or ([size // 2] if size > 1 else []):
            states.append(record.prefix_state(length))
            owners.append(record)
    if not states:
        raise FitError(
            f"Expected responses of at least 2 tokens, got {len(records)} without a single "
            "prefix. Collect longer responses."
        )
    return states, owners


def samples_of(
    inputs: FloatArray, owners: Sequence[Record], lengths: Sequence[int] | None = None
) -> Samples:
    """Put inputs beside the scores of the records that they are of.

    Raises:
        FitError: An input is not finite.
    """
    inputs = np.asarray(inputs, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(inputs).all(axis=1))
    if bad.size:
        raise FitError(
            f"Expected finite inputs, got others for {bad.size} of {len(owners)} prefixes, first "
            f"of prompt {owners[bad[0]].prompt_id!r}. Fix the encoder or the language model."
        )
    _, groups = np.unique([record.prompt_id for record in owners], return_inverse=True)
    return Samples(
        inputs,
        np.asarray([record.score for record in owners], dtype=np.float64),
        np.asarray([0] * len(owners) if lengths is None else lengths, dtype=np.int64),
        groups.astype(np.int64),
    )


def cut_samples(value: FittedValue, records: Sequence[Record]) -> Samples:
    """Prefixes of the value's lengths as it sees them, uncharged."""
    states, owners = cut_prefixes(records, value.lengths)
    return samples_of(value.inputs(states), owners, [len(s.response_ids) for s in states])


def check_records(records: Sequence[Record]) -> None:
    """Refuse records that no value can be learned from.

    Raises:
        FitError: There are fewer than two, their scores come from several reward models, their
            responses from several language models, or all their scores are equal.
    """
    if len(records) < 2:
        raise FitError(
            f"Expected at least 2 scored records to fit a value model, got {len(records)}. Collect "
            "more with `mbrl-text collect`."
        )
    rewards = sorted({record.reward_name for record in records})
    if len(rewards) > 1:
        raise FitError(
            f"Expected scores of one reward model, got those of {rewards}. Re-score the records "
            "with one of them (`records.rescore`)."
        )
    models = sorted({record.language_model for record in records})
    if len(models) > 1:
        raise FitError(
            f"Expected responses of one language model, got those of {models}. A value is that of "
            "what one model writes: fit one for each."
        )
    scores = {record.score for record in records}
    if len(scores) == 1:
        raise FitError(
            f"Expected scores that differ, got {scores.pop()!r} {len(records)} times: there is no "
            "signal to learn from. Collect responses to other prompts, more of them, or score them "
            "with another reward model."
        )


def check_lengths(lengths: Sequence[int]) -> None:
    """Refuse prefix lengths that are not increasing and positive.

    Raises:
        ValueError: They are not.
    """
    increasing = all(a < b for a, b in itertools.pairwise(lengths))
    if not lengths or min(lengths) < 1 or not increasing:
        raise ValueError(
            f"lengths: expected prefix lengths of at least 1 token in increasing order, got "
            f"{tuple(lengths)}."
        )
