"""Parquet: columns, row groups, nulls, damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = ["مرحبا بالعالم", "Здравствуй, мир", None, "", "one\ntwo"]


def write(path: Path, rows: list[str | None], column: str = "text", group: int = 2) -> Path:
    table = pa.table({"id": [f"id{n}" for n in range(len(rows))], column: rows, "score": rows})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_rows_of_several_groups_with_null_and_empty_texts_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "0000.parquet", ROWS)
    assert pq.ParquetFile(path).num_row_groups == 3
    documents, problems = read_skipping("parquet", path)
    assert texts(documents) == [row for row in ROWS if row]
    assert [document.position for document in documents] == ["row 1", "row 2", "row 5"]
    assert documents[1].metadata == {"id": "id1"}
    assert problems.examples == [
        f"{path}, row 3: column 'text' is empty",
        f"{path}, row 4: column 'text' is empty",
    ]
    with pytest.raises(DataError, match=r"0000\.parquet, row 3: column 'text' is empty"):
        read("parquet", path)


def test_the_column_can_be_named_and_a_missing_one_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a", "b"], column="maintext")
    assert texts(read("parquet", path, text_column="maintext")) == ["a", "b"]
    with pytest.raises(
        DataError, match="no text column 'text'; the columns are id, maintext, score"
    ):
        read("parquet", path)


def test_parts_in_numeric_order_and_openwebtext_takes_parquet_too(tmp_path: Path) -> None:
    for number in (11, 2):
        write(tmp_path / f"train-{number}.parquet", [f"part {number}"])
    for source in ("parquet", "openwebtext", "transwebedu"):
        assert texts(read(source, tmp_path)) == ["part 2", "part 11"]


@pytest.mark.parametrize("keep", [0, 8, 0.5])
def test_a_damaged_file_is_named_or_counted(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "a.parquet", ["a" * 1_000, "b"])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"a\.parquet: truncated, damaged or not parquet"):
        read("parquet", path)
    assert read_skipping("parquet", path)[1].count == 1


def test_a_git_lfs_pointer_is_named_and_capitals_change_nothing(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    (tmp_path / "A.PARQUET").write_bytes(pointer)
    for source in ("parquet", "openwebtext", "transwebedu"):
        with pytest.raises(DataError, match=r"A\.PARQUET: a Git LFS pointer"):
            read(source, tmp_path)
