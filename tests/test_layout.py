"""One name a file, dependencies in one direction, libraries where they belong."""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megaegpt"
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    ("bars", "collector", "errors", "environment", "labels", "shipped", "text_tables"),
    ("arguments", "files", "json_files", "gguf_files", "precision"),
    ("config",),
    ("data", "parallel"),
    ("model",),
    ("interop", "planning", "report"),
    ("generation",),
    ("serving",),
    ("evaluation",),
    ("training",),
    ("api",),
    ("subcommands",),
    ("__main__",),
)
"""A folder may import what is in its own row or in one above."""

LIBRARIES = {
    "deepspeed": {
        "training/checkpoint/deepspeed_state.py",
        "training/checkpoint/universal.py",
        "training/engine/compat.py",
        "training/engine/engine.py",
        "training/engine/gradients.py",
        "training/engine/stage_3.py",
        "parallel/partitions.py",
    },
    "gguf": {"interop/gguf_weights.py", "data/tokenizers/gguf_vocabulary.py"},
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


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def our_private_names() -> frozenset[str]:
    """Of functions, classes, variables and attributes of the package and its programs."""
    found: set[str] = set()
    for path in [*FILES, *(path for path in PROGRAMS if "tests" not in path.parts)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and is_self(node.value):
                found.add(node.attr)
    return frozenset(filter(is_private, found))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_ours(module: str | None) -> bool:
    return str(module).split(".")[0] in ("megaegpt", "tools", "launchers")


def private_names_used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each use of a private name that a test does not own: imported, of another
    object, of a base class, or given by its name to ``setattr`` and the like.
    """
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and is_ours(n.module)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_ours(node.module):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and not is_self(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if re.fullmatch("(set|get|has|del)attr|patch|object", function):
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                yield from ((node.lineno, str(word).rpartition(".")[2]) for word in words)
        elif isinstance(node, ast.ClassDef) and {ast.unparse(b) for b in node.bases} & imported:
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            yield from ((n.lineno, n.attr) for n in inside if is_self(n.value))
            yield from ((n.lineno, n.name) for n in node.body if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from megaegpt.files import _a, b", ["_a"]),
        ("from megaegpt import files\nfiles._a()", ["_a"]),
        ("monkeypatch.setattr(files, '_a', 1); getattr(x, '_a'); x._b", ["_a", "_a"]),
        ("mock.patch.object(files, '_a'); mock.patch('megaegpt.files._a')", ["_a", "_a"]),
        ("from megaegpt.x import C\nclass D(C):\n    def _a(self): self._a", ["_a", "_a"]),
        ("class D:\n    def _a(self): self._a; self.a", []),
        ("x.a; x.__a__; print('_a'); from tests.x import _a", []),
    ],
)
def test_uses_of_private_names_are_found(text: str, names: list[str]) -> None:
    found = [name for _, name in private_names_used(ast.parse(text)) if name in ("_a", "__a__")]
    assert [name for name in found if is_private(name)] == names


def test_tests_use_no_private_name_of_the_package() -> None:
    used = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in PROGRAMS
        if "tests" in path.parts
        for line, name in private_names_used(ast.parse(path.read_text(encoding="utf-8")))
        if name in our_private_names()
    ]
    assert used == []
