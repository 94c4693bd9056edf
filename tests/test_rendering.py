import numpy as np
import pytest

from mbrl_text_env.task import Outcome, as_frame
from mbrl_text_env.types import Prompt, TextState


@pytest.mark.parametrize(
    "text", ["", "a" * 5000, "x\n" * 80, "日本語 🙂 \x00\x1b[31m\tb", "word " * 400]
)
def test_frames_have_one_size(text):
    state = TextState(Prompt.from_text(text + "?"), (1,))
    frame = as_frame(Outcome(state, text, 0.0, None, {}))
    assert (frame.shape, frame.dtype) == ((480, 640, 3), np.uint8)
    assert frame.min() < 100
    assert frame.max() == 255


def test_the_end_of_a_long_response_is_shown():
    state = TextState(Prompt.from_text("?"), (1,))
    one, other = (
        as_frame(Outcome(state, "word " * 400 + end, 0.0, None, {})) for end in ("yes", "no")
    )
    assert (one != other).any()
