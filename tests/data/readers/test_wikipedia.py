"""Wikipedia: an invented dump of every kind of page, wikiextractor's two forms, a real sample."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from megaegpt.data.readers import read_documents
from megaegpt.data.readers.documents import Problems
from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-{version}/" version="{version}" \
xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename><namespaces>
    <namespace key="0" case="first-letter" />
    <namespace key="4" case="first-letter">Wikipedia</namespace>
  </namespaces></siteinfo>
"""
TAIL = "</mediawiki>\n"


def page(title: str, text: str, id_: int = 1, ns: int = 0, extra: str = "", model: str = "") -> str:
    return f"""  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{id_}</id>{extra}
    <revision>
      <id>77{id_}</id>
      <timestamp>2016-01-01T00:00:00Z</timestamp>
      <contributor><username>Somebody</username><id>99{id_}</id></contributor>
      <minor />
      <model>{model or "wikitext"}</model><format>text/x-wiki</format>
      <text xml:space="preserve" bytes="5">{text}</text>
      <sha1>abc</sha1>
    </revision>
  </page>
"""


def dump(*pages: str, version: str = "0.10") -> str:
    return HEAD.format(version=version) + "".join(pages) + TAIL


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())
    return path


@pytest.mark.parametrize("version", ["0.10", "0.11"])
@pytest.mark.parametrize("suffix", [".xml", ".xml.bz2"])
def test_only_articles_are_read_whatever_the_version(
    tmp_path: Path, version: str, suffix: str
) -> None:
    path = write(
        tmp_path / f"enwiki-pages-articles{suffix}",
        dump(
            page("Clock", "A clock &amp;amp; a bell.", 12),
            page("2001: A Clock", "Not another namespace.", 13),
            page("Clocks", "x", 14, extra='<redirect title="Clock" />'),
            page("Klok", " \n#redirect [[Clock]]", 15),
            page("Wikipedia:Rules", "Rules.", 16, ns=4),
            page("Template:Clock", "Template.", 17, ns=10),
            page("Clock.json", "{}", 18, model="json"),
            page("Empty", "", 19),
            version=version,
        ),
    )
    documents = read("wikipedia", path, keep_wikitext=True)
    assert [dict(d.metadata) for d in documents] == [
        {"id": "12", "title": "Clock"},
        {"id": "13", "title": "2001: A Clock"},
    ]
    assert documents[0].text == "A clock &amp; a bell."  # unescaped once, by the XML parser
    assert documents[0].where == f"{path}, page 12"


def test_a_dump_of_many_bz2_streams_is_read_whole(tmp_path: Path) -> None:
    whole = dump(*(page(f"P{n}", f"Text {n}.", n) for n in range(9))).encode()
    path = tmp_path / "pages-articles-multistream.xml.bz2"
    pieces = (whole[start : start + 500] for start in range(0, len(whole), 500))
    path.write_bytes(b"".join(map(bz2.compress, pieces)))
    assert len(read("wikipedia", path, keep_wikitext=True)) == 9


def test_disambiguation_pages_can_be_dropped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.xml",
        dump(page("Ada", "may be:\n{{Disambiguation|geo}}"), page("Bell", "{{Infobox}} a bell")),
    )
    assert len(read("wikipedia", path, keep_wikitext=True)) == 2
    kept = read("wikipedia", path, keep_wikitext=True, drop_disambiguation=True)
    assert [document.metadata["title"] for document in kept] == ["Bell"]


BOMB = '<!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
EXTERNAL = '<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("declaration", [BOMB, EXTERNAL, '<!DOCTYPE m SYSTEM "http://x/y.dtd">'])
def test_entities_of_its_own_are_refused(tmp_path: Path, declaration: str) -> None:
    path = write(tmp_path / "a.xml", declaration + dump(page("A", "&b;")))
    for policy in ("fail", "skip"):
        with pytest.raises(DataError, match=r"a\.xml: declares a document type or entities"):
            list(read_documents("wikipedia", [path], Problems(policy)))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".xml", ".xml.bz2"])
