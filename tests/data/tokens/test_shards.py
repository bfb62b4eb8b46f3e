"""Shards are Megatron's, byte for byte, and nothing damaged is ever read."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.tokens import shards
from megaegpt.data.tokens.shard_contents import LengthHistogram
from megaegpt.data.tokens.shards import Shard, ShardWarning, ShardWriter
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER

DOCUMENTS = [[5, 6, 50256], [50256], [], [0, 1, 2, 3, 65499], [7]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()


def expected_files(documents: list[list[int]], code: int, letter: str) -> tuple[bytes, bytes]:
    """The two files, built from the format's description alone."""
    size = struct.calcsize(letter)
    pointers, position = [], 0
    for document in documents:
        pointers.append(position)
        position += size * len(document)
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", count) + struct.pack("<Q", count + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    index += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    index += b"".join(struct.pack("<q", number) for number in range(count + 1))
    tokens = b"".join(struct.pack(f"<{letter}", t) for document in documents for t in document)
    return tokens, index


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_files_are_what_the_format_says(
    tmp_path: Path, dtype: type, code: int, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 2)  # several blocks of the index
    write(tmp_path / "s", DOCUMENTS, dtype)
    tokens, index = expected_files(DOCUMENTS, code, letter)
    assert (tmp_path / "s.bin").read_bytes() == tokens
    assert (tmp_path / "s.idx").read_bytes() == index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path: Path, dtype: type) -> None:
    megatron = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset",
        reason="pip install --no-deps megatron-core==0.16.1 to compare with Megatron's own shards",
    )
    torch = pytest.importorskip("torch")
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(DOCUMENTS))] == DOCUMENTS
    read_back = Shard(tmp_path / "theirs")
    assert [read_back.document(i).tolist() for i in range(len(DOCUMENTS))] == DOCUMENTS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20))
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "s"
    write(prefix, documents)
    shard = Shard(prefix)
    assert shard.num_documents == len(documents)
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    shard.verify()


def test_a_batch_of_documents_is_written_as_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "single", DOCUMENTS)
    with ShardWriter(tmp_path / "batch") as writer:
        writer.add(
            np.concatenate([np.array(d, np.uint16) for d in DOCUMENTS]),
            np.array([len(d) for d in DOCUMENTS]),
        )
        summary = writer.finish()
    assert (tmp_path / "single.bin").read_bytes() == (tmp_path / "batch.bin").read_bytes()
    assert (tmp_path / "single.idx").read_bytes() == (tmp_path / "batch.idx").read_bytes()
    assert (summary.name, summary.documents, summary.tokens) == ("batch", 5, 10)
    for suffix, checksum in ((".bin", summary.bin_sha256), (".idx", summary.idx_sha256)):
        content = (tmp_path / f"batch{suffix}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum


def test_an_unfinished_writer_leaves_nothing_and_keeps_the_old_shard(tmp_path: Path) -> None:
    write(tmp_path / "s", DOCUMENTS)
    before = (tmp_path / "s.bin").read_bytes()
    with ShardWriter(tmp_path / "s") as writer:
        writer.add_document(np.array([1, 2, 3]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]
    assert (tmp_path / "s.bin").read_bytes() == before


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.bin.tmp").symlink_to("/dev/full")
    documents = [[0] * 10_000] * 100
    with pytest.raises(DataError, match=r"cannot write .*s\.bin: No space left on device"):
        write(tmp_path / "s", documents)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*nowhere/s\.bin: No such file"):
        ShardWriter(tmp_path / "nowhere" / "s")


def test_types_without_a_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot hold float32"):
        ShardWriter(tmp_path / "s", np.float32)


def damage(path: Path, position: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (0, b"TNTIDX\x00\x00", "old TNTIDX format"),
        (0, b"PK\x03\x04\x00\x00\x00\x00\x00", "not a shard index"),
        (9, b"\x02", "has version 2"),
        (17, b"\x63", "type code 99"),
        (17, b"\x06", "type code 6"),
        (17, b"\x04", r"s\.bin is truncated: 20 bytes"),
        (18, b"\x06", r"s\.idx is truncated"),
        (18, b"\x04", r"s\.idx is too long"),
        (34 + 12 * 5, b"\x01", "do not cover"),
        (34 + 4 * 5, b"\x02", "does not start at 0"),
    ],
)
def test_a_damaged_index_is_refused_by_name(
    tmp_path: Path, position: int, content: bytes, message: str
) -> None:
    write(tmp_path / "s", DOCUMENTS)
    damage(tmp_path / "s.idx", position, content)
    with pytest.raises(DataError, match=message) as error:
        Shard(tmp_path / "s")
    assert str(tmp_path / "s.") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 20, 33, 34, 60])
