"""The checker of agents, by duck typing, because this module must not import agents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import Trial, counted, rules
from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.mdp import initial, is_terminal, response_limit, transition
from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.types import (
    Budget,
    BudgetError,
    BudgetExceededError,
    Chunk,
    Prompt,
    TextState,
    Usage,
)

_TOLERANCE = 1e-5
# Budgets in units of one response.
_BUDGETS = (1.0, 1.4, 3.0, 5.7)
_RULES = rules("""
attributes | attributes | an object with {names} | Subclass `Agent`.
answers | generate | one Generation a prompt in the order of the prompts, {ids} | Put the answers
    back in that order.
decisions | act | a list of {count} decisions | Return one a state.
overspent | {method} | that it stays within {budget} |
too little | {method} | an answer within {budget}, which pays for one response, got BudgetError:
    {got} If one response needs more, pass budget_tokens. |
usage | {method}, usage | all {asked} {name} that its models were asked for, got {got} in the
    ledgers | Pass the ledgers to every `sample` and `score_responses`; count a state of
    `next_tokens` as a generated token.
cap | {method} | at most {cap} {name} a prompt | Ask `ledger.affords(...)` before spending, with the
    most that a call takes.
text | {place}, text | the decoded response, {text!r} | Do not edit it.
no score | {place}, score | None, for the agent has no reward model | Report a score only where the
    reward model gave it.
score | {place}, score | what the reward model gives the text {text!r}, {actual:g} | Report that of
    the response that is returned.
goes on | {place}, state | one that goes on from {start} | Keep it.
complete | {place}, state | a complete response (finish_reason 'stop' or 'length') | Finish the best
    candidate before the budget ends.
limit | {place}, state | at most max_response_tokens ({limit}) tokens, at least one of them new, got
    {got} tokens | Pass the limit to `transition`.
finish_reason | {place}, finish_reason | 'stop' after a stop token, and only then; 'length' at the
    token limit | Append chunks by `transition`, which sets it.
logprobs | {place}, logprobs | none, or one for each of {count} tokens | Join those of all chunks.
chunk | {place}, chunk | 1 to chunk_tokens ({most}) tokens | Cut it there.
beginning | {place}, chunk | the beginning of its completion, {rest} | Return the first tokens that
    the completion adds to the state.
ending | {place}, chunk | finish_reason {reason!r} after the chunk is appended, as its completion
    ends | Give the last chunk the completion's finish_reason.
repeated | generate | the same answer for the same seed: {answer} | Derive all randomness from
    `seed`, and keep no state between calls.
batch | generate | the same answer in a batch as alone: {answer} | Let it depend on its prompt and
    the seed, not on the batch around it.
seed | generate | that seeds {one} and {two} draw different samples, got the same seeds passed to
    `sample` for both, {got} | Pass on the seed, or one derived from it.
refusal | generate | {error} for {case}, which may not be enough for one response | Refuse it
    instead of returning an incomplete response.
end | act | that playing its chunks ends within max_response_tokens ({limit}) steps | Every chunk
    has at least one token.
ended | act | {error} for {case} | Check `is_terminal(state)` first.
""")


def check_agent(
    agent: Any, prompts: Sequence[Prompt], *, budget_tokens: int | None = None, seed: int = 0
) -> None:
    """Check that an agent implements the interface of `agents.Agent`.

    For `generate`, it checks that each prompt gets one complete response, in order and with the
    score of the reward model; that the seed determines it, alone and in a batch; that the ledger
    has all generated tokens and reward calls; and that budgets of one response or more are kept.
    For `act`, chunks must start the decision's completion and reach the end of the response.

    During the check, the methods of the agent's models are replaced to count calls: do not use the
    models elsewhere. Each prompt is answered about two dozen times. Use a toy language model,
    because rounding in a network can change tokens with the batch.

    Args:
        agent: Has `generate(prompts, budget, seed=)`, `act(states, budget, seed=)`,
            `language_model`, `reward_model` (or None), `max_response_tokens` and `chunk_tokens`.
        prompts: At least one; preferably several of different lengths.
        budget_tokens: The smallest budget that must be enough; one token less must be rejected. By
            default the tokens of one response.
        seed: Seed of the answers.

    Raises:
        CheckError: A check fails.

    Example:
        >>> from mbrl_text_env.agents import Sampling
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import Prompt
        >>> check_agent(Sampling(NGramLM("ab")), [Prompt.from_text("a"), Prompt.from_text("ab")])
    """
    if not prompts:
        raise ValueError("check_agent: expected at least one prompt, got none.")
    subject = f"Agent {getattr(agent, 'name', type(agent).__name__)!r}"
    trial = _Trial(agent, subject, tuple(prompts), budget_tokens or 0, seed)
    sizes = ("language_model", "reward_model", "max_response_tokens", "chunk_tokens")
    trial.expect_attributes(agent, "generate", "act", *sizes)
    if budget_tokens is None:
        limits = (
            response_limit(state, agent.language_model, agent.max_response_tokens)
            for state in trial.starts()
        )
        trial.least = max(limits)
    trial.check_seed()
    trial.check_batching()
    trial.check_budgets()
    trial.check_acting()


@dataclass
class _Counts:
    """Calls of an agent's models; `streams` are the seeds and first samples of its draws."""

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

    def of_next_tokens(self, found: Sequence[object], *args: Any, **options: Any) -> None:
        """Count an expansion as a generated token."""
        self.tokens += len(found)

    def of_score(self, scores: object, prompts: object, responses: Sequence[str]) -> None:
        self.reward_calls += len(responses)

    def of_steps(self, scores: object, prompt: object, steps: object) -> None:
        """Count a call of `score_steps`, which scores one response."""
        self.reward_calls += 1


