"""Collect scored responses: the data that value models are fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from mbrl_text_env.agents.base import DEFAULT_PARAMS, Agent, Completion
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams, clear_cache
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.records import Record, RecordsError, RecordWriter
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardError, RewardLike, RewardModel, reward_name
from mbrl_text_env.runs import Each, identity, in_turn, prompt_digest
from mbrl_text_env.types import Ledger, Prompt, check_positive

# Of the samples and what is kept of them; changes when the same arguments give other records.
_FORMAT = 1


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
    """Sample responses to prompts, score them all, and write every one of them.

    What is there already is not sampled again: a collection that was killed goes on, and one with
    more prompts or samples adds what is missing, as if all had been asked for at once. A prompt
    with a response that cannot be scored is left out with a warning.

    Args:
        reward_model: Whatever `as_reward_model` takes.
        prompts: At least one, of different ids; texts too, and one alone.
        samples_per_prompt: Responses to each prompt; the article takes 4.
        batch_prompts: Prompts that are sampled together.
        on_batch: Called with the records of each batch, for progress.
        each: Where the batches are sampled (`RayWorkers`); they are written as they are done.

    Returns:
        The error of each prompt that was left out, by the prompt's id.

    Raises:
        RecordsError: The folder holds records of other models, settings or prompts, or some twice.
        RewardError: Not one prompt could be scored.
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
    for _, (records, lacking) in each(partial(_sampled, agent, seed), list(filter(None, batches))):
        for name, error in lacking.items():
            warnings.warn(f"Left out prompt {name!r}: {error}", stacklevel=2)
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
    """Whatever the records of `collect` depend on, apart from their prompts; JSON values."""
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
    """The samples, numbers from 0 to `samples`, that records of `collect` lack, by prompt; a
    RecordsError where some are of another prompt of the same id, or are there twice.
    """
    wanted = {prompt.id: prompt_digest(prompt) for prompt in prompts}
    there: dict[str, set[int | None]] = {name: set() for name in wanted}
    for record in records:
        name = record.prompt_id
        if name not in wanted:
            continue
        if prompt_digest(record.prompt()) != wanted[name]:
            raise RecordsError(
                f"The folder holds responses to another prompt {name!r}: expected the text, "
                f"metadata and split of this one, got the text {record.prompt_text[:60]!r}. "
                "Choose another folder, or give the prompt another id."
            )
        if record.sample in there[name]:
            raise RecordsError(
                f"The folder holds sample {record.sample} of prompt {name!r} twice. Move the shard "
                "that was copied into it out of the folder."
            )
        there[name].add(record.sample)
    return {name: [k for k in range(samples) if k not in found] for name, found in there.items()}


def _sampled(
    agent: Agent, seed: int, batch: Sequence[tuple[Prompt, list[int]]]
) -> tuple[list[Record], dict[str, str]]:
    """Records of samples, by their numbers; the errors of prompts that cannot be scored, by id."""
    # What a run computes does not depend on whether it was stopped before.
    clear_cache(agent.language_model)
    ledgers = {prompt.id: Ledger() for prompt, _ in batch}

    async def scored(prompt: Prompt, samples: list[int]) -> list[Completion] | RewardError:
        ledger = ledgers[prompt.id]
        first, state = samples[0], initial(prompt, agent.language_model)
        count = samples[-1] + 1 - first
        drawn = await agent.complete(state, count, ledger, seed, first_sample=first)
        try:
            return await agent.scored([drawn[k - first] for k in samples], ledger)
        except RewardError as error:
            return error

    found = run([partial(scored, *each) for each in batch])
    records, failed = [], {}
    for (prompt, samples), row in zip(batch, found, strict=True):
        if isinstance(row, RewardError):
            failed[prompt.id] = str(row)
            continue
        amounts = ledgers[prompt.id].usage.as_dict()
        usage = {key: amount / len(row) for key, amount in amounts.items()}
        rows = zip(row, samples, strict=True)
        records += [record_of(each, agent, usage, seed, sample=number) for each, number in rows]
    return records, failed


def record_of(
    completion: Completion, agent: Agent, usage: Mapping[str, float], seed: int, /, **changes: Any
) -> Record:
    """The record of an agent's scored completion; `changes` are fields that `Record` has beside."""
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
