"""Turn functions into commands, with option groups, help panels and short error messages."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from mbrl_text_env._lazy import missing_extra
from mbrl_text_env.benchmarks.terminal import errors

_METAVARS = {int: "N", float: "X", Path: "PATH", bool: None}


def option(default: Any, about: Any, *names: str, **more: Any) -> Any:
    """Declare an option: a field of a dataclass, or a parameter of a `friendly` command.

    `about` is its help or a `typer.Option`; names and the rest go to `typer.Option`. A default of
    `...` makes the option required.
    """
    info = typer.Option(*names, help=about or None, **more) if isinstance(about, str) else about
    given = {} if default is ... else {"default": default}
    return field(**given, metadata={"option": info})


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with option groups and short error messages.

    A parameter whose type is a dataclass becomes one option per `option` field; its default
    overrides theirs. A tuple of strings is given comma-separated. Errors that the user can fix are
    printed without a traceback and exit with 2. Ctrl-C exits with 130 and prints how to resume.

    Example:
        >>> @app.command()  # doctest: +SKIP
        ... @friendly
        ... def show(model: ModelOptions = INT8, seed: int = option(0, "A seed.")) -> None:
        ...     print(model.load().name)
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        default: Any = parameter.default
        if name in groups:
            options += _options_of(groups[name], default)
        elif isinstance(default, Field):
            options.append(_option(name, hints[name], default, default.default))
        else:
            options.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        try:
            settings = {name: _settings(kind, values) for name, kind in groups.items()}
            command(**settings, **values)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            # Errors of this package, files and missing extras: the message is enough.
            is_ours = type(error).__module__.startswith("mbrl_text_env")
            if not (is_ours or isinstance(error, OSError) or missing_extra(error) is not None):
                raise
            errors.print(f"{type(error).__name__}: {error}", style="red")
            raise typer.Exit(2) from error
        except SystemExit as left:
            # The user's code called `sys.exit`: the command did not finish, whatever the code.
            errors.print(f"User code ended the program (SystemExit: {left}).")
            raise typer.Exit(2) from left
        except KeyboardInterrupt as stopped:
            # Typer would print only "Aborted".
            errors.print(str(stopped) or "Stopped. Run the same command again to resume.")
            raise typer.Exit(130) from stopped

    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {option.name: option.annotation for option in options}
    return wrapped


def _options_of(group: Any, default: Any) -> list[inspect.Parameter]:
    """One parameter per option of a dataclass; a default instance overrides the defaults."""
    hints, panel = get_type_hints(group), getattr(group, "panel", None)
    return [
        _option(each.name, hints[each.name], each, getattr(default, each.name, each.default), panel)
        for each in fields(group)
        if "option" in each.metadata
    ]


def _option(
    name: str, kind: Any, own: Field[Any], value: Any, panel: str | None = None
) -> inspect.Parameter:
    """Make a parameter with a short metavar and the panel of the help that shows it."""
    info = copy.copy(own.metadata["option"])
    plain = next((each for each in get_args(kind) if isinstance(each, type)), kind)
    info.metavar = info.metavar or _METAVARS.get(plain, "TEXT")
    info.rich_help_panel = panel
    if get_origin(kind) is tuple:
        kind = str
        if isinstance(value, tuple):
            # With spaces, where the help can break lines.
            info.show_default, value = ", ".join(value), ",".join(value)
    empty = inspect.Parameter.empty if value is MISSING else value
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=empty, annotation=Annotated[kind, info])


def _settings(group: Any, values: dict[str, Any]) -> Any:
    """Make a dataclass from its options, which are removed from the values."""
    found = {}
    for name, hint in get_type_hints(group).items():
        if name in values:
            value = values.pop(name)
            is_several = get_origin(hint) is tuple
            found[name] = tuple(map(str.strip, value.split(","))) if is_several else value
    return group(**found)
