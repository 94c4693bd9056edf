"""Terminal output of `mbrl-text`.

Prompts, responses, names, paths and errors are untrusted text: they are not parsed as markup, emoji
codes or control sequences. Control characters and bidirectional marks are shown as escapes, such as
`\\x1b`. If the output is not a terminal, lines are not wrapped or cut.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

# Controls (C0, C1) except tabs and line ends, bidirectional marks, line separators, and lone
# surrogates, which streams cannot encode.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNLIMITED = 2**16
_LINE_SECONDS = 10.0
COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")
"""The running command line; empty if called from Python."""
# Newer versions of Typer vendor click, older ones import it.
UsageError: Any = typer.BadParameter.__mro__[1]


def visible(text: str) -> str:
    r"""Escape the control characters of a text, except tabs and line ends.

    Example:
        >>> visible("red \x1b[31m, back \r\u202e")
        'red \\x1b[31m, back \\r\\u202e'
    """

    def escape(found: re.Match[str]) -> str:
        return found[0].encode("unicode_escape").decode("ascii")

    return _UNSAFE.sub(escape, text.replace("\r\n", "\n"))


def plain(text: str, style: str | Style = "") -> Text:
    """Make a Rich text that is shown literally."""
    return Text(visible(text), style=style)


def panel(content: str, title: str, subtitle: str = "") -> Panel:
    """Frame a text; the frame is as wide as the text and its titles, if there is room."""
    text, above, below = plain(content), plain(title), plain(subtitle)
    width = max(text.__rich_measure__(errors, errors.options).maximum, above.cell_len + 2)
    return Panel(
        text, title=above, subtitle=below or None, width=max(width, below.cell_len + 2) + 4
    )


def numbers(*headings: str) -> list[Column]:
    """Right-aligned table columns for numbers."""
    return [Column(heading, justify="right") for heading in headings]


def table_of(rows: Iterable[Iterable[str]], *columns: Column | str, **options: Any) -> Table:
    """Make a Rich table with rows."""
    shown = Table(*columns, **options)
    for row in rows:
        shown.add_row(*row)
    return shown


class _Told(Progress):
    """A progress bar; without a terminal, a line every ten seconds."""

    def __init__(self, *columns: Any, console: Console) -> None:
        # `Progress` asks for the renderable before it has a console.
        self._told = math.inf
        super().__init__(*columns, console=console)
        self._told = time.monotonic()

    def get_renderable(self) -> Any:
        """Called by the bar's thread several times per second."""
        now = time.monotonic()
        if now - self._told >= _LINE_SECONDS and not self.console.is_terminal:
            self._told = now
            for task in self.tasks:
                if not task.finished and task.started:
                    count = f"{task.completed:.0f} of {task.total or 0:.0f}"
                    line = f"{task.description}: {count}, {task.elapsed or 0:.0f} s"
                    self.console.print(plain(line))
        return super().get_renderable()


def progress_bar(on: Console | None = None) -> Progress:
    """A progress bar with counts, elapsed time and remaining time.

    Without a terminal, it prints a line every ten seconds.
    """
    return _Told(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=on or console,
    )


class PlainConsole(Console):
    """A Rich console that prints strings literally and does not wrap them.

    Tables are as wide as the terminal or COLUMNS, or as they need if there is neither.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    @property  # type: ignore[misc]  # Rich's property has a setter, which is not used.
    def size(self) -> ConsoleDimensions:
        """Columns and lines; a pipe has no width, even if it takes colours."""
        found = super().size
        if self._width is not None or "COLUMNS" in os.environ or self.file.isatty():
            return found
        return ConsoleDimensions(_UNLIMITED, found.height)

    def on_broken_pipe(self) -> None:
        """Stop printing: the reader of the pipe, such as `head`, has closed it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings or Rich renderables."""
        if all(isinstance(item, str) for item in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a string a Rich text, with control characters escaped."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render, and escape control characters of Rich texts."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


console = PlainConsole()
errors = PlainConsole(stderr=True)


class CommandLine(TyperGroup):
    """A command group that prints usage errors and warnings in one line."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit with its code; see `benchmarks.cli`."""
        if not options.pop("standalone_mode", True):
            return super().main(*args, standalone_mode=False, **options)  # type: ignore[misc]
        words = args[0] if args else options.get("args")
        COMMAND.set(shlex.join(["mbrl-text", *map(str, sys.argv[1:] if words is None else words)]))
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            sys.exit(self._code(*args, **options))

    def _code(self, *args: Any, **options: Any) -> int:
        for stream in (sys.stdout, sys.stderr):
            # Characters that the encoding lacks are printed as escapes.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, standalone_mode=False, **options) or 0  # type: ignore[misc]
        except UsageError as error:
            # Without a message, the help was printed.
            if error.format_message():
                command = error.ctx.command_path if error.ctx else "mbrl-text"
                errors.print(
                    f"Error: {error.format_message()} (See `{command} --help`.)",
                    style="red",
                )
            return int(error.exit_code)
        except typer.Abort:
            errors.print("Aborted.")
            return 130


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    errors.print(f"{category.__name__}: {message}", style="yellow")
