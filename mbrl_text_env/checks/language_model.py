"""The checker of language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import Trial, rules
from mbrl_text_env.language_models.base import SamplingParams, prefix_of, spawn_seed
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState, Usage

_TEXTS = ("A dog and a cat", "a b c", "Once upon a time, in a far land")
_PROMPTS = tuple(Prompt.from_text(text, chat=False) for text in _TEXTS)
_SAMPLES = 4
_MANY = 16
# Rounding: the log-probability of a certain token can be slightly above 0.
_ROUNDING = 1e-6
# Equal samples are a fault only if their probability by chance is below one in a billion.
_LEAST_CHANCE = math.log(1e-9)
# The batch changes the last bits of a network's probabilities. In a large vocabulary, many tokens
# have a probability of that size, so a draw can give another one of them. If one of two different
# tokens is that improbable, the difference counts as a tie, up to a share of the chunks.
_TAIL = math.log(1e-4)
_MOST_TIES = 0.25
_GREEDY = SamplingParams(temperature=0)
_SHAPED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20)
_Rows = Sequence[Sequence[Chunk]]
_CONTRACT = ("name", "vocab_size", "stop_token_ids", "context_length", "encode_prompt", "decode")
_RULES = rules("""
attributes | attributes | an object with {names} | Subclass `LanguageModel`.
name | name | a string that is not empty | Reports use it.
size | {size} | an int of at least 1 | Take it from the configuration.
stop_token_ids | stop_token_ids | a frozenset of ids from 0 to {last} | Others can never be sampled,
    so no response would end.
ids | encode_prompt of {prompt!r} | a tuple of fewer than {context} ints from 0 to {last} | States
    are hashed, so ids are tuples of plain ints; a prompt that leaves no room for a response raises
    `PromptTooLongError`.
same ids | encode_prompt of {prompt!r} | the same ids each time | Draw no random numbers.
decode | decode | a string, the same for a tuple and for a list of ids | Return the text of the ids.
special | decode | a text without the special token {stop}, {text!r} | Leave special tokens out:
    reward models read the text.
rows | sample | a list of {states} lists of {samples} chunks | Return
    chunks[len(states)][num_samples].
chunk | sample | a `Chunk` | Return Chunk(ids, logprobs).
length | sample | a tuple of 1 to max_new_tokens ({most}) token ids | The stop token counts.
tokens | sample | ints from 0 to {last}, with a stop token ({stops}) only at the end | End a chunk
    at its first stop token.
finish_reason | sample, finish_reason | {reason!r} ('stop' after a stop token, 'length' where the
    context is full, else None) | Derive it from both.
early | sample | {most} tokens, or fewer where the response ends | Go on until max_new_tokens, a
    stop token or a full context.
logprobs | sample, logprobs | one finite log-probability of at most 0 for each of {count} tokens |
    Return natural logarithms of probabilities.
scored | logprobs | one number for each token of each chunk | Return float[len(chunk)] for every
    chunk, without the prefix.
model's | logprobs of a chunk sampled with {params} | those of the model itself, as `logprobs` gives
    them, {logs} | Take them before temperature, top-k and top-p, and mind the position: a token's
    probability is given by what comes before it.
again | sample | the same chunks when called again with the same seeds | Draw from `stream(seed,
    state, k)`; keep no generator between calls.
alone | sample | the chunks that each state has alone (batch of one) | Give every sequence a random
    stream of its own, and mask the padding.
order | sample | the same chunks whatever the order of the states | Give every sequence a random
    stream of its own; undo any sorting by length.
first_sample | sample | {half} chunks from 0 and {half} from first_sample={half} to be the {whole}
    from 0 | Chunk k draws from `stream(seed, state, k)`.
shorter | sample | that a shorter max_new_tokens ({most}) gives a prefix of the longer chunk | Draw
    the numbers of a chunk one after the other from its stream.
differ | sample | that {count} samples of a state differ (each token has a probability below 1) |
    Let random numbers depend on the sample's index.
seed | sample | that another seed gives other samples | Let random numbers depend on it.
greedy | sample with temperature 0 | the same chunk for all samples and seeds of a state | Take the
    most probable token.
most | sample with temperature 0 | the most probable token (another has log-probability {most:.4f})
    | Take that.
stop | sample | the chunk up to the token that completes the stop text {stop!r} | End a chunk as
    soon as its text contains one of `params.stop`.
goes on | sample with stop={stop!r} | finish_reason None: the response goes on | Only a stop token
    or a full context ends it.
scoring | logprobs, ledgers | one language-model call and no generated token a state | Charge every
    state's ledger for the tokens that were computed.
charge | sample, ledgers | generated_tokens={tokens} and lm_calls=1 a state | Charge every state's
    ledger for its own chunks.
