"""Collect scored responses: the data that value models are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agents.base import DEFAULT_PARAMS, Completion, check_positive
from agents.best_of_n import BestOfN
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record, RecordWriter
from mbrl_text_env.rewards.base import RewardModel, reward_name
from mbrl_text_env.types import Prompt


def collect(
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    writer: RecordWriter,
    *,
    samples_per_prompt: int = 4,
    max_response_tokens: int = 256,
    batch_prompts: int = 16,
    seed: int = 0,
    params: SamplingParams = DEFAULT_PARAMS,
    on_batch: Callable[[list[Record]], None] | None = None,
) -> None:
    """Sample responses to prompts, score them all, and write every one of them.

    Low scores are kept too: a value model learns from the whole range. After every batch the
    records are on the disk.

    Args:
        language_model: Proposes responses.
        reward_model: Scores them.
        prompts: At least one.
        writer: Takes the records.
        samples_per_prompt: Responses to each prompt; the article takes 4.
        max_response_tokens: Token limit of a response.
        batch_prompts: Prompts that are sampled together.
        seed: The responses follow from it.
        params: How tokens are drawn.
        on_batch: Called with the records of each batch, for progress.

    Raises:
        ValueError: There are no prompts, or a count is below 1.
    """
    check_positive(
        samples_per_prompt=samples_per_prompt,
        max_response_tokens=max_response_tokens,
        batch_prompts=batch_prompts,
    )
    if not prompts:
        raise ValueError("collect: expected at least one prompt, got none.")
    agent = BestOfN(
        language_model,
        reward_model,
        n=samples_per_prompt,
        max_response_tokens=max_response_tokens,
        params=params,
    )
    for start in range(0, len(prompts), batch_prompts):
        batch = prompts[start : start + batch_prompts]
        states = [initial(prompt, language_model) for prompt in batch]
        ledgers = [Ledger() for _ in batch]
        drawn = agent.complete(states, samples_per_prompt, ledgers, seed)
        rows = agent.scored(drawn, ledgers)
        records = [
            _record(completion, agent, ledger, seed)
            for row, ledger in zip(rows, ledgers, strict=True)
            for completion in row
        ]
        writer.extend(records)
        writer.flush()
        if on_batch is not None:
            on_batch(records)


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
