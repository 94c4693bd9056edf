"""A hook of MkDocs: pages take the reference from the package itself.

A line `@api PACKAGE` becomes the reference of what the package exports, `@commands` that of the
command line, `@notebook FILE` the cells of a notebook with their outputs.
"""

import re
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Any

import click
import griffe
import nbformat
import typer
from typer.cli import get_docs_for_click

from mbrl_text_env.benchmarks.cli import app

_ROOT = "mbrl_text_env"


class Examples(griffe.Extension):
    """Reads the section `Example:` as what it is, code; griffe knows `Examples:` alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    markdown = re.sub(r"^@api (\S+)$", lambda found: _exports(found[1]), markdown, flags=re.M)
    markdown = re.sub(r"^@notebook (\S+)$", lambda found: _notebook(found[1]), markdown, flags=re.M)
    return re.sub("^@commands$", lambda _: _commands(), markdown, flags=re.M)


def _exports(package: str) -> str:
    module, inside = import_module(package), rf"{package}\.\w+$" if package == _ROOT else package
    found = (getattr(module, name) for name in sorted(module.__all__))
    # Constants are described where they are used, and what other packages hold with these.
    return "\n\n".join(
        f"::: {each.__module__}.{each.__name__}"
        for each in found
        if hasattr(each, "__name__") and re.match(inside, each.__module__)
    )


def _notebook(name: str) -> str:
    cells = nbformat.read(Path(__file__).parents[1] / name, as_version=4).cells
    return "\n\n".join(
        f"```python\n{cell.source}\n```\n\n" + "\n\n".join(map(_output, cell.outputs))
        if cell.cell_type == "code"
        else cell.source
        for cell in cells
    )


def _output(output: Any) -> str:
    """An image, or text as it is: indented, nothing in it is read as Markdown."""
    data = output.get("data", {"text/plain": output.get("text")})
    if "image/png" in data:
        return f'<img alt="Output" src="data:image/png;base64,{data["image/png"].strip()}">'
    return indent(data["text/plain"], "    ")


def _commands() -> str:
    command = typer.main.get_command(app)
    docs = get_docs_for_click(obj=command, ctx=click.Context(command), name="mbrl-text")
    return docs.partition("\n")[2]