def test_a_truncated_index_is_refused_at_every_length(tmp_path: Path, size: int) -> None:
    write(tmp_path / "s", DOCUMENTS)
    index = tmp_path / "s.idx"
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(DataError, match=r"s\.idx is (truncated|not a shard index)"):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "kind"), [(-2, "truncated"), (-1, "truncated"), (2, "too long")]
)
def test_tokens_that_do_not_fit_the_index_are_refused(
    tmp_path: Path, change: int, kind: str
) -> None:
    write(tmp_path / "s", DOCUMENTS)
    tokens = tmp_path / "s.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DataError, match=rf"s\.bin is {kind}: {20 + change} bytes"):
        Shard(tmp_path / "s")


def test_half_a_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", DOCUMENTS)
    (tmp_path / "s.bin").unlink()
    with pytest.raises(DataError, match=r"s\.bin does not exist"):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (34 + 4 * 5 + 8, b"\x04", "do not follow each other"),
        (34, b"\xff\xff\xff\xff", "negative length"),
        (34 + 12 * 5 + 8, b"\x04", "go backwards"),
    ],
)
def test_verify_finds_what_opening_does_not_look_for(
    tmp_path: Path, position: int, content: bytes, message: str
) -> None:
    write(tmp_path / "s", DOCUMENTS)
    damage(tmp_path / "s.idx", position, content)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s").verify()


def test_verify_finds_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "s", DOCUMENTS)
    Shard(tmp_path / "s").verify(vocab_size=65500)
    with pytest.raises(DataError, match="outside the vocabulary of 50257"):
        Shard(tmp_path / "s").verify(vocab_size=50257)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    """Megatron's sentence-split shards: document 0 is sequences 0 and 1, document 1 is the rest."""
    tokens = np.arange(9, dtype=np.uint16)
    tokens.tofile(tmp_path / "s.bin")
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    index += (
        struct.pack("<3i", 4, 3, 2) + struct.pack("<3q", 0, 8, 14) + struct.pack("<3q", 0, 2, 3)
    )
    (tmp_path / "s.idx").write_bytes(index)
    shard = Shard(tmp_path / "s")
    shard.verify()
    assert shard.document(0).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert shard.document(1).tolist() == [7, 8]


def test_an_index_whose_documents_end_early_is_read_by_its_sequences(tmp_path: Path) -> None:
    """As GPT-NeoX's merge leaves it: all sequences, and no list of documents."""
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "s.bin")
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 1)
    index += struct.pack("<3i", 4, 3, 2) + struct.pack("<3q", 0, 8, 14) + struct.pack("<q", 0)
    (tmp_path / "s.idx").write_bytes(index)
    with pytest.warns(ShardWarning, match=r"s\.idx: its documents do not cover its sequences"):
        shard = Shard(tmp_path / "s")
    shard.verify()
    documents = [shard.document(number).tolist() for number in range(shard.num_documents)]
    assert documents == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    assert shard.document_starts(1, 3).tolist() == [1, 2, 3]
    histogram = LengthHistogram([shard])
    assert (histogram.documents, histogram.tokens, histogram.longest) == (3, 9, 4)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_git_lfs_pointer_in_a_shards_place_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s", DOCUMENTS)
    (tmp_path / f"s{suffix}").write_bytes(LFS_POINTER + b"v1\noid sha256:12\nsize 34\n")
    with pytest.raises(DataError, match=rf"s\{suffix}: a Git LFS pointer"):
        Shard(tmp_path / "s")


def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4, 300]])
    Shard(tmp_path / "s").check_ids(301)
    with pytest.raises(DataError, match=r"s\.bin holds id 300 at token 4, outside .* of 300:"):
        Shard(tmp_path / "s").check_ids(300)
