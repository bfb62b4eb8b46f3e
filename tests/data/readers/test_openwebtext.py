"""OpenWebText: tars of xz-compressed tars, whole, damaged and hostile."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path

import pytest

from megaegpt.data.readers import inputs
from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

PAGES = [
    {"0000001-aa.txt": "First page.\n\nIts end.\n", "0000002-bb.txt": "Zwölf\n\n\n\n\nBoxkämpfer"},
    {"0000003-cc.txt": "", "0000004-dd.txt": "Last page", "0000005-ee.html": "<p>not text</p>"},
]
TEXTS = ["First page.\n\nIts end.", "Zwölf\n\nBoxkämpfer", "Last page"]


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def subset(pages: dict[str, str]) -> bytes:
    return lzma.compress(tar({name: text.encode() for name, text in pages.items()}))


def outer(*subsets: bytes) -> bytes:
    name = "openwebtext/urlsf_subset00-{}_data.xz"
    return tar({name.format(n + 1): data for n, data in enumerate(subsets)})


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_outer_archive_compressed_or_not_and_a_folder_of_parts_give_the_same(
    tmp_path: Path,
) -> None:
    subsets = [subset(pages) for pages in PAGES]
    plain = write(tmp_path / "urlsf_subset00.tar", outer(*subsets))
    compressed = write(tmp_path / "openwebtext.tar.xz", lzma.compress(outer(*subsets)))
    folder = tmp_path / "openwebtext"
    for number, data in zip((2, 10), subsets, strict=True):
        write(folder / f"urlsf_subset00-{number}_data.xz", data)
    for path in (plain, compressed, folder):
        assert texts(read("openwebtext", path)) == TEXTS
    document = read("openwebtext", plain)[1]
    assert document.where == f"{plain}, openwebtext/urlsf_subset00-1_data.xz/0000002-bb.txt"


def test_names_that_climb_out_of_the_archive_are_only_names(tmp_path: Path) -> None:
    evil = subset({"../../../tmp/evil.txt": "a page", "/etc/evil.txt": "another"})
    path = write(tmp_path / "in" / "a.tar", outer(evil))
    assert texts(read("openwebtext", path)) == ["a page", "another"]
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_an_archive_of_the_folder_it_lay_in_is_read(tmp_path: Path) -> None:
    """``tar -cf a.tar .`` puts ``./`` before every name."""
    path = write(tmp_path / "a.tar", tar({"./a_data.xz": subset({"./1.txt": "a page"})}))
    assert texts(read("openwebtext", path)) == ["a page"]


def test_links_devices_and_hidden_members_are_left_out(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        hidden = tarfile.TarInfo("__MACOSX/._a.txt")
        hidden.size = 3
        archive.addfile(hidden, io.BytesIO(b"xxx"))
    assert read("openwebtext", write(tmp_path / "a.tar", out.getvalue())) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_named_or_counted(tmp_path: Path, share: float) -> None:
    whole = outer(*(subset({f"{n}.txt": "long text " * (n + 1)}) for n in range(9)))
    every = texts(read("openwebtext", write(tmp_path / "a.tar", whole)))
    end_of_the_last_member = len(whole.rstrip(b"\0"))
    path = write(tmp_path / "cut.tar", whole[: int(share * end_of_the_last_member)])
    with pytest.raises(DataError, match=r"cut\.tar.*truncated"):
        read("openwebtext", path)
    documents, problems = read_skipping("openwebtext", path)
    assert texts(documents) == every[: len(documents)]
    assert problems.count >= 1


def test_an_archive_cut_between_two_members_does_not_pass_for_whole(tmp_path: Path) -> None:
    whole = tar({f"{n}.txt": b"x" * 512 for n in range(4)})
    path = write(tmp_path / "cut.tar", whole[: 2 * 1024])
    with pytest.raises(DataError, match=r"cut\.tar: truncated: the archive's end mark is missing"):
        read("openwebtext", path)
    assert len(read_skipping("openwebtext", path)[0]) == 2


def test_one_damaged_part_does_not_hide_the_others(tmp_path: Path) -> None:
    first, second = (subset(pages) for pages in PAGES)
    path = write(tmp_path / "a.tar", outer(first[: len(first) // 2], second))
    with pytest.raises(DataError, match=r"a\.tar:openwebtext/urlsf_subset00-1_data\.xz"):
        read("openwebtext", path)
    documents, problems = read_skipping("openwebtext", path)
    assert texts(documents)[-1] == "Last page"
    assert problems.count >= 1


def test_text_that_is_not_utf8_and_archives_too_deep_are_named_or_counted(tmp_path: Path) -> None:
    latin = lzma.compress(tar({"1.txt": b"caf\xe9", "2.txt": b"good"}))
    path = write(tmp_path / "a.tar", outer(latin))
    with pytest.raises(DataError, match=r"a\.tar:.*_data\.xz/1\.txt: not UTF-8 at byte 3"):
        read("openwebtext", path)
    deep = lzma.compress(tar({"again.tar": tar({"3.txt": b"deep"})}))
    documents, problems = read_skipping("openwebtext", path, write(tmp_path / "b.tar", outer(deep)))
    assert (texts(documents), problems.count) == (["good"], 2)


def test_a_bomb_inside_the_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "EXPANSION_FREE_BYTES", 1 << 20)
    bomb = lzma.compress(tar({"zeros.txt": bytes(1 << 22)}))
    path = write(tmp_path / "a.tar", outer(bomb))
    with pytest.raises(DataError, match="expands more than 100-fold"):
        read("openwebtext", path)


def test_a_part_that_is_text_under_xz_is_not_taken_for_a_page(tmp_path: Path) -> None:
    path = write(tmp_path / "urlsf_subset00-1_data.xz", lzma.compress(b"just text\n" * 99))
    with pytest.raises(DataError, match="damaged archive"):
        read("openwebtext", path)


def test_members_that_are_not_read_are_told_and_capitals_change_nothing(tmp_path: Path) -> None:
    inner = lzma.compress(tar({"A.TXT": b"page", "b.html": b"<p>", "._c.txt": b"mac"}))
    path = write(tmp_path / "SUBSET.TAR", tar({"x_data.XZ": inner, "README": b"text"}))
    documents, problems = read_skipping("openwebtext", tmp_path)
    assert texts(documents) == ["page"]
    assert problems.left_out.lines() == [
        f"2 not read, members that are no .txt or archive: {path}:x_data.XZ:b.html, {path}:README",
        f"1 not read, hidden: {path}:x_data.XZ:._c.txt",
    ]
