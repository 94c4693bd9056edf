"""What makes a language model again in another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What makes a language model again.

    Args:
        model: Name or folder.
        options: Of the constructor.
        adapters: Folder and name of each adapter, in the order in which they were added.
    """

    model: Any
    options: dict[str, Any]
    adapters: tuple[tuple[Any, str], ...] = ()


def from_anywhere(source: Any) -> Any:
    """A folder by a path that holds in every working directory; a name on the Hub as it is."""
    is_path = isinstance(source, (str, Path))
    return str(Path(source).resolve()) if is_path and Path(source).exists() else source
