"""Commands made of functions: groups of options, panels in the help, errors one can act on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from mbrl_text_env._lazy import missing_extra
from mbrl_text_env.benchmarks.terminal import errors

_METAVARS = {int: "N", float: "X", Path: "PATH", bool: None}


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: groups of options, and errors that a user can act on.

    A parameter whose type is a dataclass stands for one option for each annotated field; its
    default says the options' defaults. A tuple of texts is written with commas. Errors that the
    user can correct are printed without a traceback and exit with 2. Ctrl-C exits with 130 and says
    how to go on, where what was stopped knows.

    Example:
        >>> @app.command()  # doctest: +SKIP
        ... @friendly
        ... def show(model: ModelOptions = ModelOptions(dtype="int8")) -> None:
        ...     print(model.load().name)
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            options += _options_of(groups[name], parameter.default)
        else:
            hint = _shown(hints[name]) if get_origin(hints[name]) is Annotated else hints[name]
            options.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        try:
            settings = {name: _settings(kind, values) for name, kind in groups.items()}
            command(**settings, **values)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            # One of ours, which name what to change, or of files and packages.
            is_ours = type(error).__module__.startswith("mbrl_text_env")
            if not (is_ours or isinstance(error, OSError) or missing_extra(error) is not None):
                raise
            errors.print(f"{type(error).__name__}: {error}", style="red")
            raise typer.Exit(2) from error
        except SystemExit as left:
            # Code of the user's that calls `sys.exit`: not all was done, whatever it says.
            errors.print(f"Code that was called ended the program (SystemExit: {left}).")
            raise typer.Exit(2) from left
        except KeyboardInterrupt as stopped:
            # Typer would end with no more than "Aborted".
            errors.print(str(stopped) or "Stopped; the same command goes on.")
            raise typer.Exit(130) from stopped

    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {option.name: option.annotation for option in options}
    return wrapped


def _options_of(group: Any, default: Any) -> list[inspect.Parameter]:
    """One parameter an annotated field of a dataclass; a default instance gives other defaults."""
    source = group if default is inspect.Parameter.empty else default
    found = []
    for name, hint in get_type_hints(group, include_extras=True).items():
        if get_origin(hint) is Annotated:
            value = getattr(source, name, inspect.Parameter.empty)
            hint = _shown(hint, getattr(group, "panel", None))
            if isinstance(value, tuple):
                [info] = hint.__metadata__
                # With spaces, for the help breaks lines there.
                info.show_default = ", ".join(value)
                hint, value = Annotated[str, info], ",".join(value)
            only = inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(name, only, default=value, annotation=hint))
    return found


def _shown(hint: Any, panel: str | None = None) -> Any:
    """An option with a short word for its type, and the panel where the help has it."""
    kind, info = get_args(hint)
    kind, shown = next(iter(get_args(kind)), kind), copy.copy(info)
    shown.metavar = info.metavar or _METAVARS.get(kind, "TEXT")
    shown.rich_help_panel = panel
    return Annotated[get_args(hint)[0], shown]


def _settings(group: Any, values: dict[str, Any]) -> Any:
    """A dataclass of the options that belong to it, which are taken out of the values."""
    found = {}
    for name, hint in get_type_hints(group).items():
        if name in values:
            value = values.pop(name)
            is_several = get_origin(hint) is tuple
            found[name] = tuple(map(str.strip, value.split(","))) if is_several else value
    return group(**found)
