"""The programs and configurations that come with the package.

In a checkout they lie beside it: ``tools/``, ``launchers/`` and ``configs/``. A wheel has them
inside the package, in ``programs/``, so that nothing of theirs is at the top of site-packages.
"""

from __future__ import annotations

import difflib
from pathlib import Path

_INSTALLED = Path(__file__).with_name("programs")

SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1]
"""Folder of ``tools/``, ``launchers/`` and ``configs/``."""


def find_config(name: str | Path) -> Path:
    """The file that ``--config`` names.

    A file of that name is taken first. Where there is none, the name is looked for among the
    configurations that come with the package, with or without ``configs/`` before it and ``.yaml``
    behind it. What is nowhere comes back as it is, for its reader to complain about.

    Example:
        >>> find_config("gpt2_124m").name
        'gpt2_124m.yaml'
    """
    given = Path(name)
    if given.is_absolute() or ".." in given.parts or _exists(given):
        return given
    below = given.relative_to("configs") if given.parts[:1] == ("configs",) else given
    for candidate in (below, Path(f"{below}.yaml")):
        if _exists(SHIPPED / "configs" / candidate, file=True):
            return SHIPPED / "configs" / candidate
    return given


def near_configs(name: str | Path) -> list[str]:
    """Names of shipped configurations that may be meant by one that is not there, the likeliest
    first.

    Example:
        >>> near_configs("configs/gpt2_142m.yaml")[0]
        'gpt2_124m'
    """
    folder = SHIPPED / "configs"
    paths = [path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.yaml"))]
    by_name = {path.name: path.as_posix() for path in reversed(paths)}
    wanted = Path(name).name.removesuffix(".yaml")
    return [by_name[near] for near in difflib.get_close_matches(wanted, by_name)]


def _exists(path: Path, file: bool = False) -> bool:
    try:
        return path.is_file() if file else path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have
        return False
