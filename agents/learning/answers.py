"""Scored answers of any agent to many prompts, with a second try for those who need a hint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from mbrl_text_env.agents.base import Agent, Completion
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning.filters import CORRECT
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.ledger import Budget, BudgetError, Ledger, Usage
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record, RecordWriter
from mbrl_text_env.rewards.base import RewardError, isolate_failures, reward_name
from mbrl_text_env.types import Prompt, TextState

HINTED = "+hint"
"""Ends the agent's name in records of answers that were found with a hint."""

Hint = Callable[[Prompt], Prompt | None]
"""A prompt with a hint, with the same id and metadata; None where there is nothing to tell."""


def collect_answers(
    agent: Agent,
    prompts: Sequence[Prompt],
    writer: RecordWriter,
    *,
    answers: int = 1,
    budget: Budget | None = None,
    batch_prompts: int = 16,
    seed: int = 0,
    hint: Hint | None = None,
    ledger: Ledger | None = None,
) -> dict[str, str]:
    """Answer prompts with an agent, and write every answer with its score.

    A prompt with an answer that cannot be scored is left out with a warning.

    Args:
        agent: With a reward model, which scores the answers of agents that ask for no score too.
        prompts: Of different ids.
        writer: Takes the records.
        answers: To each prompt, of different seeds.
        budget: Caps on each answer.
        batch_prompts: Prompts that are answered together.
        seed: The answers follow from it.
        hint: Where no answer to a prompt is correct (`CORRECT`), it is answered as often again with
            this hint. The record is then of the prompt without the hint, its agent's name ends in
            `HINTED`, and it has no log-probabilities, for these would be of another prompt.
        ledger: Is charged for all.

    Returns:
        The error of each prompt that was left out, by its id.

    Raises:
        RewardError: Not one prompt could be scored.
        BudgetError: The budget allows no complete response.
    """
    ledger = Ledger() if ledger is None else ledger
    failed: dict[str, str] = {}

    def answered(
        batch: Sequence[Prompt], asked: Sequence[Prompt], seed: int, name: str
    ) -> set[str]:
        """Write the answers; the prompts that have a correct one, or none at all."""
        pairs = list(zip(batch, asked, strict=True))
        rows = isolate_failures(lambda some: _answered(agent, some, answers, budget, seed), pairs)
        done = set()
        for prompt, row in zip(batch, rows, strict=True):
            if isinstance(row, RewardError):
                warnings.warn(f"Left out prompt {prompt.id!r}: {row}", stacklevel=4)
                failed.setdefault(prompt.id, str(row))
                done.add(prompt.id)
                continue
            for completion, usage in row:
                ledger.charge(usage)
                record = _record(agent, completion, usage, name, seed)
                writer.append(record)
                if record.score >= CORRECT:
                    done.add(prompt.id)
        writer.flush()
        return done

    for batch in _batches(prompts, batch_prompts):
        done = answered(batch, batch, seed, agent.name)
        if hint is None:
            continue
        told = [(prompt, hint(prompt)) for prompt in batch if prompt.id not in done]
        wrong = [(prompt, asked) for prompt, asked in told if asked is not None]
        if wrong:
            again, asked = zip(*wrong, strict=True)
            answered(again, asked, spawn_seed(seed, 1), agent.name + HINTED)
    if len(failed) == len(prompts):
        raise RewardError(
            f"None of {len(prompts)} prompts could be scored. The first error: "
            f"{next(iter(failed.values()), 'there are no prompts')}"
        )
    return failed


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _answered(
    agent: Agent,
    pairs: Sequence[tuple[Prompt, Prompt]],
    answers: int,
    budget: Budget | None,
    seed: int,
) -> list[list[tuple[Completion, Usage]]]:
    """Scored answers to each first prompt, found by asking the second."""
    asked = [second for _, second in pairs]
    if isinstance(agent, Sampling):
        rows = _sampled(agent, asked, answers, budget, seed)
    else:
        rounds = [
            agent.generate(asked, budget, seed=spawn_seed(seed, 0, k)) for k in range(answers)
        ]
        rows = [[(g.completion, g.usage) for g in row] for row in zip(*rounds, strict=True)]
    own = [
        [(_of(agent, completion, first, second), usage) for completion, usage in row]
        for (first, second), row in zip(pairs, rows, strict=True)
    ]
    return _scored(agent, own)


def _sampled(
    agent: Agent, prompts: Sequence[Prompt], answers: int, budget: Budget | None, seed: int
) -> list[list[tuple[Completion, Usage]]]:
    """All answers of a prompt in one call, which computes the prompt once."""
    states = [initial(prompt, agent.language_model) for prompt in prompts]
    for state in states:
        least = agent.response_usage(state)
        if not Ledger(budget).affords(least):
            raise BudgetError(
                f"{budget} is too small for one response to prompt {state.prompt.id!r}: that can "
                f"take {least.generated_tokens} tokens and {least.flops:.3g} FLOPs. Raise the "
                "budget or lower max_response_tokens."
            )
    ledgers = [Ledger() for _ in states]
    rows = run(
        [
            partial(agent.complete, state, answers, ledger, seed)
            for state, ledger in zip(states, ledgers, strict=True)
        ]
    )
    return [
        [(completion, _share(ledger.usage, answers, k)) for k, completion in enumerate(row)]
        for row, ledger in zip(rows, ledgers, strict=True)
    ]


def _share(usage: Usage, parts: int, index: int) -> Usage:
    """One of several parts that add up to the whole; counts stay whole numbers."""
    amounts = {}
    for name, amount in vars(usage).items():
        if isinstance(amount, int):
            amounts[name] = amount * (index + 1) // parts - amount * index // parts
        else:
            amounts[name] = amount / parts
    return Usage(**amounts)


def _of(agent: Agent, completion: Completion, prompt: Prompt, asked: Prompt) -> Completion:
    """The same response as an answer to the prompt that was not told anything."""
    if asked is prompt:
        return completion
    told = completion.state
    ids = agent.language_model.encode_prompt(prompt)
    state = TextState(prompt, ids, told.response_ids, told.finish_reason, told.chunk_ends)
    return Completion(state)


def _scored(
    agent: Agent, rows: Sequence[Sequence[tuple[Completion, Usage]]]
) -> list[list[tuple[Completion, Usage]]]:
    """Score what has no score yet; what that takes is added to each answer's usage."""
    plain = [(completion, usage) for row in rows for completion, usage in row]
    missing = [i for i, (completion, _) in enumerate(plain) if completion.score is None]
    if missing:
        ledgers = [Ledger() for _ in missing]
        found = run(
            [
                partial(agent.scored, [plain[i][0]], ledger)
                for i, ledger in zip(missing, ledgers, strict=True)
            ]
        )
        for i, [completion], ledger in zip(missing, found, ledgers, strict=True):
            plain[i] = completion, plain[i][1] + ledger.usage
    numbered = iter(plain)
    return [[next(numbered) for _ in row] for row in rows]


def _record(agent: Agent, completion: Completion, usage: Usage, name: str, seed: int) -> Record:
    state, lm = completion.state, agent.language_model
    assert completion.score is not None
    return Record.from_state(
        replace(state, logprob=None),
        response=lm.decode(state.response_ids),
        logprobs=completion.logprobs,
        score=completion.score,
        rewards=dict(completion.parts),
        reward_name=reward_name(agent.reward_model),
        agent=name,
        language_model=lm.name,
        seed=seed,
        usage=usage.as_dict(),
    )