def test_a_truncated_dump_is_named_or_counted(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", dump(page("A", "one"), page("B", "two " * 99_999)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a\{suffix}: truncated or damaged"):
        read("wikipedia", path, keep_wikitext=True)
    documents, problems = read_skipping("wikipedia", path, keep_wikitext=True)
    assert texts(documents) in ([], ["one"])
    assert problems.count == 1


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_pages_before_a_damaged_place_stand(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    draw = random.Random(1)
    pages = [page(f"P{n}", draw.randbytes(500).hex(), n) for n in range(150)]
    content = dump(*pages).encode()
    path = tmp_path / f"a.xml{suffix}"
    if suffix:
        content = compress(content)
        path.write_bytes(content[: len(content) * 3 // 4])
    else:
        path.write_bytes(content.replace(b"<title>P112<", b"<<&>P112<"))
    documents, problems = read_skipping("wikipedia", path, keep_wikitext=True)
    assert 90 < len(documents) <= 112
    assert problems.count == 1


def test_malformed_xml_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xml", dump(page("A", "one"), "<page><oops></page>"))
    with pytest.raises(DataError, match=r"a\.xml: .*XML \(mismatched tag: line 2\d"):
        read("wikipedia", path, keep_wikitext=True)


def test_a_page_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaegpt.data.readers.wikipedia.MAX_DOCUMENT_BYTES", 1_000)
    path = write(tmp_path / "a.xml", dump(page("Endless", "x" * 2_000)))
    with pytest.raises(DataError, match="page 'Endless' is too large"):
        read("wikipedia", path, keep_wikitext=True)


def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    def peak(pages: int) -> int:
        path = write(
            tmp_path / "a.xml", dump(*(page(f"P{n}", "word " * 400, n) for n in range(pages)))
        )
        problems = Problems()
        tracemalloc.start()
        count = sum(1 for _ in read_documents("wikipedia", [path], problems, keep_wikitext=True))
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == pages
        return highest

    assert peak(4_000) < peak(1_000) + 500_000  # bytes; the larger dump has 6 MB more


def test_markup_is_turned_into_prose(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    wikitext = """{{Infobox clock|name={{nested|x}}|image=[[File:c.jpg]]}}
[[File:Clock.jpg|thumb|A [[clock face|face]] and [[bell]].]]
A '''clock''' (&lt;!-- hidden --&gt;{{IPA|klok}}; ) is a [[Measuring instrument|device]] of \
[[time]]&amp;nbsp;measurement&lt;ref name="a"&gt;{{cite book|title=Clocks}}&lt;/ref&gt;, \
''old''&lt;ref name=a /&gt;.&lt;br /&gt;See [http://example.com the site][http://bare.example].

== History ==
{{Main|History of clocks}}

=== Bells ===
* First [[bell]]
* {{lang|de|Zweite}} Glocke, {{convert|5|km|mi}}
{| class="wikitable"
! Year !! Clock
|-
| 1500 || big
|}
&lt;math&gt;x^2 [[not a link&lt;/math&gt;
&lt;gallery&gt;
Image:a.jpg|caption
&lt;/gallery&gt;
== References ==
{{reflist}}
__NOTOC__
[[Category:Clocks]]
[[fr:Horloge]]
"""
    path = write(tmp_path / "a.xml", dump(page("Clock", wikitext)))
    assert texts(read("wikipedia", path)) == [
        "A clock is a device of time measurement, old.\nSee the site.\n\n"
        "History\n\nBells\n\nFirst bell\nZweite Glocke, 5 km"
    ]


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        (
            "He starred in [[CSI: Miami]] and wrote ''[[Saw: The Final Chapter|Saw 3D]]'' later.",
            "He starred in CSI: Miami and wrote Saw 3D later.",
        ),
        ("[[Pac-Man: The New Adventures]] ran.", "Pac-Man: The New Adventures ran."),
        (
            "A [[wikt:horology|horologist]] mends [[fr:Horloge|clocks]].",
            "A horologist mends clocks.",
        ),
        ("See [[:Category:Clocks]] and [[:fr:Horloge]].", "See Category:Clocks and fr:Horloge."),
        ("Left.\n[[fr:Horloge]]\n[[zh-min-nan:Sî-cheng]][[wikt:clock]]\n", "Left."),
        (
            "Left.\n[[FILE:A.jpg|thumb|A]][[image: b.jpg]][[category:Clocks|Z]][[Media:c.ogg|c]]",
            "Left.",
        ),
    ],
)
def test_titles_with_a_colon_are_prose_and_links_to_other_projects_without_label_are_not(
    tmp_path: Path, wikitext: str, prose: str
) -> None:
    pytest.importorskip("mwparserfromhell")
    path = write(tmp_path / "a.xml", dump(page("A", wikitext)))
    assert texts(read("wikipedia", path)) == [prose]


@pytest.mark.parametrize(
    "broken", ["{{" * 300, "[[" * 300, "<ref>" * 300, "'''''" * 99, "{|\n" * 99, "[[File:" * 99]
)
def test_broken_markup_does_not_break_the_reader(tmp_path: Path, broken: str) -> None:
    pytest.importorskip("mwparserfromhell")
    escaped = broken.replace("<", "&lt;")
    path = write(tmp_path / "a.xml", dump(page("A", f"Before.\n\n{escaped} inside\n\nAfter.")))
    [text] = texts(read("wikipedia", path))
    assert text.startswith("Before.")


def extracted(path: Path) -> Iterator[dict[str, str]]:
    yield {"id": "1", "url": "u", "title": "Clock", "text": "A “clock”.\nSecond paragraph."}
    yield {"id": "2", "url": "u", "title": "Redirect", "text": ""}
    yield {"id": "3", "url": "u", "title": 'The "Bell"', "text": 'The "Bell"\nOld & <style>.'}


EXTRACTED = ["A “clock”.\nSecond paragraph.", "Old & <style>."]


@pytest.mark.parametrize("name", ["AA/wiki_00", "AB/wiki_00.bz2"])
def test_wikiextractor_json(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in extracted(tmp_path)))
    documents = read("wikipedia", tmp_path)
    assert texts(documents) == EXTRACTED
    assert documents[0].metadata == {"id": "1", "title": "Clock"}


def test_wikiextractor_doc_blocks_which_are_no_xml(tmp_path: Path) -> None:
    blocks = "".join(
        f'<doc id="{row["id"]}" url="u" title="{row["title"]}">\n{row["title"]}\n\n'
        f"{row['text'].removeprefix(row['title']).strip()}\n</doc>\n\n"
        for row in extracted(tmp_path)
    )
    path = write(tmp_path / "AA" / "wiki_00", blocks)
    documents = read("wikipedia", tmp_path)
    assert texts(documents) == EXTRACTED
    assert documents[1].metadata == {"id": "3", "title": 'The "Bell"'}

    write(path, blocks[: blocks.rindex("</doc>")])
    with pytest.raises(DataError, match=r"wiki_00, line \d+: truncated: this <doc> has no </doc>"):
        read("wikipedia", path)
    assert read_skipping("wikipedia", path)[1].count == 1


SAMPLE = "samples/enwiki-pages-articles-sample.xml.bz2"


def test_the_real_sample_has_its_106_articles(data_dir: Path) -> None:
    documents = read("wikipedia", data_dir / SAMPLE, keep_wikitext=True)
    assert len(documents) == 106
    assert documents[0].metadata == {"id": "12", "title": "Anarchism"}
    assert sum(len(document.text) for document in documents) == 5_728_626


def test_the_real_sample_is_cleaned_of_markup(data_dir: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    documents = read_documents("wikipedia", [data_dir / SAMPLE], Problems())
    text = "\n".join(texts(list(islice(documents, 25))))  # the first of 106, for the time it takes
    assert len(text) > 700_000
    for markup in ("[[", "]]", "{{", "}}", "''", "<ref", "==", "&nbsp;", "http://", "__NOTOC__"):
        assert markup not in text
    assert "Anarchism is a political philosophy that advocates self-governed societies" in text
