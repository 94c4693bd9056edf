"""The checker of agents. It knows them by what they do, for this package does not import agents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import CheckError, counted, expect, expect_error, expect_methods
from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.types import (
    Budget,
    BudgetError,
    BudgetExceededError,
    Chunk,
    Prompt,
    TextState,
    Usage,
    initial,
    is_terminal,
    response_limit,
    transition,
)

_TOLERANCE = 1e-5
_METHODS = ("generate", "act")
_ATTRIBUTES = ("language_model", "reward_model", "max_response_tokens", "chunk_tokens")
# Shares of a response: exactly one, one and a bit, and several.
_BUDGETS = (1.0, 1.4, 3.0, 5.7)


def check_agent(
    agent: Any, prompts: Sequence[Prompt], *, budget_tokens: int | None = None, seed: int = 0
) -> None:
    """Check that an agent keeps the contract of `agents.Agent`.

    Checked are `generate`: one complete response a prompt, in order, with the score that the reward
    model gives it; that it follows from the seed and is the same alone and in a batch; that every
    generated token and every reward call is in the ledger, and within budgets from one response up;
    and `act`: chunks that begin the decision's completion and lead to the end.

    While it is checked, the methods of the agent's models are replaced by ones that count, so do
    not use these models elsewhere at the same time. Every prompt is answered some two dozen times.
    Check an agent with a toy language model: rounding in a network can change tokens with the
    batch.

    Args:
        agent: Has `generate(prompts, budget, seed=)`, `act(states, budget, seed=)`,
            `language_model`, `reward_model` (or None), `max_response_tokens` and `chunk_tokens`.
        prompts: At least one; better several of different lengths.
        budget_tokens: The least budget that has to be enough, in generated tokens; by default one
            response's worth: `max_response_tokens`, or what the context leaves for it. One token
            less has to be refused.
        seed: Of the answers.

    Raises:
        CheckError: The contract is broken.
        ValueError: There are no prompts.

    Example:
        >>> from mbrl_text_env.agents import Sampling
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import Prompt
        >>> check_agent(Sampling(NGramLM("ab")), [Prompt.from_text("a"), Prompt.from_text("ab")])
    """
    if not prompts:
        raise ValueError("check_agent: expected at least one prompt, got none.")
    subject = f"Agent {getattr(agent, 'name', type(agent).__name__)!r}"
    expect_methods(
        agent,
        (*_METHODS, *_ATTRIBUTES),
        subject,
        "Derive it from `agents.Agent`, or add them.",
    )
    least = _longest_response(agent, prompts) if budget_tokens is None else budget_tokens
    trial = _Trial(agent, subject, tuple(prompts), least, seed)
    _check_determinism(trial)
    _check_seed(trial)
    _check_batching(trial)
    _check_budgets(trial)
    _check_acting(trial)


def _longest_response(agent: Any, prompts: Sequence[Prompt]) -> int:
    lm = agent.language_model
    return max(response_limit(initial(p, lm), lm, agent.max_response_tokens) for p in prompts)


@dataclass
class _Counts:
    """What an agent asked of its models; `streams` are the seeds and first samples of its draws."""

    tokens: int = 0
    reward_calls: int = 0
    streams: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def of_sample(
        self,
        chunks: Sequence[Sequence[Chunk]],
        *args: Any,
        seeds: Sequence[int],
        first_sample: int = 0,
        params: SamplingParams = SamplingParams(),
        **options: Any,
    ) -> None:
        self.tokens += sum(len(chunk) for row in chunks for chunk in row)
        if params.temperature > 0 and params.top_k != 1:
            self.streams.append((tuple(seeds), first_sample))

    def of_score(self, scores: object, prompts: object, responses: Sequence[str]) -> None:
        self.reward_calls += len(responses)

    def of_steps(self, scores: object, prompt: object, steps: object) -> None:
        """Count a call of `score_steps`, which scores one response."""
        self.reward_calls += 1


@dataclass(frozen=True)
class _Trial:
    """An agent under check; `least` generated tokens have to be enough for one response."""

    agent: Any
    subject: str
    prompts: tuple[Prompt, ...]
    least: int
    seed: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget: Budget | None = None,
        *,
        seed: int | None = None,
        counts: _Counts | None = None,
    ) -> list[Any]:
        """Answers of the agent, each checked, and their cost compared with what was asked for."""
        counts = _Counts() if counts is None else counts
        with self._watched(counts, budget):
            answers = self.agent.generate(
                list(prompts), budget, seed=self.seed if seed is None else seed
            )
        expect(
            isinstance(answers, list) and [a.prompt for a in answers] == list(prompts),
            f"{self.subject}, generate",
            f"one Generation a prompt in the order of the prompts, {[p.id for p in prompts]}",
            [answer.prompt.id for answer in answers],
            "Put the answers back in the order in which the prompts came.",
        )
        for answer in answers:
            _check_generation(self, answer)
        self._check_cost("generate", [answer.usage for answer in answers], budget, counts)
        return answers

    def act(self, states: Sequence[TextState], budget: Budget | None = None) -> list[Any]:
        """Decisions of the agent, each checked, and their cost compared."""
        counts = _Counts()
        with self._watched(counts, budget):
            decisions = self.agent.act(list(states), budget, seed=self.seed)
        expect(
            isinstance(decisions, list) and len(decisions) == len(states),
            f"{self.subject}, act",
            f"a list of {len(states)} decisions, one a state",
            decisions,
            "Return one Decision a state, in order.",
        )
        for state, decision in zip(states, decisions, strict=True):
            _check_decision(self, state, decision)
        self._check_cost("act", [decision.usage for decision in decisions], budget, counts)
        return decisions

    @contextmanager
    def _watched(self, counts: _Counts, budget: Budget | None) -> Iterator[None]:
        score = {"score": counts.of_score, "score_parts": counts.of_score}
        try:
            with ExitStack() as stack:
                stack.enter_context(
                    counted(self.agent.language_model, {"sample": counts.of_sample})
                )
                if self.agent.reward_model is not None:
                    stack.enter_context(
                        counted(self.agent.reward_model, {**score, "score_steps": counts.of_steps})
                    )
                yield
        except BudgetExceededError as error:
            raise CheckError(
                f"{self.subject}: expected that it stays within {budget}, got {error}"
            ) from error
        except BudgetError as error:
            raise CheckError(
                f"{self.subject}: expected an answer within {budget}, which pays for one response, "
                f"got BudgetError: {error} If one response needs more, pass budget_tokens."
            ) from error

    def _check_cost(
        self, method: str, usages: Sequence[Usage], budget: Budget | None, counts: _Counts
    ) -> None:
        spent = sum(usages, start=Usage())
        for name, charged, asked in (
            ("generated tokens", spent.generated_tokens, counts.tokens),
            ("reward calls", spent.reward_calls, counts.reward_calls),
        ):
            expect(
                charged == asked,
                f"{self.subject}, {method}, usage",
                f"all {asked} {name} that its models were asked for",
                f"{charged} in the ledgers",
                "Pass the ledgers to every `sample` and `score_responses`.",
            )
        if budget is None:
            return
        for usage in usages:
            for name, amount in usage.capped.items():
                cap = getattr(budget, name)
                expect(
                    cap is None or amount <= cap or name == "seconds",
                    f"{self.subject}, {method}",
                    f"at most {cap} {name} a prompt",
                    f"{amount:g}",
                    "Ask `ledger.affords(...)` before spending, with the most that a call takes.",
                )


def _check_generation(trial: _Trial, answer: Any) -> None:
    agent, completion = trial.agent, answer.completion
    subject = f"{trial.subject}, answer to {answer.prompt.id!r}"
    start = initial(answer.prompt, agent.language_model)
    _check_completion(trial, start, completion, subject)
    text = agent.language_model.decode(completion.state.response_ids)
    expect(
        answer.text == text,
        f"{subject}, text",
        f"the decoded response, {text!r}",
        repr(answer.text),
        "Decode `completion.state.response_ids`; do not edit the text.",
    )
    expect(
        completion.score is None or agent.reward_model is not None,
        f"{subject}, score",
        "None, for the agent has no reward model",
        completion.score,
        "Report a score only where the reward model gave it.",
    )
    if completion.score is not None:
        actual = float(score_responses(agent.reward_model, [answer.prompt], [text]).total[0])
        expect(
            np.isclose(completion.score, actual, rtol=_TOLERANCE, atol=_TOLERANCE),
            f"{subject}, score",
            f"what the reward model gives the text {text!r}, {actual:g}",
            completion.score,
            "Report the score of the response that is returned, from `score_responses`.",
        )


def _check_completion(trial: _Trial, start: TextState, completion: Any, subject: str) -> None:
    """A completion is a complete response that goes on from `start`."""
    lm, state = trial.agent.language_model, completion.state
    ids, begun = state.response_ids, len(start.response_ids)
    expect(
        (state.prompt, state.prompt_ids) == (start.prompt, start.prompt_ids)
        and ids[:begun] == start.response_ids,
        f"{subject}, state",
        f"one that goes on from {start}",
        state,
        "Keep the tokens of the state that was asked about.",
    )
    expect(
        is_terminal(state),
        f"{subject}, state",
        "a complete response (finish_reason 'stop' or 'length')",
        f"finish_reason None after {len(ids)} tokens",
        "Return finished candidates only; finish the best one before the budget ends.",
    )
    limit = trial.agent.max_response_tokens
    expect(
        begun < len(ids) <= limit,
        f"{subject}, state",
        f"at most max_response_tokens ({limit}) tokens, at least one of them new",
        f"{len(ids)} tokens",
        "Pass the limit to `transition`.",
    )
    full = len(ids) == limit or len(state.prompt_ids) + len(ids) == lm.context_length
    expect(
        lm.stop_token_ids.isdisjoint(ids[:-1])
        and (state.finish_reason == "stop") == (ids[-1] in lm.stop_token_ids)
        and (state.finish_reason == "stop" or full),
        f"{subject}, finish_reason",
        "'stop' after a stop token, and only then; 'length' at the token limit",
        f"{state.finish_reason!r} after {len(ids)} tokens that end with {ids[-5:]}",
        "Append chunks by `transition`, which sets it.",
    )
    expect(
        len(completion.logprobs) in (0, len(ids), len(ids) - begun),
        f"{subject}, logprobs",
        f"none, or one for each of {len(ids)} tokens",
        completion.logprobs,
        "Join the log-probabilities of all chunks.",
    )


def _check_decision(trial: _Trial, state: TextState, decision: Any) -> None:
    subject = f"{trial.subject}, decision for {state.prompt.id!r}"
    _check_completion(trial, state, decision.completion, subject)
    chunk, complete = decision.chunk, decision.completion.state
    expect(
        1 <= len(chunk) <= trial.agent.chunk_tokens,
        f"{subject}, chunk",
        f"1 to chunk_tokens ({trial.agent.chunk_tokens}) tokens",
        chunk,
        "Cut the completion after chunk_tokens.",
    )
    ids = state.response_ids + chunk.token_ids
    expect(
        complete.response_ids[: len(ids)] == ids,
        f"{subject}, chunk",
        f"the beginning of its completion, {complete.response_ids[len(state.response_ids) :]}",
        chunk.token_ids,
        "Return the first tokens that the completion adds to the state.",
    )
    reason = complete.finish_reason if len(ids) == len(complete.response_ids) else None
    played = transition(state, chunk, trial.agent.max_response_tokens)
    expect(
        played.finish_reason == reason,
        f"{subject}, chunk",
        f"finish_reason {reason!r} after the chunk is appended, for its completion has "
        f"{len(complete.response_ids)} tokens and ends by {complete.finish_reason!r}",
        f"{played.finish_reason!r} after {chunk}",
        "Give the last chunk of a completion the finish_reason of the completion.",
    )


def _check_determinism(trial: _Trial) -> None:
    _expect_same(
        trial,
        trial.generate(trial.prompts),
        trial.generate(trial.prompts),
        "the same answer for the same seed",
        "Derive all randomness from `seed` (`stream`, `spawn_seed`), and keep no state between "
        "calls.",
    )


def _check_seed(trial: _Trial) -> None:
    first, other = _Counts(), _Counts()
    trial.generate(trial.prompts, counts=first)
    trial.generate(trial.prompts, seed=trial.seed + 1, counts=other)
    # The answers may well be the same: a search that looks long enough finds the best one.
    expect(
        not first.streams or first.streams != other.streams,
        f"{trial.subject}, generate",
        f"that seeds {trial.seed} and {trial.seed + 1} draw different samples",
        f"the same seeds passed to `sample` for both, {first.streams[:3]}",
        "Pass the seed on, or one that is derived from it.",
    )


def _check_batching(trial: _Trial) -> None:
    # Twice the first one: what a prompt gets may not depend on where in the batch it stands.
    prompts = [*trial.prompts, trial.prompts[0]]
    _expect_same(
        trial,
        trial.generate(prompts),
        [answer for prompt in prompts for answer in trial.generate([prompt])],
        "the same answer in a batch as alone",
        "Let an answer depend on its prompt and the seed, not on the batch around it.",
    )


def _check_budgets(trial: _Trial) -> None:
    for share in _BUDGETS:
        trial.generate(trial.prompts, Budget(tokens=int(share * trial.least)))
    if hasattr(trial.agent, "response_usage"):
        states = [initial(prompt, trial.agent.language_model) for prompt in trial.prompts]
        needs = [trial.agent.response_usage(state) for state in states]
        flops = max(usage.flops for usage in needs)
        calls = max(1, *(usage.reward_calls for usage in needs))
        for share in _BUDGETS:
            if flops > 0:
                trial.generate(trial.prompts, Budget(flops=share * flops))
            trial.generate(trial.prompts, Budget(reward_calls=int(share * calls)))
    if trial.least > 1:
        budget = Budget(tokens=trial.least - 1)
        expect_error(
            BudgetError,
            lambda: trial.agent.generate(list(trial.prompts), budget, seed=trial.seed),
            f"{trial.subject}, generate",
            f"{budget}, which may not be enough for one response",
            "Refuse such a budget instead of returning an incomplete response.",
        )


def _check_acting(trial: _Trial) -> None:
    """Decide and play until all responses have ended."""
    agent = trial.agent
    states = [initial(prompt, agent.language_model) for prompt in trial.prompts]
    trial.act(states)
    steps = 0
    while going := [i for i, state in enumerate(states) if not is_terminal(state)]:
        expect(
            steps < agent.max_response_tokens,
            f"{trial.subject}, act",
            f"that playing its chunks ends within max_response_tokens ({steps}) steps",
            [states[i] for i in going],
            "Every chunk has at least one token.",
        )
        decisions = trial.act([states[i] for i in going], Budget(tokens=trial.least))
        for i, decision in zip(going, decisions, strict=True):
            states[i] = transition(states[i], decision.chunk, agent.max_response_tokens)
        steps += 1
    expect_error(
        ValueError,
        lambda: agent.act(states[:1], None, seed=trial.seed),
        f"{trial.subject}, act",
        "a state that has ended",
        "Check `is_terminal(state)` first.",
    )


def _expect_same(
    trial: _Trial, answers: list[Any], others: list[Any], expected: str, change: str
) -> None:
    for answer, other in zip(answers, others, strict=True):
        one, two = (
            (a.completion.state, a.text, a.usage.generated_tokens, a.usage.reward_calls)
            for a in (answer, other)
        )
        expect(
            one == two,
            f"{trial.subject}, generate",
            f"{expected}: {answer.text!r} for {answer.usage}",
            f"{other.text!r} for {other.usage}",
            change,
        )
        scores = answer.completion.score, other.completion.score
        expect(
            scores[0] is scores[1] or np.isclose(*scores, rtol=_TOLERANCE, atol=_TOLERANCE),
            f"{trial.subject}, generate",
            f"{expected}, score {scores[0]}",
            scores[1],
            change,
        )
