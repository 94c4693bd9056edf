"""A self-contained HTML file: the report of a run, or a search to step through.

Prompts, answers, names and settings are untrusted text. The template escapes them, scripts read
data only from a JSON block and write only text nodes, and the content security policy forbids other
scripts and network access. Control characters and bidirectional marks are shown as escapes, as in
the terminal.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from mbrl_text_env.benchmarks.charts import Chart
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.statistics import Interval
from mbrl_text_env.benchmarks.terminal import COMMAND, visible
from mbrl_text_env.files import write_text

_PARTS = Path(__file__).parent / "html"
_PACKAGES = ("mbrl-text-env", "torch", "transformers", "numpy", "scipy", "gymnasium")
_MOST_SHOWN = 200
# In JSON inside HTML, these could end the script block or a line of the script.
_IN_HTML = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Page:
    """The contents of a page, from top to bottom; empty parts are left out.

    `data` are JSON values for the scripts: "answers" to browse, "search" (`SearchTree.to_dict`) to
    step through, and the data behind the figures. `run` comes from `provenance`: the command that
    repeats the run, and the machine and versions.
    """

    title: str
    verdict: str = ""
    warnings: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = True


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise `CompareError` with advice if files of a run are damaged or missing."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CompareError(
            f"{folder}: expected the files of a finished run, got a damaged or missing one "
            f"({type(error).__name__}: {error}). Run its command again to write them again."
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file of a run."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_page(path: str | Path, page: Page) -> None:
    """Write a page atomically; missing parent folders are created."""
    write_text(path, rendered(page))


def rendered(page: Page) -> str:
    """Render the page as HTML."""
    script = (_PARTS / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template("report.html.jinja").render(
        page=page,
        tables=[_cells(table) for table in page.tables],
        settings=_named(page.settings),
        environment=_named({k: v for k, v in page.run.items() if k != "command"}),
        command=page.run.get("command", ""),
        data=embedded_json(page.data),
        script=script,
        digest=digest,
        style=(_PARTS / "report.css").read_text(encoding="utf-8"),
    )


def answers_markdown(page: Page) -> str:
    """The answers of a page as HTML tables for Markdown, with their text escaped."""
    from markupsafe import Markup, escape

    def lines(text: str) -> Markup:
        return Markup("<br>").join(escape(line) for line in text.strip().split("\n"))

    answers = _shown(page.data["answers"])
    return _template("answers.md.jinja").render(answers=answers, lines=lines)


def _template(name: str) -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    ).get_template(name)


def embedded_json(data: Any) -> str:
    r"""Encode JSON for `<script type="application/json">`, with control characters escaped.

    Example:
        >>> embedded_json({"text": "</script> \x1b[31m"})
        '{"text":"\\u003c/script\\u003e \\\\x1b[31m"}'
    """
    text = json.dumps(_shown(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_IN_HTML)


def provenance() -> dict[str, Any]:
    """Record the command, date, machine and versions of a run."""
    return {
        "command": COMMAND.get(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions of this package and of the packages that results depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def token_ends(decode: Any, ids: Sequence[int]) -> list[int]:
    """The end of each token in the decoded text, in characters.

    If several tokens make one character, all but the last of them end where it begins.
    """
    whole, pieces = decode(ids), [decode([each]) for each in ids]
    if "".join(pieces) == whole:
        return list(accumulate(map(len, pieces)))
    ends = [0]
    for count in range(1, len(ids) + 1):
        # A prefix by character, not by path component, is intended.
        same = len(os.path.commonprefix([whole, decode(ids[:count])]))  # noqa: RUF071
        ends.append(max(ends[-1], same))
    return ends[1:]


def answer(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Make a cell of `answers` from a text and its row.

    If the row has `token_logprobs` and `token_ends`, the text is split into its tokens.
    """
    keys = ("score", "gold", "parts", "finish_reason", "response_tokens", "error")
    found = {key: row[key] for key in keys if row.get(key) not in (None, {})}
    found["score"] = row["score"]
    ends, logprobs = row.get("token_ends"), row.get("token_logprobs")
    if not ends or not logprobs:
        return {**found, "text": text}
    # Text decoded beyond the last token's end belongs to that token.
    cuts = [0, *ends[:-1], len(text)]
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    return {**found, "pieces": pieces, "logprobs": logprobs}


def _shown(data: Any) -> Any:
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, Interval):
        return data.as_mean()
    if isinstance(data, Mapping):
        return {visible(str(key)): _shown(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_shown(value) for value in data]
    # JSON has no infinity.
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _cells(table: Table) -> dict[str, Any]:
    """Convert a Rich table to plain strings."""
    return {
        "title": str(table.title or ""),
        "caption": str(table.caption or ""),
        "columns": [(str(c.header), c.justify == "right") for c in table.columns],
        "rows": list(zip(*(map(str, column.cells) for column in table.columns), strict=True)),
    }


def _named(values: Mapping[str, Any]) -> dict[str, str]:
    """Format settings as strings; long ones are cut."""
    shown = {}
    for name, value in values.items():
        if value not in (None, {}, []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            cut = len(text) > _MOST_SHOWN
            shown[name] = f"{text[:_MOST_SHOWN]} ..." if cut else text
    return shown
