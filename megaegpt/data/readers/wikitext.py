"""Wikitext to plain text (needs the optional package mwparserfromhell)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megaegpt.errors import DataError

# Taken out before parsing: what they hold is no prose, and may be no wikitext either.
_OPAQUE = re.compile(
    r"<!--.*?-->|<(math|gallery|timeline|score|syntaxhighlight|source|chem|imagemap|hiero)\b"
    r"[^>]*?(?:/>|>.*?</\1\s*>)",
    re.S | re.I,
)
_DROPPED_TAGS = frozenset({"ref", "references", "table", "math", "gallery", "noinclude"})
# Links that are no words of the sentence: media, categories, and, without a label, the prefixes of
# other languages ("fr:", "zh-min-nan:") and of the dictionary. A title such as "CSI: Miami" has
# capitals and a blank.
_DROPPED_LINK = re.compile(r"\s*(?:file|image|media|category)\s*:", re.I)
_DROPPED_WITHOUT_LABEL = re.compile(r"\s*(?:wikt|wiktionary|[a-z]{2,3}(?:-[a-z-]+)?):\S")
# Templates that stand for words of the sentence, and the number of the argument that holds them.
_SPOKEN = {
    "lang": 2,
    "transl": 2,
    "nowrap": 1,
    "quote": 1,
    "blockquote": 1,
    "small": 1,
    "nihongo": 1,
}
# Markup the parser could not pair up: half tables, open references, quotes, brackets.
_LEFT_OVER = re.compile(
    r"<ref\b[^\n]*|\[\[(?:file|image):[^\n]*|^[ ]*(?:\{\||\||!)[^\n]*"
    r"|'{2,}|\[\[|\]\]|\{\{|\}\}",
    re.I | re.M,
)
_SWITCH = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(=+)[ ]*(.*?)[ ]*\1$")
# Left where templates stood inside parentheses or before a punctuation mark.
_HOLLOW = re.compile(r" ?\([\s,;:]*\)")
_OPEN_GAP = re.compile(r"\([\s,;:]+")
_SPACE_BEFORE = re.compile(r"[ \u00a0]+([,.;:)])")
_BULLET = re.compile(r"^[*#:;]+[ ]*")


def clean(wikitext: str) -> str:
    """The prose of an article: headings, paragraphs and list entries, one a line.

    Templates, references, tables, images, categories, links to other languages, formulas and
    comments are dropped; links keep their label. Sections left without text lose their heading.

    Raises:
        DataError: mwparserfromhell is not installed.
        ValueError: the parser gives up on this text.
    """
    parser = _parser()
    try:
        tree = parser.parse(_OPAQUE.sub("", wikitext))
    except parser.parser.ParserError as error:
        raise ValueError(error) from error
    return _tidy("".join(_prose(tree, parser.nodes)))


def _parser() -> Any:
    try:
        import mwparserfromhell
    except ImportError as error:
        raise DataError(
            "cleaning wikitext needs mwparserfromhell: pip install 'megaegpt[wikipedia]'"
        ) from error
    return mwparserfromhell


def _prose(tree: Any, nodes: Any) -> Iterator[str]:
    """Yield the visible text of a parsed article, piece by piece."""
    for node in tree.nodes:
        if isinstance(node, nodes.Text):
            yield node.value
        elif isinstance(node, nodes.Wikilink):
            yield from _link(node, nodes)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                yield from _prose(node.title, nodes)
        elif isinstance(node, nodes.HTMLEntity):
            yield node.normalize()
        elif isinstance(node, nodes.Heading):
            mark = "=" * node.level
            yield f"\n{mark} {''.join(_prose(node.title, nodes)).strip()} {mark}\n"
        elif isinstance(node, nodes.Tag):
            yield from _tag(node, nodes)
        elif isinstance(node, nodes.Template):
            yield from _template(node, nodes)
        # Template arguments and comments say nothing here.


def _link(node: Any, nodes: Any) -> Iterator[str]:
    """A link's label or, without one, its title; nothing where it is no part of the sentence."""
    title, has_label = str(node.title), node.text is not None
    if _DROPPED_LINK.match(title) or (not has_label and _DROPPED_WITHOUT_LABEL.match(title)):
        return
    if has_label:
        yield from _prose(node.text, nodes)
    else:  # a colon before it makes a link of what would be a category or a language
        yield "".join(_prose(node.title, nodes)).removeprefix(":")


def _template(node: Any, nodes: Any) -> Iterator[str]:
    """The words of the few templates that are part of a sentence; nothing of the others."""
    name = str(node.name).strip().lower()
    arguments = [parameter.value for parameter in node.params if not parameter.showkey]
    if name == "convert" and len(arguments) >= 2:
        yield f"{str(arguments[0]).strip()} {str(arguments[1]).strip()}"
        return
    number = 1 if name.startswith("lang-") else _SPOKEN.get(name, 0)
    if 0 < number <= len(arguments):
        yield from _prose(arguments[number - 1], nodes)


def _tag(node: Any, nodes: Any) -> Iterator[str]:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return
    if name in ("br", "hr", "p"):
        yield "\n"
    elif node.wiki_markup in ("*", "#", ":", ";"):
        yield node.wiki_markup
    if node.contents is not None:
        yield from _prose(node.contents, nodes)


def _tidy(text: str) -> str:
    """Without the traces of what was dropped; one blank line between blocks."""
    text = _LEFT_OVER.sub("", _SWITCH.sub("", text.replace("\u00a0", " ")))
    text = _SPACE_BEFORE.sub(r"\1", _OPEN_GAP.sub("(", _HOLLOW.sub("", text)))
    lines: list[str] = []
    headings: list[tuple[int, str]] = []  # not yet followed by text
    for raw in text.split("\n"):
        line = " ".join(_BULLET.sub("", raw.strip()).split())
        if heading := _HEADING.match(line):
            level = len(heading[1])
            headings = [h for h in headings if h[0] < level] + [(level, heading[2])]
        elif any(c.isalnum() for c in line):
            for _, title in headings:
                lines += ["", title, ""]
            headings = []
            lines.append(line)
        elif lines and lines[-1]:
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