prefix | sample, ledgers | prompt_tokens and cached_tokens that cover the prefix of {prefix} tokens
    | Count it as cached where it was not computed.
bound | sample, ledgers | FLOPs above 0 and no amount above `usage_bound(prefix, lengths)`, {bound}
    | Budgets rely on it being the most that is charged.
refusal | sample | {error} for {case} | Call `check_sample_arguments` of `language_models.base`
    first.
features | features | a float32 array of shape {shape} | Return a row a state.
finite | features | finite numbers | Mask the padding.
batch | features | the features that each state has alone, up to {most:g} of their scale | Mask the
    padding, and read the last token of the prefix itself.
""")


def check_language_model(
    lm: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    max_new_tokens: int = 6,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> None:
    """Check that a language model implements the interface of `language_models.LanguageModel`.

    It checks the tokenizer; the form of sampled chunks; that their log-probabilities match
    `logprobs`; that chunk k depends only on the state, its seed and k, and not on other samples;
    greedy decoding; charges to the ledgers; invalid arguments; and features, if the model has them.

    Check a network in float32. There, the batch changes only very improbable tokens by rounding,
    and a few such differences are allowed.

    Args:
        lm: A language model.
        prompts: At least one; by default plain texts. Pass chats to check a chat template.
        max_new_tokens: Tokens per chunk, at least 2.
        seed: Seed of the samples.
        tolerance: Maximum difference of log-probabilities (nats), and of features (relative).

    Raises:
        CheckError: A check fails.

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
    trial = _Trial(lm, (), max_new_tokens, seed, tolerance)
    trial.expect_attributes(lm, *_CONTRACT, "sample", "logprobs", "usage_bound")
    trial.check_tokenizer(asked)
    trial = replace(trial, states=tuple(initial(prompt, lm) for prompt in asked))
    # Prefixes of different lengths, with and without a response, reveal padding errors.
    trial = replace(trial, states=(*trial.states, *trial.continued()))
    rows = trial.draw(trial.everything)
    trial.check_logprobs(rows)
    trial.check_repeating(rows)
    trial.check_streams(rows)
    trial.check_stop_texts(rows)
    trial.check_randomness()
    trial.check_greedy(rows)
    trial.check_refusals()
    if hasattr(lm, "features"):
        trial.check_features()


