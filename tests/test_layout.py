"""One name a file, dependencies in one direction, libraries where they belong."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megaegpt"
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    ("errors", "environment", "labels", "text_tables"),
    ("arguments", "files", "json_files", "precision"),
    ("config",),
    ("data", "parallel"),
    ("model",),
    ("interop", "planning", "report"),
    ("generation",),
    ("training",),
    ("evaluation",),
    ("api",),
)
"""A folder may import what is in its own row or in one above."""

LIBRARIES = {
    "deepspeed": {
        "training/checkpoint/deepspeed_state.py",
        "training/checkpoint/universal.py",
        "training/engine/compat.py",
        "training/engine/engine.py",
        "training/engine/gradients.py",
    },
    "transformers": {"interop/huggingface.py"},
    "tiktoken": {"data/tokenizer.py"},
    "lm_eval": {"evaluation/harness.py"},
}
"""The only files that import a library whose insides they know."""


def modules_imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, inside functions as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_no_two_files_of_the_package_have_the_same_name() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_dependencies_between_folders_point_one_way() -> None:
    rank = {name: number for number, row in enumerate(ORDER) for name in row}
    upward = []
    for path in FILES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in modules_imported(path):
            if module.startswith("megaegpt.") and rank[module.split(".")[1]] > rank[own]:
                upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert upward == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_its_insides_are_known(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(module.split(".")[0] == library for module in modules_imported(path))
    }
    assert users <= LIBRARIES[library]
