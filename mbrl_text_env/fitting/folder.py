"""Save fitted models in folders of JSON and safetensors, without executable code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.files import recover_folder, write_folder
from mbrl_text_env.runs import writing

Arrays = dict[str, npt.NDArray[Any]]

# The attributes that `predict` and `transform` need, by class; other estimators have `numbers`.
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "StandardScaler": ("mean_", "scale_", "var_"),
    "PCA": ("mean_", "components_"),
    "Ridge": ("coef_", "intercept_"),
}


@dataclass(frozen=True)
class FolderKind:
    """The file names of one kind of fitted model, and the error and words for messages."""

    noun: str
    writer: str
    config: str
    weights: str
    version: int
    error: type[Exception]

    def check_target(self, folder: str | Path) -> None:
        """Raise an error if the target is a file or a folder with other files."""
        path = Path(folder)
        is_other = path.is_dir() and any(path.iterdir()) and not (path / self.config).is_file()
        if is_other or (path.exists() and not path.is_dir()):
            raise self.error(
                f"{folder}: expected a new folder, an empty one, or a {self.noun} to replace, got "
                f"{'a folder with other files' if is_other else 'a file'}. Choose another."
            )

    @contextmanager
    def writing(self, folder: str | Path) -> Iterator[Path]:
        """Yield a scratch folder that replaces `folder` atomically."""
        self.check_target(folder)
        with writing(Path(folder), self.error), write_folder(folder) as scratch:
            yield scratch

    def write_config(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write the JSON file."""
        values = {"format": self.version, **config}
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / self.config).write_text(text, encoding="utf-8")

    def write(self, folder: str | Path, config: Mapping[str, Any], arrays: Arrays) -> None:
        """Write JSON and arrays; replaces a folder of the same kind."""
        from safetensors.numpy import save

        with self.writing(folder) as scratch:
            self.write_config(scratch, config)
            # As bytes, because `save_file` makes files that only their owner can read.
            whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
            (scratch / self.weights).write_bytes(save(whole))

    @contextmanager
    def reading(self, folder: str | Path) -> Iterator[tuple[dict[str, Any], Callable[[], Arrays]]]:
        """Yield the JSON values and a reader of the arrays; errors mean a damaged folder."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(folder)

        def arrays() -> Arrays:
            found = load_file(path / self.weights)
            if not all(np.isfinite(values).all() for values in found.values()):
                raise ValueError("weights that are not finite")
            return found

        try:
            recover_folder(path)
            config = json.loads((path / self.config).read_text(encoding="utf-8"))
            if config["format"] != self.version:
                raise ValueError(
                    f"format {config['format']!r}, and this version reads {self.version}"
                )
            yield config, arrays
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise self.error(
                f"Expected the folder of a {self.noun}, as written by {self.writer}, got "
                f"{str(folder)!r} ({type(error).__name__}: {error}). Check the path, or fit the "
                f"{self.noun} anew."
            ) from error


def numbers_of(estimator: Any, name: str) -> Arrays:
    """The fitted arrays of an estimator of a known class, with names that start with `name`."""
    return {
        f"{name}.{place}.{attribute}": np.asarray(getattr(step, attribute))
        for place, step in _steps(estimator)
        for attribute in _attributes(step)
    }


def with_numbers(estimator: Any, arrays: Arrays, name: str) -> Any:
    """Set the arrays of `numbers_of` on an unfitted estimator, and return it."""
    for place, step in _steps(estimator):
        found = {name_: arrays[f"{name}.{place}.{name_}"] for name_ in _attributes(step)}
        vars(step).update(found)
        if type(step).__name__ in _NUMBERS:
            widths = {values.shape[-1] for values in found.values() if values.size != 1}
            if len(widths) > 1:
                raise ValueError(f"numbers of {type(step).__name__} that do not fit each other")
            step.n_features_in_ = widths.pop() if widths else 1
    return estimator


def _steps(estimator: Any) -> list[tuple[str, Any]]:
    return estimator.steps if hasattr(estimator, "steps") else [("0", estimator)]


def _attributes(step: Any) -> tuple[str, ...]:
    known = getattr(step, "numbers", None) or _NUMBERS.get(type(step).__name__)
    if known is None:
        raise ValueError(
            f"the head {type(step).__name__} is not kept: its fitted numbers are not known. Name "
            "them in an attribute `numbers`"
        )
    return tuple(known)
