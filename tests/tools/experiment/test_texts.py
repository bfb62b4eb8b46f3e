"""The texts of an experiment that are sources of an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import DataError
from tools.experiment.plan import ExperimentPlan
from tools.experiment.texts import prepare_corpus


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__.py": "import other\n",
        "parts/a.py": "a = 1\n",
        "parts/b.md": "# B\n",
        "parts/deep/c.py": "c = 3\n",
        "parts/d.bin": "\x00",
    }
    for name, text in files.items():
        path = tmp_path / "sources_of_a_test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def prepared(name: str, folder: Path) -> str:
    """The texts of ``name``, as the part that is trained on."""
    corpora = {"a": {"train": [name], "held_out": ["king_james_bible"]}}
    plan = ExperimentPlan(corpora=corpora, max_characters=1000)
    prepare_corpus(plan, "a", folder, Tokenizer.load())
    stream = TokenStream([str(folder / "train")])
    return Tokenizer.load().decode(stream.read(0, len(stream)).tolist())


@pytest.mark.usefixtures("package")
def test_the_files_of_a_package_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    text = f"a = 1\n{end}# B\n{end}c = 3\n{end}"
    assert prepared("package:sources_of_a_test/parts", tmp_path / "some") == text
    assert prepared("package:sources_of_a_test", tmp_path / "all") == f"import other\n{end}{text}"


@pytest.mark.usefixtures("package")
def test_a_file_of_a_package_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "sources_of_a_test" / "parts" / "a.py").write_bytes(
        "name = 'é'\n".encode("latin-1")
    )
    with pytest.raises(DataError, match=r"parts/a.py cannot be read: it is not UTF-8"):
        prepared("package:sources_of_a_test/parts", tmp_path / "texts")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:not_installed_here", "no package not_installed_here is installed"),
        ("package:sources_of_a_test/nothing", r"no \.py.* files in "),
        ("package:../x", r"no package \.\. is installed"),
    ],
)
def test_a_package_that_is_not_there_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(name, tmp_path / "texts")
