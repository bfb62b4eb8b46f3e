"""The experiment's texts as token shards: wraps joined, quotation marks straight, three parts."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.data.readers import read_documents
from megaegpt.data.readers.books import BOOKS, Cleaning, king_james_bible, load_book
from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.gutenberg import straighten_quotes
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.errors import DataError
from megaegpt.files import write_whole
from megaegpt.json_files import read_json
from tools.experiment.plan import CorpusPlan, ExperimentPlan

PARTS = ("train", "selection", "report")
_DONE = "texts.json"
_PACKAGE = "package:"
_TEXT_KEYS = ("train", "held_out", "train_share")
"""Keys of a corpus that say which texts it is made of."""
_READABLE = (".py", ".pyi", ".md", ".rst", ".txt")
"""Ends of the names of a package's files that are text to read."""


def prepare_corpus(plan: ExperimentPlan, name: str, folder: Path, tokenizer: Tokenizer) -> None:
    """Make the shards ``train``, ``selection`` and ``report`` of a corpus in ``folder``.

    Raises:
        DataError: a text cannot be had, or the folder holds other ones.
    """
    corpus = plan.corpus(name)
    reported = corpus.report_tokens or plan.report_tokens
    cut = [plan.max_characters, plan.selection_share, plan.selection_tokens, reported]
    if plan.train_tokens is not None:
        cut.append(plan.train_tokens)
    texts = {k: v for k, v in plan.corpora[name].items() if k in _TEXT_KEYS}
    made_of = {"corpus": texts, "cut": cut, "tokenizer": tokenizer.fingerprint}
    if _is_done(folder, made_of):
        return
    parts = _split(plan, corpus, tokenizer, folder)
    for part, tokens in zip(PARTS, parts, strict=True):
        if part == "train" and corpus.runs_of is not None:
            continue  # nothing is trained
        _write(folder / part, [tokens], tokenizer.dtype)
        print(f"{folder / part}: {len(tokens):,} tokens", flush=True)
    _mark_done(folder, made_of)


def prepare_encoder_texts(plan: ExperimentPlan, folder: Path, tokenizer: Tokenizer) -> None:
    """Make the shard ``train`` of what the encoder is pretrained on.

    Raises:
        DataError: as :func:`prepare_corpus`.
    """
    encoder = plan.encoder
    made_of = {
        "texts": list(encoder.texts),
        "documents": encoder.documents,
        "max_characters": plan.max_characters,
        "tokenizer": tokenizer.fingerprint,
    }
    if _is_done(folder, made_of):
        return
    texts = itertools.islice(_texts(encoder.texts, plan, folder), encoder.documents)
    documents = (_encode(text, tokenizer) for text in texts)
    count = _write(folder / "train", documents, tokenizer.dtype)
    print(f"{folder / 'train'}: {count:,} tokens", flush=True)
    _mark_done(folder, made_of)


def _split(
    plan: ExperimentPlan, corpus: CorpusPlan, tokenizer: Tokenizer, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens to train on, to choose checkpoints on, and to report."""

    def tokens_of(names: Iterable[str]) -> np.ndarray:
        return np.concatenate([_encode(text, tokenizer) for text in _texts(names, plan, folder)])

    train = tokens_of(corpus.train) if corpus.train else np.empty(0, tokenizer.dtype)
    if corpus.held_out:
        held_out = tokens_of(corpus.held_out)
    else:
        train, held_out = np.split(train, [int(len(train) * corpus.train_share)])
    selection, report = np.split(held_out, [int(len(held_out) * plan.selection_share)])
    train = train[-(plan.train_tokens or len(train)) :]
    reported = corpus.report_tokens or plan.report_tokens
    return train, selection[: plan.selection_tokens], report[:reported]


def _texts(names: Iterable[str], plan: ExperimentPlan, folder: Path) -> Iterator[str]:
    """Cleaned texts by book, file of text, or JSON Lines."""
    for name in names:
        for text in _documents(name, folder):
            yield straighten_quotes(text)[: plan.max_characters]


def _documents(name: str, folder: Path) -> Iterator[str]:
    if name in BOOKS:
        yield load_book(BOOKS[name], Cleaning(), folder / "downloads").text
    elif name == "king_james_bible":
        yield king_james_bible().text
    elif name.startswith(_PACKAGE):
        for path in _package_files(name.removeprefix(_PACKAGE)):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise DataError(f"{name}: {path} cannot be read: {reason}") from None
    else:
        path = _find(name)
        source = "jsonl" if ".jsonl" in path.name else "text"
        for document in read_documents(source, [path], Problems()):
            yield document.text


def _package_files(name: str) -> list[Path]:
    """Sources and pages of ``PACKAGE`` or ``PACKAGE/FOLDER`` as installed here, by their paths."""
    package, _, folder = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{_PACKAGE}{name}: no package {package} is installed here")
    root = Path(spec.submodule_search_locations[0]) / folder
    found = sorted(p for p in root.rglob("*") if p.suffix in _READABLE and p.is_file())
    if not found:
        raise DataError(f"{_PACKAGE}{name}: no {', '.join(_READABLE)} files in {root}")
    return found


def _find(name: str) -> Path:
    """A file, from the working directory or the folder MEGAEGPT_DATA."""
    places = [Path(name)]
    if shared := os.environ.get("MEGAEGPT_DATA"):
        places.append(Path(shared) / name)
    for path in places:
        if path.is_file():
            return path
    raise DataError(
        f"{name}: no book of this name ({', '.join(BOOKS)}, king_james_bible), and no file "
        f"{' or '.join(map(str, places))}; the folder MEGAEGPT_DATA is searched too if it is set"
    )


def _encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.append(tokenizer.encode_numpy(text), tokenizer.eot_token)


def _write(prefix: Path, documents: Iterable[np.ndarray], dtype: np.dtype[Any]) -> int:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
        return writer.finish().tokens


def _is_done(folder: Path, made_of: dict[str, Any]) -> bool:
    if not (folder / _DONE).exists():
        return False
    found = read_json(folder / _DONE, dict[str, Any], remedy=f"remove {folder}")
    if found != json.loads(json.dumps(made_of)):
        raise DataError(f"{folder} holds the texts of another experiment: choose another output")
    return True


def _mark_done(folder: Path, made_of: dict[str, Any]) -> None:
    write_whole(folder / _DONE, json.dumps(made_of).encode())
