"""One name a file, dependencies in one direction, libraries where they belong."""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megaegpt"
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
    "tiktoken": {"data/tokenizers/byte_pair_core.py", "data/tokenizers/gpt2_tokenizer.py"},
    "lm_eval": {"evaluation/harness.py"},
}
"""The only files that import a library whose insides they know."""

PROGRAMS = [
    path for folder in ("tests", "tools", "launchers") for path in ROOT.glob(f"{folder}/**/*.py")
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = re.compile(r":(?:class|func|mod|meth|attr|data):`~?([\w.]+)`|``(megaegpt(?:\.\w+)+)``")
TRACKED = ("megaegpt", "docs", "configs", "launchers", "tools", "tests")
A_FILE = re.compile(r"`([\w./-]+\.(?:py|sh|yaml|md|ipynb|sbatch))(?::\w+)?`")
A_FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
NOT_OURS = {"config.yaml", "preprocess_data.py", "preprocess_data_fast.py"}
"""Files of a run's folder, and Megatron's programs."""


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


@cache
def names_in(path: Path) -> frozenset[str]:
    """Whatever a file defines: functions, classes, their attributes, variables."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return frozenset(found)


def is_there(reference: str) -> bool:
    """Whether a dotted name is of a module, or of something that one defines."""
    parts = reference.split(".")
    if parts[0] not in {"megaegpt", "tools", "tests", "launchers"}:
        return any(
            parts[-1] in names_in(path) or hasattr(builtins, parts[-1])
            for path in [*FILES, *PROGRAMS]
        )
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.is_dir():
            return length == len(parts)
        if path.with_suffix(".py").exists():
            return set(parts[length:]) <= names_in(path.with_suffix(".py"))
    return False


def test_every_name_that_a_docstring_refers_to_is_there() -> None:
    missing = []
    for path in [*FILES, *PROGRAMS]:
        for groups in REFERENCE.findall(path.read_text(encoding="utf-8")):
            reference = "".join(groups)
            if not is_there(reference):
                missing.append(f"{path.relative_to(ROOT)}: {reference}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    places = (ROOT, PACKAGE, page.parent)
    known = {path.name for top in TRACKED for path in (ROOT / top).rglob("*")} | NOT_OURS
    known |= {path.name for path in ROOT.glob("*")}
    text = page.read_text(encoding="utf-8")
    names = [name for name in A_FILE.findall(text) if "/" in name or name not in known]
    names += [
        name
        for name in A_FOLDER.findall(text)
        if any((place / name.split("/")[0]).is_dir() for place in places)
    ]
    missing = [
        name
        for name in names
        if not any((place / name).exists() for place in places)
        and not any(path.as_posix().endswith(f"/{name}") for path in FILES)
    ]
    assert missing == []