@dataclass(frozen=True)
class _Trial(Trial):
    """A model and the (not ended) states to check it on."""

    rules = _RULES
    lm: Any
    states: tuple[TextState, ...]
    max_new_tokens: int
    seed: int
    tolerance: float

    @property
    def subject(self) -> str:  # type: ignore[override]
        return f"Language model {getattr(self.lm, 'name', type(self.lm).__name__)!r}"

    @property
    def everything(self) -> range:
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

        A state has the same seed wherever it stands; another `path` gives other seeds.
        """
        chosen = list(indices)
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        states = [self.states[i] for i in chosen]
        seeds = [spawn_seed(self.seed, path, i) for i in chosen]
        rows = self.lm.sample(states, num_samples, most, seeds=seeds, **options)
        right = isinstance(rows, list) and [*map(len, rows)] == [num_samples] * len(chosen)
        self.expect("rows", right, rows, states=len(chosen), samples=num_samples)
        for state, row in zip(states, rows, strict=True):
            for chunk in row:
                self.check_chunk(state, chunk, most)
        return rows

    def holds(self, ids: Iterable[Any]) -> bool:
        return all(type(i) is not bool and isinstance(i, int) and 0 <= i <= self.last for i in ids)

    @property
    def last(self) -> int:
        return int(self.lm.vocab_size) - 1

    def check_tokenizer(self, prompts: Sequence[Prompt]) -> None:
        lm = self.lm
        self.expect("name", isinstance(lm.name, str) and lm.name, lm.name)
        for size in ("vocab_size", "context_length"):
            value = getattr(lm, size)
            self.expect("size", isinstance(value, int) and value >= 1, value, size=size)
        stops = lm.stop_token_ids
        right = isinstance(stops, frozenset) and self.holds(stops)
        self.expect("stop_token_ids", right, stops, last=self.last)
        for prompt in prompts:
            ids, again = (lm.encode_prompt(prompt) for _ in range(2))
            right = isinstance(ids, tuple) and self.holds(ids) and len(ids) < lm.context_length
            facts = {"prompt": prompt.id, "context": lm.context_length, "last": self.last}
            self.expect("ids", right, ids, **facts)
            self.expect("same ids", again == ids, again, prompt=prompt.id)
            texts = [lm.decode(part) for part in (ids, list(ids), ids[:1], ())]
            are_texts = all(isinstance(text, str) for text in texts)
            self.expect("decode", are_texts and texts[0] == texts[1], texts)

    def check_chunk(self, state: TextState, chunk: Chunk, most: int) -> None:
        self.expect("chunk", isinstance(chunk, Chunk), chunk)
        ids, stops = chunk.token_ids, self.lm.stop_token_ids
        self.expect("length", isinstance(ids, tuple) and 1 <= len(ids) <= most, ids, most=most)
        right = self.holds(ids) and stops.isdisjoint(ids[:-1])
        self.expect("tokens", right, ids, last=self.last, stops=sorted(stops))
        room = self.lm.context_length - len(prefix_of(state))
        reason = "stop" if ids[-1] in stops else "length" if len(ids) >= room else None
        self.expect("finish_reason", chunk.finish_reason == reason, chunk, reason=reason)
        self.expect("early", reason is not None or len(ids) == most, ids, most=most)
        finite = all(-math.inf < logprob <= _ROUNDING for logprob in chunk.logprobs)
        right = finite and len(chunk.logprobs) == len(ids)
        self.expect("logprobs", right, chunk.logprobs, count=len(ids))

    def continued(self) -> list[TextState]:
        """States that continue after the first chunks; checks that decoding drops stop tokens."""
        lm, states = self.lm, []
        for state, (chunk,) in zip(self.states, self.draw(self.everything, 1), strict=True):
            ordinary = tuple(i for i in chunk.token_ids if i not in lm.stop_token_ids)
            for stop in sorted(lm.stop_token_ids):
                shown, text = lm.decode((*ordinary, stop)), lm.decode(ordinary)
                self.expect("special", shown == text, repr(shown), stop=stop, text=text)
            if chunk.finish_reason is None:
                states.append(transition(state, chunk, lm.context_length))
        return states

    def check_logprobs(self, rows: _Rows) -> None:
        shaped = self.draw(self.everything, params=_SHAPED)
        for params, drawn in ((SamplingParams(), rows), (_SHAPED, shaped)):
            states = [state for state, row in zip(self.states, drawn, strict=True) for _ in row]
            chunks = [chunk for row in drawn for chunk in row]
            found = self.lm.logprobs(states, chunks)
            self.expect("scored", [*map(len, found)] == [*map(len, chunks)], found)
            for chunk, logs in zip(chunks, found, strict=True):
                close = np.allclose(chunk.logprobs, logs, rtol=0, atol=self.tolerance)
                self.expect("model's", close, chunk.logprobs, params=params, logs=logs)

    def check_streams(self, rows: _Rows) -> None:
        """Sample the same chunks in other batches and portions."""
        self.expect_same("alone", rows, [row for i in self.everything for row in self.draw([i])])
        self.expect_same("order", rows, self.draw(self.everything[::-1])[::-1])
        later = self.draw(self.everything, first_sample=_SAMPLES)
        whole = self.draw(self.everything, 2 * _SAMPLES)
        joined = [[*a, *b] for a, b in zip(rows, later, strict=True)]
        self.expect_same("first_sample", whole, joined, half=_SAMPLES, whole=2 * _SAMPLES)
        most = self.max_new_tokens // 2
        cut = [[Chunk(c.token_ids[:most], c.logprobs[:most]) for c in row] for row in rows]
        self.expect_same("shorter", cut, self.draw(self.everything, max_new_tokens=most), most=most)

    def check_randomness(self) -> None:
        ((row,), (other,)) = (self.draw([0], _MANY, path=path) for path in (0, 1))
        differ = len({chunk.token_ids for chunk in row}) > 1
        certain = (len(row) - 1) * row[0].logprob > _LEAST_CHANCE
        got = f"{len(row)} times {row[0].token_ids}"
        self.expect("differ", differ or certain, got, count=len(row))
        differ = [a.token_ids for a in row] != [b.token_ids for b in other]
        certain = sum(chunk.logprob for chunk in row) > _LEAST_CHANCE
        self.expect("seed", differ or certain, f"the same {len(row)} chunks")

    def check_greedy(self, rows: _Rows) -> None:
        greedy = self.draw(self.everything, 2, params=_GREEDY)
        others = self.draw(self.everything, 1, path=1, params=_GREEDY)
        for sampled, (chunk, second), (other,) in zip(rows, greedy, others, strict=True):
            distinct = {chunk.token_ids, second.token_ids, other.token_ids}
            self.expect("greedy", len(distinct) == 1, distinct)
            most = max(one.logprobs[0] for one in sampled)
            self.expect("most", chunk.logprobs[0] >= most - self.tolerance, chunk, most=most)

    def check_stop_texts(self, rows: _Rows) -> None:
        """Check that a stop text inside a chunk ends the chunk there."""
        lm = self.lm
        for i, (chunk, *_) in enumerate(rows):
            texts = [lm.decode(chunk.token_ids[:n]) for n in range(1, len(chunk))]
            stop = next((t for t in texts if t.strip() and "\ufffd" not in t), None)
            if stop is None:
                continue
            length = next(n for n, text in enumerate(texts, 1) if stop in text)
            seeds, params = [spawn_seed(self.seed, 0, i)], SamplingParams(stop=(stop,))
            [[cut]] = lm.sample(
                [self.states[i]], 1, self.max_new_tokens, seeds=seeds, params=params
            )
            expected = Chunk(chunk.token_ids[:length], chunk.logprobs[:length])
            self.expect_same("stop", [[expected]], [[cut]], stop=stop)
            self.expect("goes on", cut.finish_reason is None, cut, stop=stop)

    def check_repeating(self, rows: _Rows) -> None:
        """Sample the same chunks again with ledgers, and check the charges."""
        ledgers = [Ledger() for _ in self.states]
        again = self.draw(self.everything, ledgers=ledgers)
        self.expect_same("again", rows, again)
        for state, row, ledger in zip(self.states, again, ledgers, strict=True):
            bound = self.lm.usage_bound(len(prefix_of(state)), [self.max_new_tokens] * _SAMPLES)
            self.check_charge(ledger.usage, sum(map(len, row)), len(prefix_of(state)), bound)
        ledgers = [Ledger() for _ in self.states]
        self.lm.logprobs(self.states, [row[0] for row in rows], ledgers=ledgers)
        charged = [(ledger.usage.lm_calls, ledger.usage.generated_tokens) for ledger in ledgers]
        self.expect("scoring", charged == [(1, 0)] * len(ledgers), charged)

    def check_charge(self, usage: Usage, tokens: int, prefix: int, bound: Usage) -> None:
        right = (usage.generated_tokens, usage.lm_calls) == (tokens, 1)
        self.expect("charge", right, usage, tokens=tokens)
        read = usage.prompt_tokens, usage.cached_tokens
        self.expect("prefix", min(read) >= 0 and sum(read) >= prefix, usage, prefix=prefix)
        within = (
            usage.prompt_tokens <= bound.prompt_tokens
            and usage.generated_tokens <= bound.generated_tokens
            and usage.flops <= bound.flops * (1 + 1e-9)
            and (usage.flops > 0 or not getattr(self.lm, "counts_flops", True))
        )
        self.expect("bound", within, usage, bound=bound)

    def check_refusals(self) -> None:
        state, most, sample = self.states[0], self.max_new_tokens, self.lm.sample
        ended = replace(state, finish_reason="stop")
        cases: dict[str, Callable[[], object]] = {
            "a state that has ended": lambda: sample([ended], 1, most, seeds=[0]),
            "num_samples=0": lambda: sample([state], 0, most, seeds=[0]),
            "max_new_tokens=0": lambda: sample([state], 1, 0, seeds=[0]),
            "two seeds for one state": lambda: sample([state], 1, most, seeds=[0, 1]),
        }
        for case, call in cases.items():
            self.expect_error("refusal", ValueError, call, case)

    def check_features(self) -> None:
        rows = self.lm.features(self.states)
        shape = (len(self.states), self.lm.feature_size)
        right = isinstance(rows, np.ndarray) and rows.shape == shape and rows.dtype == np.float32
        got = f"{type(rows).__name__} {getattr(rows, 'dtype', '')} {np.shape(rows)}"
        self.expect("features", right, got, shape=shape)
        self.expect("finite", np.isfinite(rows).all(), rows)
        singles = np.concatenate([self.lm.features([state]) for state in self.states])
        difference = float(np.abs(rows - singles).max())
        close = difference <= self.tolerance * max(1.0, float(np.abs(rows).max()))
        self.expect("batch", close, f"a difference of {difference:g}", most=self.tolerance)

    def expect_same(self, rule: str, rows: _Rows, others: _Rows, **facts: object) -> None:
        """Compare the tokens of chunks; a few can differ by a rounding tie."""
        differences = [
            (f"{a.token_ids} and {b.token_ids} for state {i}, sample {k}", _is_tie(a, b))
            for i, (row, other) in enumerate(zip(rows, others, strict=True))
            for k, (a, b) in enumerate(zip(row, other, strict=True))
            if a.token_ids != b.token_ids
        ]
        too_many = len(differences) > _MOST_TIES * sum(map(len, rows))
        for got in (text for text, is_tie in differences if too_many or not is_tie):
            raise self.fault(rule, got, **facts)


def _is_tie(a: Chunk, b: Chunk) -> bool:
    pairs = zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False)
    first = next(((p, q) for x, y, p, q in pairs if x != y), None)
    return first is not None and min(first) < _TAIL
