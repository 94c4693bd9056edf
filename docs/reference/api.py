"""A hook of MkDocs: pages take the reference from the package itself.

A line `@api PACKAGE` becomes the reference of what the package exports, `@commands` that of the
command line.
"""

import re
from importlib import import_module
from typing import Any

import click
import griffe
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


def _commands() -> str:
    command = typer.main.get_command(app)
    docs = get_docs_for_click(obj=command, ctx=click.Context(command), name="mbrl-text")
    return docs.partition("\n")[2]
