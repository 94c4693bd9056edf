import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.language_models import CharTokenizer
from mbrl_text_env.mdp import (
    ChunkRules,
    EpisodeEndedError,
    InvalidChunkError,
    initial,
    is_terminal,
    transition,
)
from mbrl_text_env.types import Chunk, Message, Prompt, TextState

RULES = ChunkRules(vocab_size=6, stop_token_ids=frozenset({0}), max_chunk_tokens=3)
START = TextState(Prompt.from_text("ab"), prompt_ids=(1, 2))
chunks = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def test_initial_encodes_the_prompt():
    state = initial(Prompt.from_text("ba"), CharTokenizer("ab"))
    assert state.prompt_ids == (2, 1)
    assert state.response_ids == ()
    assert not is_terminal(state)


def test_transition_appends_and_stops():
    state = transition(START, RULES.chunk([3, 4]), 8)
    assert (state.response_ids, state.finish_reason) == ((3, 4), None)
    state = transition(state, RULES.chunk([5, 0]), 8)
    assert (state.response_ids, state.finish_reason) == ((3, 4, 5, 0), "stop")
    assert state.chunk_ends == (2, 4)


@pytest.mark.parametrize(
    ("limit", "ids", "reason"),
    [
        (3, (1, 2, 0), "stop"),  # a stop token in the last place still stops
        (2, (1, 2), "length"),
        (2, (1, 2, 0), "length"),  # the stop token is cut off with the rest
    ],
)
def test_the_limit_cuts(limit, ids, reason):
    state = transition(START, RULES.chunk(ids), limit)
    assert state.response_ids == ids[:limit]
    assert state.finish_reason == reason


def test_a_full_context_ends_by_length():
    state = transition(START, Chunk((1,), finish_reason="length"), 8)
    assert state.finish_reason == "length"


def test_ended_states_cannot_be_stepped():
    ended = transition(START, RULES.chunk([0]), 8)
    with pytest.raises(EpisodeEndedError, match="reset"):
        transition(ended, RULES.chunk([1]), 8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "1 to 3 token ids, got 0"),
        ([1, 2, 3, 4], "got 4"),
        ([6], "ids from 0 to 5"),
        ([-1], "ids from 0 to 5"),
        ([0, 1], "stop token may only be the last"),
    ],
)
def test_invalid_chunks(ids, message):
    with pytest.raises(InvalidChunkError, match=message):
        RULES.chunk(ids)


@given(st.lists(chunks, max_size=6), st.integers(1, 10))
def test_any_chunking_gives_the_same_state(parts, limit):
    """Token by token or chunk by chunk: the states are equal, and no response is too long."""
    by_chunk = by_token = START
    for ids in parts:
        if not is_terminal(by_chunk):
            by_chunk = transition(by_chunk, RULES.chunk(ids), limit)
        for token in ids:
            if not is_terminal(by_token):
                by_token = transition(by_token, RULES.chunk([token]), limit)
    assert by_chunk == by_token
    assert hash(by_chunk) == hash(by_token)
    assert len(by_chunk.response_ids) <= limit
    assert is_terminal(by_chunk) == (len(by_chunk.response_ids) == limit)


def test_log_probabilities_add_up_while_all_are_known():
    state = transition(START, Chunk((1, 2), (-0.5, -1.5)), 8)
    assert state.logprob == -2.0
    assert transition(state, Chunk((3,), (-1.0,)), 8).logprob == -3.0
    # The limit cuts tokens off, and what they cost with them.
    assert transition(state, Chunk((3, 4), (-1.0, -4.0)), 3).logprob == -3.0
    unknown = transition(state, Chunk((3,)), 8)
    assert unknown.logprob is None
    assert transition(unknown, Chunk((4,), (-1.0,)), 8).logprob is None
    assert unknown == transition(state, Chunk((3,), (-9.0,)), 8)


def test_states_pickle_and_ignore_chunk_ends():
    state = transition(START, RULES.chunk([3]), 8)
    restored = pickle.loads(pickle.dumps(state))  # noqa: S301 our own bytes
    assert restored == state
    assert restored.chunk_ends == state.chunk_ends
    assert TextState(state.prompt, state.prompt_ids, state.response_ids) == state


def test_prompts():
    assert Prompt("p", "plain").text == "plain"
    chat = Prompt("p", (Message("system", "Be brief."), Message("user", "Hi")))
    assert chat.text == "system: Be brief.\nuser: Hi"
    assert Prompt.from_text("Hi", chat=False).content == "Hi"
    with pytest.raises(ValueError, match="id"):
        Prompt("", "text")
    for empty in ("", " \n", (), (Message("user", ""),)):
        with pytest.raises(ValueError, match="empty"):
            Prompt("p", empty)


def test_chunk_logprob():
    assert Chunk((1, 2), (-0.5, -1.0)).logprob == -1.5
    assert Chunk((1,)).logprob != Chunk((1,)).logprob  # NaN: not known


class TestWhatIsNoPrompt:
    @pytest.mark.parametrize(
        ("place", "make"),
        [
            ("id", lambda half: Prompt.from_text("ab", half)),
            ("text", lambda half: Prompt.from_text(half, "p7")),
            ("text", lambda half: Prompt.from_text(half, "p7", chat=False)),
            ("text", lambda half: Prompt("p7", (Message("user", "a"), Message("user", half)))),
            ("metadata", lambda half: Prompt("p7", "ab", {"tests": [{"a": [half]}]})),
            ("metadata", lambda half: Prompt("p7", "ab", {half: 1})),
        ],
    )
    @pytest.mark.parametrize("half", ["half \ud83d", "\udc80"])
    def test_half_a_character(self, place, make, half):
        with pytest.raises(ValueError, match=rf"half a character in its {place}: ") as caught:
            make(half)
        assert not isinstance(caught.value, UnicodeError)
        assert place == "id" or "'p7'" in str(caught.value)
        str(caught.value).encode()

    @pytest.mark.parametrize("role", ["", "user<|im_end|>", "end|>\n<|system", "us\ner", "[INST]"])
    def test_roles_that_are_no_names(self, role):
        with pytest.raises(ValueError, match="'p7': expected roles of letters"):
            Prompt("p7", (Message(role, "Hi"),))

    @pytest.mark.parametrize(
        "content", [None, 5, ["Hi"], ({"role": "user", "content": "Hi"},), (Message("user", None),)]
    )
    def test_contents_of_other_types(self, content):
        with pytest.raises(TypeError, match=r"'p7': expected a string, or a tuple of `Message"):
            Prompt("p7", content)

    def test_any_other_text_is_taken(self):
        text = "\x00\x07\x1b[31m \ufeff\u202e 🙂 e\u0301 \uffff"
        assert Prompt(text, (Message("user", text), Message("system", ""))).id == text
        assert Prompt("p", [Message("user", "Hi")]).content == (Message("user", "Hi"),)
