"""The checker of language models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import expect, expect_error, expect_methods
from mbrl_text_env.language_models.base import SamplingParams, spawn_seed
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState, Usage, initial, transition

_TEXTS = ("A dog and a cat", "a b c", "Once upon a time, in a far land")
_PROMPTS = tuple(Prompt.from_text(text, chat=False) for text in _TEXTS)
_SAMPLES = 4
_MANY = 16
# Log-probabilities are rounded: a certain token may come out a hair above 0.
_ROUNDING = 1e-6
# Samples that are all alike are a fault only where chance makes them so once in a billion times.
_LEAST_CHANCE = math.log(1e-9)
# The batch changes the last bits of a network's probabilities. In a large vocabulary many tokens
# are hardly more probable than that: a draw that falls among them may give a neighbour. Where one
# of two tokens is so improbable, the difference is taken for such a tie, up to a share of chunks.
_TAIL = math.log(1e-4)
_MOST_TIES = 0.25
_GREEDY = SamplingParams(temperature=0)
_SHAPED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20)
_Rows = Sequence[Sequence[Chunk]]
_METHODS = ("name", "vocab_size", "stop_token_ids", "context_length", "encode_prompt", "decode")


def check_language_model(
    lm: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    max_new_tokens: int = 6,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> None:
    """Check that a language model keeps the contract of `language_models.LanguageModel`.

    Checked are the tokenizer; the form of every sampled chunk; that its log-probabilities are those
    of `logprobs`; that chunk k is a function of the state, its seed and k alone, whatever is
    sampled beside it, before it or after it; greedy decoding; the charge to the ledgers; the
    arguments that have to be refused; and, where the model has them, its features.

    Check a network in float32: in half precision rounding alone changes tokens with the batch. In
    float32 that is left to very improbable tokens, and a few such differences are allowed.

    Args:
        lm: A language model.
        prompts: At least one; by default plain texts. Pass chats to check a chat template.
        max_new_tokens: Tokens a chunk, at least 2.
        seed: Of the samples.
        tolerance: Most that log-probabilities (nats) may differ, and features by their scale.

    Raises:
        CheckError: The contract is broken.
        ValueError: There are no prompts, or `max_new_tokens` is below 2.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> check_language_model(NGramLM("abc"))
    """
    asked = _PROMPTS if prompts is None else tuple(prompts)
    if not asked or max_new_tokens < 2:
        raise ValueError(
            "Expected at least one prompt and max_new_tokens of at least 2, got "
            f"{len(asked)} prompts and {max_new_tokens}."
        )
    expect_methods(
        lm,
        (*_METHODS, "sample", "logprobs", "usage_bound"),
        f"Language model {type(lm).__name__}",
        "Add them; see `language_models.LanguageModel`.",
    )
    _check_tokenizer(lm, asked)
    trial = _Trial(lm, tuple(initial(p, lm) for p in asked), max_new_tokens, seed, tolerance)
    # Prefixes of different lengths, with and without a response, are where padding goes wrong.
    trial = dataclasses.replace(trial, states=(*trial.states, *_continued(trial)))
    rows = trial.draw(trial.everything)
    _check_logprobs(trial, rows)
    _check_repeating(trial, rows)
    _check_batching(trial, rows)
    _check_streams(trial, rows)
    _check_stop_texts(trial, rows)
    _check_randomness(trial)
    _check_greedy(trial, rows)
    _check_refusals(trial)
    if hasattr(lm, "features"):
        _check_features(trial)


@dataclass(frozen=True)
class _Trial:
    """A model with the states that it is tried on.

    Args:
        lm: The model.
        states: States that have not ended.
        max_new_tokens, seed, tolerance: As in `check_language_model`.
    """

    lm: Any
    states: tuple[TextState, ...]
    max_new_tokens: int
    seed: int
    tolerance: float

    @property
    def subject(self) -> str:
        return f"Language model {self.lm.name!r}"

    @property
    def everything(self) -> range:
        """The indices of all states."""
        return range(len(self.states))

    def draw(
        self,
        indices: Iterable[int],
        num_samples: int = _SAMPLES,
        *,
        path: int = 0,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[list[Chunk]]:
        """Sample from some of the states; every chunk that comes back is checked for its form.

        Args:
            indices: Which states. A state has the same seed wherever it stands.
            num_samples: Chunks a state.
            path: Another one gives other seeds.
            max_new_tokens: By default the trial's.
            **options: Passed to `sample`.
        """
        chosen = list(indices)
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        states = [self.states[i] for i in chosen]
        seeds = [spawn_seed(self.seed, path, i) for i in chosen]
        rows = self.lm.sample(states, num_samples, most, seeds=seeds, **options)
        expect(
            isinstance(rows, list) and [len(row) for row in rows] == [num_samples] * len(chosen),
            f"{self.subject}, sample",
            f"a list of {len(chosen)} lists of {num_samples} chunks",
            rows,
            "Return chunks[len(states)][num_samples].",
        )
        for state, row in zip(states, rows, strict=True):
            for chunk in row:
                _check_chunk(self, state, chunk, most)
        return rows


def _check_tokenizer(lm: Any, prompts: Sequence[Prompt]) -> None:
    subject = f"Language model {lm.name!r}"
    expect(
        isinstance(lm.name, str) and lm.name,
        f"{subject}, name",
        "a string that is not empty",
        lm.name,
        "Give it a name: reports and records call it by that.",
    )
    for name in ("vocab_size", "context_length"):
        value = getattr(lm, name)
        expect(
            isinstance(value, int) and value >= 1,
            f"{subject}, {name}",
            "an int of at least 1",
            value,
            "Take it from the model's configuration.",
        )
    expect(
        isinstance(lm.stop_token_ids, frozenset) and _in_vocabulary(lm, lm.stop_token_ids),
        f"{subject}, stop_token_ids",
        f"a frozenset of ids from 0 to {lm.vocab_size - 1}",
        lm.stop_token_ids,
        "Ids outside the vocabulary can never be sampled, so no response would end.",
    )
    for prompt in prompts:
        _check_encoding(lm, prompt, subject)


def _check_encoding(lm: Any, prompt: Prompt, subject: str) -> None:
    ids = lm.encode_prompt(prompt)
    case = f"{subject}, encode_prompt of {prompt.id!r}"
    expect(
        isinstance(ids, tuple) and _in_vocabulary(lm, ids) and len(ids) < lm.context_length,
        case,
        f"a tuple of fewer than {lm.context_length} ints from 0 to {lm.vocab_size - 1}",
        ids,
        "States are hashed and compared, so ids are tuples of plain ints; a prompt that leaves no "
        "room for a response raises `PromptTooLongError`.",
    )
    again = lm.encode_prompt(prompt)
    expect(again == ids, case, "the same ids each time", again, "Draw no random numbers.")
    texts = [lm.decode(part) for part in (ids, list(ids), ids[:1], ())]
    expect(
        all(isinstance(text, str) for text in texts) and texts[0] == texts[1],
        f"{subject}, decode",
        "a string, the same for a tuple and for a list of ids",
        texts,
        "Return the text of the ids.",
    )


def _check_chunk(trial: _Trial, state: TextState, chunk: Chunk, max_new_tokens: int) -> None:
    lm, subject = trial.lm, f"{trial.subject}, sample"
    expect(isinstance(chunk, Chunk), subject, "a `Chunk`", chunk, "Return Chunk(ids, logprobs).")
    ids, stops = chunk.token_ids, lm.stop_token_ids
    expect(
        isinstance(ids, tuple) and 1 <= len(ids) <= max_new_tokens,
        subject,
        f"a tuple of 1 to max_new_tokens ({max_new_tokens}) token ids",
        ids,
        "Stop after max_new_tokens; the stop token counts.",
    )
    expect(
        _in_vocabulary(lm, ids) and stops.isdisjoint(ids[:-1]),
        subject,
        f"ints from 0 to {lm.vocab_size - 1}, with a stop token ({sorted(stops)}) only at the end",
        ids,
        "End a chunk at its first stop token.",
    )
    room = lm.context_length - len(state.prompt_ids) - len(state.response_ids)
    reason = "stop" if ids[-1] in stops else "length" if len(ids) >= room else None
    expect(
        chunk.finish_reason == reason,
        f"{subject}, finish_reason",
        f"{reason!r} ('stop' after a stop token, 'length' where the context is full, else None)",
        chunk,
        "Derive it from the last token and the context.",
    )
    expect(
        reason is not None or len(ids) == max_new_tokens,
        subject,
        f"{max_new_tokens} tokens, or fewer where the response ends",
        ids,
        "Go on until max_new_tokens, a stop token or a full context.",
    )
    expect(
        len(chunk.logprobs) == len(ids)
        and all(-math.inf < logprob <= _ROUNDING for logprob in chunk.logprobs),
        f"{subject}, logprobs",
        f"one finite log-probability of at most 0 for each of {len(ids)} tokens",
        chunk.logprobs,
        "Return natural logarithms of probabilities.",
    )


def _continued(trial: _Trial) -> list[TextState]:
    """States that go on from the first chunks, and what decoding says of those."""
    lm, states = trial.lm, []
    for state, (chunk,) in zip(trial.states, trial.draw(trial.everything, 1), strict=True):
        ordinary = tuple(i for i in chunk.token_ids if i not in lm.stop_token_ids)
        for stop in sorted(lm.stop_token_ids):
            texts = lm.decode((*ordinary, stop)), lm.decode(ordinary)
            expect(
                texts[0] == texts[1],
                f"{trial.subject}, decode",
                f"a text without the special token {stop}, {texts[1]!r}",
                repr(texts[0]),
                "Leave special tokens out: reward models read the text.",
            )
        if chunk.finish_reason is None:
            states.append(transition(state, chunk, lm.context_length))
    return states


def _check_logprobs(trial: _Trial, rows: _Rows) -> None:
    shaped = trial.draw(trial.everything, params=_SHAPED)
    for params, drawn in ((SamplingParams(), rows), (_SHAPED, shaped)):
        states = [state for state, row in zip(trial.states, drawn, strict=True) for _ in row]
        chunks = [chunk for row in drawn for chunk in row]
        found = trial.lm.logprobs(states, chunks)
        expect(
            [len(logs) for logs in found] == [len(chunk) for chunk in chunks],
            f"{trial.subject}, logprobs",
            "one number for each token of each chunk",
            found,
            "Return float[len(chunk)] for every chunk, without the prefix.",
        )
        for chunk, logs in zip(chunks, found, strict=True):
            expect(
                np.allclose(chunk.logprobs, logs, rtol=0, atol=trial.tolerance),
                f"{trial.subject}, logprobs of a chunk sampled with {params}",
                f"those of the model itself, as `logprobs` gives them, {logs}",
                chunk.logprobs,
                "Take them before temperature, top-k and top-p, and mind the position: a token's "
                "probability is given by what comes before it.",
            )


def _check_batching(trial: _Trial, rows: _Rows) -> None:
    _expect_same(
        trial,
        "the chunks that each state has alone (batch of one)",
        rows,
        [row for i in trial.everything for row in trial.draw([i])],
        "Give every sequence a random stream of its own, and mask the padding.",
    )
    _expect_same(
        trial,
        "the same chunks whatever the order of the states",
        rows,
        trial.draw(trial.everything[::-1])[::-1],
        "Give every sequence a random stream of its own; undo any sorting by length.",
    )


def _check_streams(trial: _Trial, rows: _Rows) -> None:
    later = trial.draw(trial.everything, first_sample=_SAMPLES)
    _expect_same(
        trial,
        f"{_SAMPLES} chunks from 0 and {_SAMPLES} from first_sample={_SAMPLES} to be the "
        f"{2 * _SAMPLES} from 0",
        trial.draw(trial.everything, 2 * _SAMPLES),
        [[*a, *b] for a, b in zip(rows, later, strict=True)],
        "Chunk k draws from `stream(seed, state, k)`, with k counted from first_sample.",
    )
    most = trial.max_new_tokens // 2
    _expect_same(
        trial,
        f"that a shorter max_new_tokens ({most}) gives a prefix of the longer chunk",
        [[Chunk(chunk.token_ids[:most], chunk.logprobs[:most]) for chunk in row] for row in rows],
        trial.draw(trial.everything, max_new_tokens=most),
        "Draw the numbers of a chunk one after the other from its own stream.",
    )


def _check_randomness(trial: _Trial) -> None:
    (row,) = trial.draw([0], _MANY)
    alike = len({chunk.token_ids for chunk in row}) == 1
    expect(
        not alike or (len(row) - 1) * row[0].logprob > _LEAST_CHANCE,
        f"{trial.subject}, sample",
        f"that {len(row)} samples of a state differ (each token has a probability below 1)",
        f"{len(row)} times {row[0].token_ids}",
        "Make the random numbers depend on the sample's index.",
    )
    (other,) = trial.draw([0], _MANY, path=1)
    expect(
        [a.token_ids for a in row] != [b.token_ids for b in other]
        or sum(chunk.logprob for chunk in row) > _LEAST_CHANCE,
        f"{trial.subject}, sample",
        "that another seed gives other samples",
        f"the same {len(row)} chunks",
        "Make the random numbers depend on the seed.",
    )


def _check_greedy(trial: _Trial, rows: _Rows) -> None:
    subject = f"{trial.subject}, sample with temperature 0"
    greedy = trial.draw(trial.everything, 2, params=_GREEDY)
    others = trial.draw(trial.everything, 1, path=1, params=_GREEDY)
    for sampled, (chunk, second), (other,) in zip(rows, greedy, others, strict=True):
        distinct = {chunk.token_ids, second.token_ids, other.token_ids}
        expect(
            len(distinct) == 1,
            subject,
            "the same chunk for all samples and seeds of a state",
            distinct,
            "Take the most probable token.",
        )
        most = max(one.logprobs[0] for one in sampled)
        expect(
            chunk.logprobs[0] >= most - trial.tolerance,
            subject,
            f"the most probable token (another has log-probability {most:.4f})",
            chunk,
            "Take the most probable token.",
        )


def _check_stop_texts(trial: _Trial, rows: _Rows) -> None:
    """A text that a chunk contains before its end cuts the chunk short there."""
    lm = trial.lm
    for i, row in enumerate(rows):
        for chunk in row[:1]:
            texts = [lm.decode(chunk.token_ids[:n]) for n in range(1, len(chunk))]
            stop = next((t for t in texts if t.strip() and "\ufffd" not in t), None)
            if stop is None:
                continue
            length = next(n for n, text in enumerate(texts, 1) if stop in text)
            [[cut]] = lm.sample(
                [trial.states[i]],
                1,
                trial.max_new_tokens,
                seeds=[spawn_seed(trial.seed, 0, i)],
                params=SamplingParams(stop=(stop,)),
            )
            expected = Chunk(chunk.token_ids[:length], chunk.logprobs[:length])
            _expect_same(
                trial,
                f"the chunk up to the token that completes the stop text {stop!r}",
                [[expected]],
                [[cut]],
                "End a chunk as soon as its text contains one of `params.stop`.",
            )
            expect(
                cut.finish_reason is None,
                f"{trial.subject}, sample with stop={stop!r}",
                "finish_reason None: the response goes on",
                cut,
                "Only a stop token or a full context ends a response.",
            )


def _check_repeating(trial: _Trial, rows: _Rows) -> None:
    """Draw the same once more, this time with ledgers, and look at what they say."""
    lm = trial.lm
    ledgers = [Ledger() for _ in trial.states]
    again = trial.draw(trial.everything, ledgers=ledgers)
    _expect_same(
        trial,
        "the same chunks when called again with the same seeds",
        rows,
        again,
        "Draw from `stream(seed, state, k)`; keep no generator between calls.",
    )
    for state, row, ledger in zip(trial.states, again, ledgers, strict=True):
        prefix = len(state.prompt_ids) + len(state.response_ids)
        bound = lm.usage_bound(prefix, [trial.max_new_tokens] * _SAMPLES)
        _check_charge(trial, ledger.usage, sum(map(len, row)), prefix, bound)
    ledgers = [Ledger() for _ in trial.states]
    lm.logprobs(trial.states, [row[0] for row in rows], ledgers=ledgers)
    charged = [(ledger.usage.lm_calls, ledger.usage.generated_tokens) for ledger in ledgers]
    expect(
        charged == [(1, 0)] * len(ledgers),
        f"{trial.subject}, logprobs, ledgers",
        "one language-model call and no generated token a state",
        charged,
        "Charge every state's ledger for the tokens that were computed.",
    )


def _check_charge(trial: _Trial, usage: Usage, generated: int, prefix: int, bound: Usage) -> None:
    subject = f"{trial.subject}, sample, ledgers"
    expect(
        (usage.generated_tokens, usage.lm_calls) == (generated, 1),
        subject,
        f"generated_tokens={generated} and lm_calls=1 a state",
        usage,
        "Charge every state's ledger for its own chunks: `ledger.charge(self.usage_bound(...))`.",
    )
    expect(
        min(usage.prompt_tokens, usage.cached_tokens) >= 0
        and usage.prompt_tokens + usage.cached_tokens >= prefix,
        subject,
        f"prompt_tokens and cached_tokens that cover the prefix of {prefix} tokens",
        usage,
        "Count the prefix: as cached where it was not computed.",
    )
    within = (
        usage.prompt_tokens <= bound.prompt_tokens
        and usage.generated_tokens <= bound.generated_tokens
        and usage.flops <= bound.flops * (1 + 1e-9)
        and (usage.flops > 0 or not getattr(trial.lm, "counts_flops", True))
    )
    expect(
        within,
        subject,
        f"FLOPs above 0 and no amount above `usage_bound(prefix, lengths)`, {bound}",
        usage,
        "Budgets rely on `usage_bound` being the most that `sample` charges.",
    )


def _check_refusals(trial: _Trial) -> None:
    state, most = trial.states[0], trial.max_new_tokens
    ended = dataclasses.replace(state, finish_reason="stop")
    sample = trial.lm.sample
    cases: dict[str, Callable[[], object]] = {
        "a state that has ended": lambda: sample([ended], 1, most, seeds=[0]),
        "num_samples=0": lambda: sample([state], 0, most, seeds=[0]),
        "max_new_tokens=0": lambda: sample([state], 1, 0, seeds=[0]),
        "two seeds for one state": lambda: sample([state], 1, most, seeds=[0, 1]),
    }
    for case, call in cases.items():
        expect_error(
            ValueError,
            call,
            f"{trial.subject}, sample",
            case,
            "Call `language_models.base.check_sample_arguments` first.",
        )


def _check_features(trial: _Trial) -> None:
    lm, subject = trial.lm, f"{trial.subject}, features"
    rows = lm.features(trial.states)
    shape = (len(trial.states), lm.feature_size)
    expect(
        isinstance(rows, np.ndarray) and rows.shape == shape and rows.dtype == np.float32,
        subject,
        f"a float32 array of shape {shape}",
        f"{type(rows).__name__} {getattr(rows, 'dtype', '')} {np.shape(rows)}",
        "Return one vector of feature_size a state.",
    )
    expect(np.isfinite(rows).all(), subject, "finite numbers", rows, "Mask the padding.")
    singles = np.concatenate([lm.features([state]) for state in trial.states])
    difference = float(np.abs(rows - singles).max())
    expect(
        difference <= trial.tolerance * max(1.0, float(np.abs(rows).max())),
        subject,
        f"the features that each state has alone, up to {trial.tolerance:g} of their scale",
        f"a difference of {difference:g}",
        "Mask the padding, and read the last token of the prefix itself.",
    )


def _expect_same(trial: _Trial, expected: str, rows: _Rows, others: _Rows, change: str) -> None:
    """Compare chunks by their tokens; a few may differ by a rounding tie."""
    differences = [
        (f"{a.token_ids} and {b.token_ids} for state {i}, sample {k}", _is_tie(a, b))
        for i, (row, other) in enumerate(zip(rows, others, strict=True))
        for k, (a, b) in enumerate(zip(row, other, strict=True))
        if a.token_ids != b.token_ids
    ]
    faults = [text for text, is_tie in differences if not is_tie]
    if len(differences) > _MOST_TIES * sum(map(len, rows)):
        faults = [text for text, _ in differences]
    got = faults[0] if faults else ""
    expect(not faults, f"{trial.subject}, sample", expected, got, change)


def _is_tie(a: Chunk, b: Chunk) -> bool:
    pairs = zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False)
    first = next(((p, q) for x, y, p, q in pairs if x != y), None)
    return first is not None and min(first) < _TAIL


def _in_vocabulary(lm: Any, ids: Iterable[int]) -> bool:
    return all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < lm.vocab_size for i in ids
    )
