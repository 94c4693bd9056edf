"""Collect scored responses to fit value models on."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from mbrl_text_env.agents.base import DEFAULT_PARAMS, Agent, Completion
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams, spawn_seed
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.records import Record, RecordsError, RecordWriter
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardError, RewardLike, RewardModel, reward_name
from mbrl_text_env.runs import Each, identity, in_turn, prompt_digest
from mbrl_text_env.types import Budget, Ledger, Prompt, TextState, Usage, check_positive

# Version of the sampling and the records; changes if the same arguments give other records.
_FORMAT = 1

Found = tuple[list[Record], Usage, dict[str, str]]
"""The records of answers, the usage, and the errors of skipped prompts, by prompt id."""


def collect(
    language_model: LanguageModel,
    reward_model: RewardLike,
    prompts: str | Prompt | Iterable[str | Prompt],
    writer: RecordWriter,
    *,
    samples_per_prompt: int = 4,
    max_response_tokens: int = 256,
    batch_prompts: int = 16,
    seed: int = 0,
    params: SamplingParams = DEFAULT_PARAMS,
    on_batch: Callable[[list[Record]], None] | None = None,
    each: Each = in_turn,
) -> dict[str, str]:
    """Sample responses to prompts, score them, and write all of them as records.

    Existing records are not sampled again. A collection that was killed can be resumed, and a call
    with more prompts or samples adds only the missing ones; the records are the same as from a
    single call. A prompt with a response that cannot be scored is skipped with a warning.

    Args:
        reward_model: Anything that `as_reward_model` accepts.
        prompts: At least one prompt, with distinct ids; strings and a single prompt also work.
        samples_per_prompt: Responses per prompt; the article uses 4.
        batch_prompts: Prompts per batch.
        on_batch: Called with the records of each batch, for progress.
        each: Runs the batches (for example `RayWorkers`); batches are written when done.

    Returns:
        The error of each skipped prompt, by prompt id.

    Raises:
        RecordsError: The folder has records of other models, settings or prompts, or duplicates.
        RewardError: No prompt could be scored.
    """
    check_positive(
        samples_per_prompt=samples_per_prompt,
        max_response_tokens=max_response_tokens,
        batch_prompts=batch_prompts,
    )
    prompts, reward_model = as_prompts(prompts), as_reward_model(reward_model)
    if not prompts:
        raise ValueError("collect: expected at least one prompt, got none.")
    limits: dict[str, Any] = {"max_response_tokens": max_response_tokens, "params": params}
    agent = Sampling(language_model, reward_model, **limits)
    writer.go_on(collection_run(language_model, reward_model, seed=seed, **limits))
    missing = missing_samples(writer.existing(), prompts, samples_per_prompt)
    failed: dict[str, str] = {}
    starts = range(0, len(prompts), batch_prompts)
    batches = [
        [(p, missing[p.id]) for p in prompts[start : start + batch_prompts] if missing[p.id]]
        for start in starts
    ]
    for _, (records, _, lacking) in each(
        partial(_sampled, agent, seed), list(filter(None, batches))
    ):
        for name, error in lacking.items():
            warnings.warn(f"Skipped prompt {name!r}: {error}", stacklevel=2)
        failed |= lacking
        if len(failed) == len(prompts):
            raise RewardError(
                f"None of {len(prompts)} prompts could be scored. The first error: "
                f"{next(iter(failed.values()))}"
            )
        writer.append_together(records)
        if on_batch is not None:
            on_batch(records)
    return failed


def collection_run(
    language_model: LanguageModel,
    reward_model: RewardModel,
    *,
    max_response_tokens: int,
    seed: int,
    params: SamplingParams = DEFAULT_PARAMS,
) -> dict[str, Any]:
    """Everything that the records of `collect` depend on except the prompts, as JSON values."""
    return {
        "format": _FORMAT,
        "language_model": identity(language_model),
        "reward": identity(reward_model),
        "max_response_tokens": max_response_tokens,
        "seed": seed,
        "params": identity(asdict(params)),
    }


def missing_samples(
    records: Sequence[Record], prompts: Sequence[Prompt], samples: int
) -> dict[str, list[int]]:
    """Return the sample numbers below `samples` that the records lack, by prompt. Raise a
    RecordsError if records belong to another prompt with the same id, or are duplicates.
    """
    wanted = {prompt.id: prompt_digest(prompt) for prompt in prompts}
    there: dict[str, set[int | None]] = {name: set() for name in wanted}
    for record in records:
        name = record.prompt_id
        if name not in wanted:
            continue
        if prompt_digest(record.prompt()) != wanted[name]:
            raise RecordsError(
                f"The folder holds responses to another prompt {name!r}: expected this prompt's "
                f"text, metadata and split, got the text {record.prompt_text[:60]!r}. "
                "Choose another folder, or give the prompt another id."
            )
        if record.sample in there[name]:
            raise RecordsError(
                f"The folder holds sample {record.sample} of prompt {name!r} twice. Move the "
                "duplicate shard out of the folder."
            )
        there[name].add(record.sample)
    return {name: [k for k in range(samples) if k not in found] for name, found in there.items()}


def _sampled(agent: Agent, seed: int, batch: Sequence[tuple[Prompt, list[int]]]) -> Found:
    # Each batch gets the same result whether the run was interrupted or not.
    agent.language_model.clear_cache()
    asked = [(prompt, prompt, numbers) for prompt, numbers in batch]
    return answered(agent, asked, seed, agent.name, are_samples=True)


def answered(
    agent: Agent,
    asked: Sequence[tuple[Prompt, Prompt, Sequence[int]]],
    seed: int,
    name: str,
    budget: Budget | None = None,
    *,
    are_samples: bool = False,
) -> Found:
    """Answer prompts: the agent sees the second of each pair; records keep the first.

    `name` is the agent's name in the records; `are_samples` keeps the answers' numbers.
    """
    agent.check_budget([second for _, second, _ in asked], budget)
    rows = run([partial(_answers, agent, budget, seed, *each) for each in asked])
    records, total, failed = [], Usage(), {}
    for (prompt, _, numbers), row in zip(asked, rows, strict=True):
        if isinstance(row, RewardError):
            failed[prompt.id] = str(row)
            continue
        places = iter(numbers)
        for answers, usage in row:
            total += usage
            share = {key: amount / len(answers) for key, amount in usage.as_dict().items()}
            for answer in answers:
                number = next(places) if are_samples else None
                changes = {"agent": name, "sample": number}
                records.append(record_of(answer, agent, share, seed, **changes))
    return records, total, failed


async def _answers(
    agent: Agent,
    budget: Budget | None,
    seed: int,
    prompt: Prompt,
    asked: Prompt,
    numbers: Sequence[int],
) -> list[tuple[list[Completion], Usage]] | RewardError:
    """Return a prompt's scored answers; answers in one list were paid for together."""
    state, ids = initial(asked, agent.language_model), agent.language_model.encode_prompt(prompt)
    found = []
    try:
        async for completions, usage in _drawn(agent, budget, seed, state, numbers):
            if asked is not prompt:
                # The response, as an answer to the original prompt.
                own: dict[str, Any] = {"prompt": prompt, "prompt_ids": ids, "logprob": None}
                completions = [Completion(replace(c.state, **own)) for c in completions]
            scoring = Ledger()
            if completions[0].score is None:
                completions = await agent.scored(completions, scoring)
            found.append((completions, usage + scoring.usage))
    except RewardError as error:
        return error
    return found


