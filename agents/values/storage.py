"""The folders that value models are kept in: `value.json` and `value.safetensors`.

Numbers only: nothing in a folder is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.values.heads import Arrays
from mbrl_text_env.files import recover_folder, write_folder
from mbrl_text_env.values import ValueModelError

_CONFIG, _WEIGHTS = "value.json", "value.safetensors"
_FORMAT = 2


def write_value(folder: str | Path, config: dict[str, Any], arrays: Arrays) -> None:
    """Write a value model, whole or not at all; one that is there is replaced.

    Raises:
        ValueModelError: The folder holds something else, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = Path(folder)
    try:
        if target.exists() and not (target / _CONFIG).is_file() and any(target.iterdir()):
            raise OSError("it holds other things")
        with write_folder(target) as scratch:
            text = json.dumps({"format": _FORMAT, **config}, indent=2, allow_nan=False)
            (scratch / _CONFIG).write_text(text, encoding="utf-8")
            save_file(arrays, scratch / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueModelError(
            f"Expected a new folder, or one with a value model to replace, got {str(folder)!r} "
            f"({error}). Choose another."
        ) from error


@contextmanager
def reading(folder: str | Path) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """What `write_value` wrote; errors of the block are those of a damaged folder too.

    Raises:
        ValueModelError: The folder holds no value model, a damaged one, or one of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        recover_folder(folder)
        config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
        if config["format"] != _FORMAT:
            raise ValueError(f"format {config['format']!r}, this version reads {_FORMAT}")
        arrays = load_file(Path(folder) / _WEIGHTS)
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise ValueError("weights that are not finite")
        yield config, arrays
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueModelError(
            f"Expected a folder that a value model's `save` or `mbrl-text fit` wrote, got "
            f"{str(folder)!r} ({type(error).__name__}: {error}). Fit the value model anew."
        ) from error
