"""A state as text, as a frame, or printed."""

from __future__ import annotations

import functools
import textwrap
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.task import Outcome

WIDTH, HEIGHT = 640, 480
"""Size of a frame in pixels."""

_FONT_SIZE, _LINE, _MARGIN, _COLUMNS = 16, 21, 12, 72


def as_text(outcome: Outcome) -> str:
    """Prompt, response, and how it ended."""
    return (
        f"Prompt: {outcome.state.prompt.text}\nResponse: {outcome.response} [{_ending(outcome)}]\n"
    )


def as_frame(outcome: Outcome) -> npt.NDArray[np.uint8]:
    """A picture of `as_text`, uint8[480, 640, 3], black on white.

    Long texts are cut: of the prompt the first lines are shown, of the response the last ones.
    Characters that DejaVu Sans Mono lacks (Chinese, emoji) are shown as boxes.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    drawing = ImageDraw.Draw(image)
    places = (HEIGHT - 2 * _MARGIN) // _LINE
    prompt = _wrapped(f"Prompt: {outcome.state.prompt.text}")
    if len(prompt) > places // 2:
        prompt = [*prompt[: places // 2 - 1], "..."]
    response = _wrapped(f"Response: {outcome.response} [{_ending(outcome)}]")
    room = places - len(prompt)
    if len(response) > room:
        response = ["...", *response[1 - room :]]
    for row, (line, colour) in enumerate(
        [*((line, "dimgray") for line in prompt), *((line, "black") for line in response)]
    ):
        drawing.text((_MARGIN, _MARGIN + row * _LINE), line, font=_font(), fill=colour)
    return np.asarray(image, dtype=np.uint8).copy()


def show(outcome: Outcome) -> None:
    """Print a state in a frame."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    score = "" if outcome.score is None else f"score {outcome.score:.3f}"
    tokens = f"{len(outcome.state.response_ids)} tokens"
    Console().print(
        Panel(
            Text(outcome.response),
            title=Text(outcome.state.prompt.text),
            subtitle=f"{outcome.state.finish_reason or 'going on'}, {tokens} {score}",
        )
    )


def _ending(outcome: Outcome) -> str:
    score = "" if outcome.score is None else f", score {outcome.score:.3f}"
    return (outcome.state.finish_reason or "...") + score


def _wrapped(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        # What cannot be printed, lone halves of characters too, would stop the drawing.
        shown = "".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs(4))
        lines.extend(textwrap.wrap(shown, _COLUMNS, drop_whitespace=False) or [""])
    return lines


@functools.cache
def _font() -> Any:
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    return ImageFont.truetype(str(path), _FONT_SIZE)