@dataclass
class _Trial(Trial):
    """An agent under check; `least` generated tokens must be enough for one response."""

    rules = _RULES
    agent: Any
    subject: str
    prompts: tuple[Prompt, ...]
    least: int
    seed: int

    def starts(self) -> list[TextState]:
        """The states with empty responses."""
        return [initial(prompt, self.agent.language_model) for prompt in self.prompts]

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget: Budget | None = None,
        *,
        seed: int | None = None,
        counts: _Counts | None = None,
    ) -> list[Any]:
        counts = _Counts() if counts is None else counts
        seed = self.seed if seed is None else seed
        with self.watched("generate", counts, budget):
            answers = self.agent.generate(list(prompts), budget, seed=seed)
        right = isinstance(answers, list) and [a.prompt for a in answers] == list(prompts)
        got, ids = [answer.prompt.id for answer in answers], [prompt.id for prompt in prompts]
        self.expect("answers", right, got, ids=ids)
        for answer in answers:
            self.check_generation(answer)
        self.check_cost("generate", [answer.usage for answer in answers], budget, counts)
        return answers

    def act(self, states: Sequence[TextState], budget: Budget | None = None) -> list[Any]:
        counts = _Counts()
        with self.watched("act", counts, budget):
            decisions = self.agent.act(list(states), budget, seed=self.seed)
        right = isinstance(decisions, list) and len(decisions) == len(states)
        self.expect("decisions", right, decisions, count=len(states))
        for state, decision in zip(states, decisions, strict=True):
            self.check_decision(state, decision)
        self.check_cost("act", [decision.usage for decision in decisions], budget, counts)
        return decisions

    @contextmanager
    def watched(self, method: str, counts: _Counts, budget: Budget | None) -> Iterator[None]:
        """Count the calls of the models; exceeding the budget is a fault."""
        score, steps = counts.of_score, counts.of_steps
        of_lm: dict[str, Callable[..., None]] = {
            "sample": counts.of_sample,
            "next_tokens": counts.of_next_tokens,
        }
        of_reward = {"score": score, "score_parts": score, "score_steps": steps}
        try:
            with (
                counted(self.agent.language_model, of_lm),
                counted(self.agent.reward_model, of_reward),
            ):
                yield
        except BudgetExceededError as error:
            raise self.fault("overspent", str(error), method=method, budget=budget) from error
        except BudgetError as error:
            raise self.fault("too little", str(error), method=method, budget=budget) from error

    def check_cost(
        self, method: str, usages: Sequence[Usage], budget: Budget | None, counts: _Counts
    ) -> None:
        spent = sum(usages, start=Usage())
        for name, charged, asked in (
            ("generated tokens", spent.generated_tokens, counts.tokens),
            ("reward calls", spent.reward_calls, counts.reward_calls),
        ):
            self.expect("usage", charged == asked, charged, method=method, asked=asked, name=name)
        for name, amount in (item for usage in usages for item in usage.capped.items()):
            cap = getattr(budget, name, None)
            within = cap is None or amount <= cap or name == "seconds"
            self.expect("cap", within, f"{amount:g}", method=method, cap=cap, name=name)

    def check_generation(self, answer: Any) -> None:
        agent, completion = self.agent, answer.completion
        place = f"answer to {answer.prompt.id!r}"
        self.check_completion(initial(answer.prompt, agent.language_model), completion, place)
        text, score = agent.language_model.decode(completion.state.response_ids), completion.score
        self.expect("text", answer.text == text, repr(answer.text), place=place, text=text)
        if score is not None:
            self.expect("no score", agent.reward_model is not None, score, place=place)
            actual = float(score_responses(agent.reward_model, [answer.prompt], [text]).total[0])
            close = np.isclose(score, actual, rtol=_TOLERANCE, atol=_TOLERANCE)
            self.expect("score", close, score, place=place, text=text, actual=actual)

    def check_completion(self, start: TextState, completion: Any, place: str) -> None:
        """Check that a completion is a complete response that continues `start`."""
        lm, state = self.agent.language_model, completion.state
        ids, begun = state.response_ids, len(start.response_ids)
        same = (state.prompt, state.prompt_ids) == (start.prompt, start.prompt_ids)
        goes_on = same and ids[:begun] == start.response_ids
        self.expect("goes on", goes_on, state, place=place, start=start)
        got = f"finish_reason None after {len(ids)} tokens"
        self.expect("complete", is_terminal(state), got, place=place)
        limit = self.agent.max_response_tokens
        self.expect("limit", begun < len(ids) <= limit, len(ids), place=place, limit=limit)
        full = len(ids) == limit or len(state.prompt_ids) + len(ids) == lm.context_length
        stopped = state.finish_reason == "stop"
        self.expect(
            "finish_reason",
            lm.stop_token_ids.isdisjoint(ids[:-1])
            and stopped == (ids[-1] in lm.stop_token_ids)
            and (stopped or full),
            f"{state.finish_reason!r} after {len(ids)} tokens that end with {ids[-5:]}",
            place=place,
        )
        logprobs = completion.logprobs
        right = len(logprobs) in (0, len(ids), len(ids) - begun)
        self.expect("logprobs", right, logprobs, place=place, count=len(ids))

    def check_decision(self, state: TextState, decision: Any) -> None:
        place = f"decision for {state.prompt.id!r}"
        self.check_completion(state, decision.completion, place)
        chunk, complete = decision.chunk, decision.completion.state
        most = self.agent.chunk_tokens
        self.expect("chunk", 1 <= len(chunk) <= most, chunk, place=place, most=most)
        ids, rest = state.response_ids + chunk.token_ids, complete.response_ids
        begins = rest[: len(ids)] == ids
        rest = rest[len(state.response_ids) :]
        self.expect("beginning", begins, chunk.token_ids, place=place, rest=rest)
        reason = complete.finish_reason if len(rest) == len(chunk) else None
        found = transition(state, chunk, self.agent.max_response_tokens).finish_reason
        got = f"{found!r} after {chunk}"
        self.expect("ending", found == reason, got, place=place, reason=reason)

    def check_seed(self) -> None:
        first, other, seeds = _Counts(), _Counts(), (self.seed, self.seed + 1)
        answers = self.generate(self.prompts, counts=first)
        self.expect_same("repeated", answers, self.generate(self.prompts))
        self.generate(self.prompts, seed=seeds[1], counts=other)
        # The answers can be equal: a long search finds the best one for any seed.
        differ = not first.streams or first.streams != other.streams
        self.expect("seed", differ, first.streams[:3], one=seeds[0], two=seeds[1])

    def check_batching(self) -> None:
        # The first prompt twice: its answer must not depend on its place in the batch.
        prompts = [*self.prompts, self.prompts[0]]
        alone = [answer for prompt in prompts for answer in self.generate([prompt])]
        self.expect_same("batch", self.generate(prompts), alone)

    def check_budgets(self) -> None:
        budgets = [Budget(tokens=int(share * self.least)) for share in _BUDGETS]
        if hasattr(self.agent, "response_usage"):
            needs = [self.agent.response_usage(state) for state in self.starts()]
            flops = max(usage.flops for usage in needs)
            calls = max(1, *(usage.reward_calls for usage in needs))
            budgets += [Budget(flops=share * flops) for share in _BUDGETS if flops > 0]
            budgets += [Budget(reward_calls=int(share * calls)) for share in _BUDGETS]
        for budget in budgets:
            self.generate(self.prompts, budget)
        if self.least > 1:
            low = Budget(tokens=self.least - 1)
            prompts = list(self.prompts)
            self.expect_error(
                "refusal",
                BudgetError,
                lambda: self.agent.generate(prompts, low, seed=self.seed),
                str(low),
            )

    def check_acting(self) -> None:
        """Decide and play until all responses have ended."""
        agent, states, steps = self.agent, self.starts(), 0
        self.act(states)
        while going := [i for i, state in enumerate(states) if not is_terminal(state)]:
            got = [states[i] for i in going]
            self.expect("end", steps < agent.max_response_tokens, got, limit=steps)
            decisions = self.act(got, Budget(tokens=self.least))
            for i, decision in zip(going, decisions, strict=True):
                states[i] = transition(states[i], decision.chunk, agent.max_response_tokens)
            steps += 1
        self.expect_error(
            "ended",
            ValueError,
            lambda: agent.act(states[:1], None, seed=self.seed),
            "a state that has ended",
        )

    def expect_same(self, rule: str, answers: Sequence[Any], others: Sequence[Any]) -> None:
        for pair in zip(answers, others, strict=True):
            one, two = (
                (a.completion.state, a.text, a.usage.generated_tokens, a.usage.reward_calls)
                for a in pair
            )
            first, second = (f"{a.text!r} with score {a.completion.score}, {a.usage}" for a in pair)
            self.expect(rule, one == two, second, answer=first)
            a, b = (answer.completion.score for answer in pair)
            close = a is b or np.isclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
            self.expect(rule, close, second, answer=first)