async def _drawn(
    agent: Agent, budget: Budget | None, seed: int, state: TextState, numbers: Sequence[int]
) -> AsyncIterator[tuple[list[Completion], Usage]]:
    """Plain samples in one call, which encodes the prompt once, or one answer at a time."""
    if isinstance(agent, Sampling):
        ledger, first, last = Ledger(), numbers[0], numbers[-1]
        drawn = await agent.complete(state, last + 1 - first, ledger, seed, first_sample=first)
        yield [drawn[k - first] for k in numbers], ledger.usage
        return
    for k in numbers:
        ledger = Ledger(budget)
        answer = await agent.search(state, ledger, spawn_seed(seed, 0, k))
        yield [answer], ledger.usage


def record_of(
    completion: Completion, agent: Agent, usage: Mapping[str, float], seed: int, /, **changes: Any
) -> Record:
    """The record of an agent's scored completion; `changes` sets further `Record` fields."""
    state, lm = completion.state, agent.language_model
    assert completion.score is not None
    fields: dict[str, Any] = {
        "response": lm.decode(state.response_ids),
        "logprobs": completion.logprobs,
        "score": completion.score,
        "rewards": dict(completion.parts),
        "reward_name": reward_name(agent.reward_model),
        "agent": agent.name,
        "language_model": lm.name,
        "seed": seed,
        "usage": usage,
    }
    return Record.from_state(state, **{**fields, **changes})
