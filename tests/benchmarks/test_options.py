"""Groups of options."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.options import friendly


@dataclass(frozen=True)
class Sizes:
    names: Annotated[tuple[str, ...], typer.Option(help="Names.")]
    count: Annotated[int, typer.Option(min=1)] = 2
    hidden: int = 7

    def __post_init__(self):
        if not all(self.names):
            raise OSError("an empty name")


def shown(*words):
    app = typer.Typer()

    @app.command()
    @friendly
    def command(*, sizes: Sizes = Sizes(("a", "b"), count=3), other: float = 0.5) -> None:
        typer.echo(f"{sizes} {other}")

    return CliRunner().invoke(app, words)


def test_fields_are_options_with_the_defaults_of_the_instance():
    assert shown().output == "Sizes(names=('a', 'b'), count=3, hidden=7) 0.5\n"
    given = shown("--names", "c, d", "--count", "4", "--other", "1")
    assert given.output == "Sizes(names=('c', 'd'), count=4, hidden=7) 1.0\n"


def test_bounds_and_errors_of_a_group_exit_with_2():
    assert shown("--count", "0").exit_code == 2
    assert shown("--hidden", "1").exit_code == 2
    assert shown("--names", "a,,b").exit_code == 2
