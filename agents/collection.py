"""Collect scored responses: the data that value models are fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from agents.base import DEFAULT_PARAMS, Completion, check_positive
from agents.best_of_n import BestOfN
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.records import Record, RecordWriter
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    isolate_failures,
    reward_name,
)
from mbrl_text_env.types import Prompt


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
) -> dict[str, str]:
    """Sample responses to prompts, score them all, and write every one of them.

    Low scores are kept too: a value model learns from the whole range. After every batch the
    records are on the disk. A prompt with a response that the reward model cannot score is left out
    with a warning; the others are not lost.

    Args:
        language_model: Proposes responses.
        reward_model: Scores them; whatever `as_reward_model` takes.
        prompts: At least one; texts too, and one alone.
        writer: Takes the records.
        samples_per_prompt: Responses to each prompt; the article takes 4.
        max_response_tokens: Token limit of a response.
        batch_prompts: Prompts that are sampled together.
        seed: The responses follow from it.
        params: How tokens are drawn.
        on_batch: Called with the records of each batch, for progress.

    Returns:
        The error of each prompt that was left out, by the prompt's id.

    Raises:
        ValueError: There are no prompts, or a count is below 1.
        RewardError: Not one prompt could be scored.
    """
    check_positive(
        samples_per_prompt=samples_per_prompt,
        max_response_tokens=max_response_tokens,
        batch_prompts=batch_prompts,
    )
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("collect: expected at least one prompt, got none.")
    agent = BestOfN(
        language_model,
        reward_model,
        n=samples_per_prompt,
        max_response_tokens=max_response_tokens,
        params=params,
    )
    failed: dict[str, str] = {}
    for start in range(0, len(prompts), batch_prompts):
        batch = prompts[start : start + batch_prompts]
        states = [initial(prompt, language_model) for prompt in batch]
        ledgers = [Ledger() for _ in batch]
        drawn = agent.complete(states, samples_per_prompt, ledgers, seed)
        pairs = list(zip(drawn, ledgers, strict=True))
        rows = isolate_failures(
            lambda some: agent.scored([row for row, _ in some], [ledger for _, ledger in some]),
            pairs,
        )
        records = [
            _record(completion, agent, ledger, seed)
            for row, ledger in zip(rows, ledgers, strict=True)
            if not isinstance(row, RewardError)
            for completion in row
        ]
        for prompt, row in zip(batch, rows, strict=True):
            if isinstance(row, RewardError):
                warnings.warn(f"Left out prompt {prompt.id!r}: {row}", stacklevel=2)
                failed[prompt.id] = str(row)
        if len(failed) == len(prompts):
            raise RewardError(
                f"None of {len(prompts)} prompts could be scored. The first error: "
                f"{next(iter(failed.values()))}"
            )
        writer.extend(records)
        writer.flush()
        if on_batch is not None:
            on_batch(records)
    return failed


def _record(completion: Completion, agent: BestOfN, ledger: Ledger, seed: int) -> Record:
    state, lm = completion.state, agent.language_model
    assert completion.score is not None
    share = {key: amount / (agent.n or 1) for key, amount in ledger.usage.as_dict().items()}
    return Record.from_state(
        state,
        response=lm.decode(state.response_ids),
        logprobs=completion.logprobs,
        score=completion.score,
        rewards=dict(completion.parts),
        reward_name=reward_name(agent.reward_model),
        agent="sampling",
        language_model=lm.name,
        seed=seed,
        usage=share,
    )
