"""The pool of an audit: n responses to each prompt, in a records folder that belongs to no reward.

Both rewards score the same responses. What was generated and what was scored is on the disk after
each batch, so an audit that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from agents.collection import collect
from benchmarks.audit.curves import FloatArray
from benchmarks.audit.sensitivity import INTERVENTIONS, intervene
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import initial, response_limit
from mbrl_text_env.records import Record, RecordWriter
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import Prompt

# Responses are lost by the batch when an audit is killed.
_BATCH_PROMPTS = 4


class AuditError(ValueError):
    """An audit that cannot be run as asked."""


class _Characters:
    """Records need a score; this one costs nothing and favours no reward that is audited."""

    name = "characters"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(len(response)) for response in responses]


def fill_pool(
    folder: Path,
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_response_tokens: int,
    seed: int,
    shared: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Record]]:
    """Read the pool, generating what is missing of it as `collect` does (temperature 0.7).

    Args:
        folder: A records folder; one written by `mbrl-text collect` will do.
        language_model: Writes the responses.
        prompts: The prompts.
        samples: Responses to each prompt; of more, the first are taken.
        max_response_tokens: Token limit of a response.
        seed: Of the sampling.
        shared: Whether the folder may hold responses to other prompts alone; otherwise that is
            taken for a mistake.
        on_batch: Called with the number of responses that are there, for progress.

    Returns:
        The records, `samples` to each prompt.

    Raises:
        AuditError: The folder holds responses of another model, seed or token limit, to other
            prompts, or fewer to a prompt.
        RecordsError: The folder cannot be read or written.
    """
    # One shard a batch: a kill leaves whole batches, never some of a prompt's responses.
    with RecordWriter(folder, shard_rows=_BATCH_PROMPTS * samples) as writer:
        rows = _by_prompt(writer.existing(), prompts)
        if not (rows or shared):
            _check_others(writer.existing(), prompts, folder)
        missing = [prompt for prompt in prompts if prompt.id not in rows]
        for prompt in prompts:
            if prompt.id in rows:
                _check_row(folder, rows[prompt.id], prompt, language_model, samples, seed)
                _check_limit(folder, rows[prompt.id], language_model, max_response_tokens)
        report = on_batch or (lambda count: None)
        report((len(prompts) - len(missing)) * samples)

        def keep(records: list[Record]) -> None:
            for record in records:
                rows.setdefault(record.prompt_id, []).append(record)
            report(len(records))

        if missing:
            collect(
                language_model,
                _Characters(),
                missing,
                writer,
                samples_per_prompt=samples,
                max_response_tokens=max_response_tokens,
                batch_prompts=_BATCH_PROMPTS,
                seed=seed,
                on_batch=keep,
            )
    return [rows[prompt.id][:samples] for prompt in prompts]


def score_pool(
    folder: Path,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    *,
    tried: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Score the pool, and the first `tried` responses to each prompt after each intervention.

    Args:
        folder: Where the scores are kept, one file a prompt; it belongs to this reward.
        reward_model: Scores the responses.
        prompts: The prompts.
        responses: The same number to each prompt.
        tried: Responses to each prompt that the interventions are tried on.
        on_batch: Called with 1 after each prompt, for progress.

    Returns:
        float64[prompts, samples], and by intervention float64[prompts, tried].

    Raises:
        RewardError: The reward model failed; the message names the prompt.
    """
    rows = []
    for prompt, texts in zip(prompts, responses, strict=True):
        changed = {name: [intervene(name, t) for t in texts[:tried]] for name in INTERVENTIONS}
        # Named by what was scored: scores of other texts are never taken for these.
        key = json.dumps([prompt.id, prompt.text, texts, changed]).encode()
        path = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
        if not path.exists():
            write_text(path, json.dumps(_scores(reward_model, prompt, texts, changed)))
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        if on_batch is not None:
            on_batch(1)
    plain = np.array([row["pool"] for row in rows], dtype=np.float64)
    return plain, {
        name: np.array([row["interventions"][name] for row in rows], dtype=np.float64)
        for name in INTERVENTIONS
    }


def _scores(
    reward_model: RewardModel,
    prompt: Prompt,
    responses: Sequence[str],
    changed: dict[str, list[str]],
) -> dict[str, Any]:
    # Equal texts have equal scores: each is scored once.
    texts = list(dict.fromkeys([*responses, *chain.from_iterable(changed.values())]))
    totals = score_responses(reward_model, [prompt] * len(texts), texts).total
    score = dict(zip(texts, totals.tolist(), strict=True))
    return {
        "pool": [score[text] for text in responses],
        "interventions": {name: [score[t] for t in texts] for name, texts in changed.items()},
    }


def _by_prompt(records: Sequence[Record], prompts: Sequence[Prompt]) -> dict[str, list[Record]]:
    wanted = {prompt.id for prompt in prompts}
    rows: dict[str, list[Record]] = {}
    for record in records:
        if record.prompt_id in wanted:
            rows.setdefault(record.prompt_id, []).append(record)
    return rows


def _check_others(records: Sequence[Record], prompts: Sequence[Prompt], folder: Path) -> None:
    if records:
        there = list(dict.fromkeys(record.prompt_id for record in records))
        raise AuditError(
            f"{folder} holds responses to other prompts ({', '.join(there[:3])}, ...; expected "
            f"{prompts[0].id}, ...). Give the --prompts, --split and --seed it was made with, or "
            "another --pool."
        )


def _check_row(
    folder: Path,
    records: Sequence[Record],
    prompt: Prompt,
    language_model: LanguageModel,
    samples: int,
    seed: int,
) -> None:
    """Make sure that a prompt's records are what this audit would have generated."""
    first = records[0]
    differences: dict[str, tuple[set[Any], Any]] = {
        "prompt text": ({r.prompt_text for r in records}, prompt.text),
        "language model": ({r.language_model for r in records}, language_model.name),
        "agent": ({r.agent for r in records}, "sampling"),
        "seed": ({r.seed for r in records}, seed),
    }
    for what, (there, here) in differences.items():
        if there != {here}:
            raise AuditError(
                f"{folder}, prompt {first.prompt_id!r}: expected responses of {what} {here!r}, got "
                f"{sorted(map(str, there))}. Give the options it was made with, or another --pool."
            )
    if len(records) < samples:
        raise AuditError(
            f"{folder}, prompt {first.prompt_id!r}: expected {samples} responses, got "
            f"{len(records)}. Ask for at most as many samples, or give another folder."
        )


def _check_limit(
    folder: Path, records: Sequence[Record], language_model: LanguageModel, max_tokens: int
) -> None:
    """Make sure that responses were cut where this audit would have cut them."""
    limit = response_limit(initial(records[0].prompt(), language_model), language_model, max_tokens)
    longest = max(len(record.response_ids) for record in records)
    cut = {len(record.response_ids) for record in records if record.finish_reason == "length"}
    if longest > limit or cut - {limit}:
        raise AuditError(
            f"{folder}, prompt {records[0].prompt_id!r}: expected responses of at most {limit} "
            f"tokens, got a pool cut at {max(cut, default=longest)}. Give the "
            "--max-response-tokens it was made with, or another --pool."
        )
