"""The progress of an unfinished preprocessing run, so that the same command can go on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.data.readers.inputs import is_tokenizer_of_shards
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.corpus_manifest import (
    MANIFEST_NAME,
    Manifest,
    parse_summary,
    whole_numbers,
)
from megaegpt.data.tokens.shard_tokenizer import remove_replaced
from megaegpt.data.tokens.shards import ShardSummary, bin_path, idx_path
from megaegpt.errors import DamagedManifestError, DataError
from megaegpt.files import LOCK, TEMPORARY_SUFFIX, naming_failures, write_whole

PROGRESS_FOLDER = ".progress"


def written_into(output: Path) -> Callable[[Path], bool]:
    """Tells the files that preprocessing writes into ``output``: where that is, or lies below, an
    input folder, they are no input."""
    folder = output.resolve()

    def is_written(path: Path) -> bool:
        is_ours = (
            path.name in (MANIFEST_NAME, PROGRESS_FOLDER, LOCK)
            or path.suffix in (".bin", ".idx", TEMPORARY_SUFFIX)
            or is_tokenizer_of_shards(path)
        )
        return is_ours and path.parent.resolve() == folder

    return is_written


@dataclass
class Counts:
    """Numbers of documents, tokens and bytes read, and of documents left out."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    too_short: int = 0
    bad_inputs: int = 0

    def add(self, other: Counts) -> None:
        """Add another part's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Part:
    """The shards that one span of the input fills: one of each split it has documents for.

    Attributes:
        name: of its record.
        shards: finished shards by split.
        problems: the first bad inputs, as the report shows them.
        hashes: of its documents, where duplicates are looked for; kept in a file of their own.
        is_published: its shards lie in the output folder, and not out of sight.
    """

    name: str
    counts: Counts = field(default_factory=Counts)
    shards: dict[str, ShardSummary] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    hashes: np.ndarray | None = None
    is_published: bool = True


class Progress:
    """The hidden folder ``.progress`` in the output folder: the plan, and a record a finished part.

    Args:
        output: folder of the shards.
        plan: inputs and options as plain data; only a run with the same plan may go on.
        shards: names of all shards that the plan makes.
        overwrite: replace what another plan, or another program, has made.
        tokenizer: that the shards are made with.

    Raises:
        DataError: the folder has shards of another plan, or of unknown origin under these names.
    """

    def __init__(
        self,
        output: Path,
        plan: dict[str, Any],
        shards: Sequence[str],
        overwrite: bool,
        tokenizer: Tokenizer,
    ) -> None:
        self.output, self._tokenizer = output, tokenizer
        self._shards, self._overwrite = shards, overwrite
        self.folder = output / PROGRESS_FOLDER
        self.plan = json.loads(json.dumps(plan))  # as it will be read back
        self.complete: Manifest | None = None
        self._replaced: Manifest | None = None
        if (output / MANIFEST_NAME).exists():
            self._meet_complete(overwrite)
            if self.complete is not None:
                return
        elif self._records() and self._unfinished_plan() != self.plan:
            if not overwrite:
                raise DataError(
                    f"{output} holds an unfinished run of other inputs or options: repeat that "
                    "command to finish it, or give --overwrite to start afresh"
                )
            self.clear()
        elif not overwrite and not self._has_begun():
            self._refuse_to_replace()
        with naming_failures(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_whole(self._plan_path, json.dumps(self.plan, indent=2).encode())

    def _refuse_to_replace(self) -> None:
        """Shards that nothing here tells of are somebody's, such as another program's."""
        for name in self._shards:
            for path in (idx_path(self.output / name), bin_path(self.output / name)):
                if path.exists():
                    raise DataError(
                        f"{path} exists already and would be replaced: choose another --output, "
                        "or give --overwrite"
                    )

    def _meet_complete(self, overwrite: bool) -> None:
        if overwrite:
            try:
                self._replaced = Manifest.load(self.output)
            except DamagedManifestError:  # it may list any shards: none but those of the plan go
                self._replaced = Manifest({}, {}, {})
            # What lies out of sight is of a run that was to replace this corpus, or of the one that
            # made it.
            if self.plan == self._replaced.plan or not self._has_begun():
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        manifest = Manifest.load(self.output)
        if manifest.plan != self.plan:
            raise DataError(
                f"{self.output} holds shards of other inputs or options: choose another --output, "
                "or give --overwrite to replace them"
            )
        # A kill can fall between the two, or into another run, which was to replace this corpus.
        shutil.rmtree(self.folder, ignore_errors=True)
        shards = [shard for split in manifest.splits.values() for shard in split]
        if all(_is_there(self.output, shard) for shard in shards):
            self.complete = manifest
        else:
            (self.output / MANIFEST_NAME).unlink()

    @property
    def _plan_path(self) -> Path:
        return self.folder / "plan.json"

    def _records(self) -> list[Path]:
        return sorted(self.folder.glob("cut-*.json"))

    def _has_begun(self) -> bool:
        """Whether this very plan has begun and not ended."""
        return self._plan_path.exists() and self._unfinished_plan() == self.plan

    def _unfinished_plan(self) -> Any:
        try:
            return json.loads(self._plan_path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self._plan_path} is damaged ({error}): remove {self.folder}"
            ) from None

    def replace_complete(self) -> None:
        """Shards are about to be published: remove the complete corpus that they replace, its
        manifest last. Until then bad input costs nothing, and a kill in between leaves no shard
        that could be read and that nothing tells of.
        """
        if self._replaced is not None:
            splits = self._replaced.splits.values()
            self._remove([shard.name for split in splits for shard in split])
            remove_replaced(self._tokenizer, self.output, self._replaced)
            (self.output / MANIFEST_NAME).unlink()
            self._replaced = None

    def clear(self) -> None:
        """Remove every shard that a record of this folder lists, the records last."""
        shards: list[ShardSummary] = []
        for part in map(self._read, self._records()):
            if part.is_published:  # a name that lies out of sight may be another's in the output
                shards += part.shards.values()
        self._remove([shard.name for shard in shards])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, names: Sequence[str]) -> None:
        for path_of in (idx_path, bin_path):
            for name in names:
                path_of(self.output / name).unlink(missing_ok=True)

    def finished(self, names: Iterable[str], folder: Path) -> list[Part]:
        """The leading parts of ``names`` that are recorded and whose shards are in ``folder``.

        Parts follow each other (a duplicate is known by what came before it), so the first one that
        is missing ends the list.
        """
        parts = []
        for name in names:
            record = self._record_path(name)
            if not record.exists():
                break
            part = self._read(record)
            if not all(_is_there(folder, shard) for shard in part.shards.values()):
                break
            parts.append(part)
        return parts

    def record(self, part: Part) -> None:
        """A part's shards have been published."""
        if part.hashes is not None:
            content = io.BytesIO()
            np.save(content, part.hashes)
            write_whole(self._record_path(part.name).with_suffix(".npy"), content.getvalue())
        fields = asdict(part)
        del fields["hashes"]
        write_whole(self._record_path(part.name), json.dumps(fields).encode())

    def abandon(self) -> None:
        """The run has failed: leave a trace only where there is something to go on from."""
        if self.complete is None and not self._records():
            if not self._overwrite:  # all shards of these names are this run's
                self._remove(self._shards)
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, manifest: Manifest) -> None:
        """All parts are there: publish the manifest and forget the rest."""
        manifest.save(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record_path(self, name: str) -> Path:
        return self.folder / f"cut-{name}.json"  # "part-" was of other cuts of the same inputs

    def _read(self, record: Path) -> Part:
        try:
            fields = json.loads(record.read_bytes())
            fields["counts"] = Counts(**whole_numbers(fields["counts"]))
            fields["shards"] = {k: parse_summary(v) for k, v in fields["shards"].items()}
            hashes = record.with_suffix(".npy")
            if hashes.exists():
                fields["hashes"] = np.load(hashes, allow_pickle=False)
            return Part(**fields)
        except Exception as error:  # NumPy fails on a damaged header in any way
            raise DataError(f"{record} is damaged ({error}): remove {self.folder}") from None


def _is_there(folder: Path, shard: ShardSummary) -> bool:
    prefix = folder / shard.name
    return idx_path(prefix).is_file() and bin_path(prefix).is_file()
