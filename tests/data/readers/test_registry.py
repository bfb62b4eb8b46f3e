"""Sources and options by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.readers import READERS, parse_reader_options, read_documents, reader_options
from megaegpt.data.readers.documents import Problems
from megaegpt.errors import ConfigError, DataError


@pytest.mark.parametrize("source", READERS)
def test_every_reader_names_a_path_that_does_not_exist(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such file or folder"):
        list(read_documents(source, [tmp_path / "absent"], Problems()))


@pytest.mark.parametrize("source", READERS)
def test_every_reader_names_a_folder_without_files(source: str, tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(DataError, match="no files"):
        list(read_documents(source, [tmp_path], Problems()))


def test_an_unknown_source_or_option_is_told_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'wikipedia'"):
        read_documents("wikipedai", [tmp_path], Problems())
    with pytest.raises(ConfigError, match="did you mean 'text_column'"):
        read_documents("jsonl", [tmp_path], Problems(), text_colum="body")
    with pytest.raises(ConfigError, match="'keep_quoted' must be a bool"):
        read_documents("enron", [tmp_path], Problems(), keep_quoted="yes")


def test_options_are_parsed_by_the_type_of_their_default() -> None:
    assert reader_options("jsonl") == {"text_column": "text"}
    assert parse_reader_options("jsonl", ["text-column=maintext"]) == {"text_column": "maintext"}
    assert parse_reader_options("enron", ["keep_quoted", "keep_duplicates=false"]) == {
        "keep_quoted": True,
        "keep_duplicates": False,
    }
    with pytest.raises(ConfigError, match="true or false, not 'maybe'"):
        parse_reader_options("enron", ["keep_quoted=maybe"])
    with pytest.raises(ConfigError, match="needs a value"):
        parse_reader_options("jsonl", ["text_column"])
    with pytest.raises(ConfigError, match="there are none"):
        parse_reader_options("text", ["wraps"])
