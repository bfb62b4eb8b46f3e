"""Text to shards: plan the input, encode it on worker processes, publish shard after shard.

The output depends on the input and the options alone, never on the number of workers. A run that
was interrupted goes on after its last finished shard. ``manifest.json`` comes last: with it the
corpus is complete.

Documents are shuffled in a second pass over finished shards: which documents there are, and how
long each is, is only known when all are encoded (bad input, repetitions and short texts are left
out), compressed input cannot be read out of order, and one pass over the text serves any seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.data.preprocess.duplicates import SeenHashes
from megaegpt.data.preprocess.encode import Encoded, EncodeOptions, Problem
from megaegpt.data.preprocess.jobs import (
    STDIN,
    InputFile,
    Job,
    Kind,
    LineCounter,
    LineSpan,
    check_text_key,
    find_inputs,
    make_jobs,
)
from megaegpt.data.preprocess.pool import EncoderPool
from megaegpt.data.preprocess.progress import Counts, Part, Progress, written_into
from megaegpt.data.preprocess.progress_bar import Meter
from megaegpt.data.preprocess.shuffle import ShuffledDocuments
from megaegpt.data.preprocess.split import cut_shard
from megaegpt.data.readers import Option
from megaegpt.data.readers.documents import BadInputPolicy, LeftOut, Problems
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest, describe_tokenizer
from megaegpt.data.tokens.shard_tokenizer import check_tokenizer_place, save_beside_shards
from megaegpt.data.tokens.shards import ShardSummary, ShardWriter
from megaegpt.data.tokens.stream import shard_name
from megaegpt.errors import DataError
from megaegpt.files import locked_folder, made_folder

TRAIN, VALIDATION = "train", "validation"

MOST_LISTED = 10_000
"""Input files that a manifest lists one by one."""
_MOST_SHARDS = 99_999  # their names have five digits
_MOST_WORKERS = 4096  # more than any machine has cores


@dataclass(frozen=True)
class PreprocessOptions:
    """One run of ``tools/preprocess.py``."""

    output: Path
    """Folder of the shards."""
    inputs: tuple[str, ...]
    """Files, folders, globs or ``-``, for the training split."""
    validation: tuple[str, ...] = ()
    """The same for the validation split."""
    kind: Kind | None = None
    """Format of the input files; None: by their names."""
    reader_options: Mapping[str, Option] = field(default_factory=dict)
    """Options of the reader, for a kind that is neither JSON Lines nor text."""
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    """How documents become tokens."""
    shards: int = 1
    """Shards of each split."""
    validation_fraction: float = 0.0
    """Share of the documents, chosen by their hashes, that go to the validation split."""
    split_tokens: float | None = None
    """Share of the tokens, from the start on, that go to the training split; the rest validate."""
    deduplicate: bool = False
    """Leave out documents whose text has occurred before."""
    on_bad_input: BadInputPolicy = "fail"
    """``fail`` at the first bad input, or ``skip`` and count it."""
    workers: int = 1
    """Processes that tokenise."""
    overwrite: bool = False
    """Replace shards that other inputs or options have made."""
    shuffle_seed: int | None = None
    """Seed of the order of the documents of each split; None: they stay in the input's order."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are made."""
        validates = self.validation or self.validation_fraction or self.split_tokens is not None
        return (TRAIN, VALIDATION) if validates else (TRAIN,)

    def check(self) -> None:
        """Raise DataError where options contradict each other."""
        ways = [bool(self.validation), self.validation_fraction != 0, self.split_tokens is not None]
        if sum(ways) > 1:
            raise DataError(
                "--validation, --validation-fraction and --split-tokens exclude each other"
            )
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"--validation-fraction {self.validation_fraction} is not in [0, 1)")
        if self.split_tokens is not None and not 0 < self.split_tokens < 1:
            raise DataError(f"--split-tokens {self.split_tokens} is not between 0 and 1")
        if self.split_tokens is not None and self.shards > 1:
            raise DataError("--split-tokens makes one shard a split: leave out --shards")
        if self.split_tokens is not None and self.shuffle_seed is not None:
            raise DataError(
                "--split-tokens cuts the text as it stands, which --shuffle-documents would mix: "
                "use --validation-fraction"
            )
        for name, value, most in (
            ("--shards", self.shards, _MOST_SHARDS),
            ("--workers", self.workers, _MOST_WORKERS),
        ):
            if not 1 <= value <= most:
                raise DataError(f"{name} must be from 1 to {most:,}, not {value:,}")

    def plan(self, groups: dict[str, list[InputFile]], tokenizer: Tokenizer) -> dict[str, Any]:
        """All that the output depends on, as plain data."""
        # Corpora that were made before there were these have no such entries.
        later: dict[str, Any] = {}
        if self.shuffle_seed is not None:
            later["shuffle_documents"] = self.shuffle_seed
        if tokenizer.adds_bos:
            later["begins_with"] = tokenizer.bos_token
        if any(file.path == STDIN for files in groups.values() for file in files):
            later["standard_input"] = secrets.token_hex(8)  # what comes next is another text
        return {
            "inputs": {name: _described(files) for name, files in groups.items()},
            "tokenizer": tokenizer.fingerprint,
            "text_key": self.encode.text_key,
            "append_eod": self.encode.append_eod,
            "min_chars": self.encode.min_chars,
            "shards": self.shards,
            "validation_fraction": self.validation_fraction,
            "split_tokens": self.split_tokens,
            "deduplicate": self.deduplicate,
            "on_bad_input": self.on_bad_input,
            **later,
        }


def _described(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Files as plain data; of very many a digest, for a manifest is read whole."""
    described = [asdict(file) for file in files]
    if len(files) <= MOST_LISTED:
        return described
    content = json.dumps(described).encode()
    digest = hashlib.sha256(content).hexdigest()
    return [{"files": len(files), "size": sum(f.size for f in files), "sha256": digest}]


@dataclass(frozen=True)
class Report:
    """A finished corpus, the bad inputs that were skipped, what this very run has done, and by what
    tokenizer.
    """

    manifest: Manifest
    problems: Problems
    meter: Meter
    tokenizer: Tokenizer


def preprocess(options: PreprocessOptions, show_progress: bool = False) -> Report:
    """Make the shards, or what is missing of them.

    Raises:
        DataError: bad input under the policy ``fail``, a full disk, an output folder that is in use
            or has shards of other inputs or options.
    """
    options.check()
    left_out = LeftOut(written_into(options.output))
    wanted = {TRAIN: options.inputs, VALIDATION: options.validation}
    groups = {
        split: find_inputs(inputs, options.kind, options.reader_options, left_out)
        for split, inputs in wanted.items()
        if split == TRAIN or inputs
    }
    if VALIDATION in groups:
        _check_is_held_out(groups[VALIDATION], groups[TRAIN])
    if options.encode.text_key != EncodeOptions.text_key:
        check_text_key(options.encode.text_key, [f for files in groups.values() for f in files])
    with made_folder(options.output), locked_folder(options.output) as lock:
        run = _Run(options, groups, lock, show_progress, left_out)
        try:
            return run.run()
        except BaseException:
            run.progress.abandon()
            raise


def _check_is_held_out(validation: Sequence[InputFile], train: Sequence[InputFile]) -> None:
    """Refuse a file that is, or lies below, an input of both splits."""
    held_out, trained_on = (
        {Path(os.path.realpath(file.path)): file.path for file in files}
        for files in (validation, train)
    )
    for some, others in ((held_out, trained_on), (trained_on, held_out)):
        for place, path in some.items():
            if not others.keys().isdisjoint((place, *place.parents)):
                raise DataError(
                    f"{path} is among the inputs of both splits: leave it out of one of them"
                )


class _Run:
    """The state of one run: what has been counted and seen so far.

    Attributes:
        encoded: folder of the shards in the order of the input: the output, or, where their
            documents are still to be shuffled, one out of sight.
    """

    def __init__(
        self,
        options: PreprocessOptions,
        groups: dict[str, list[InputFile]],
        lock: int,
        show_progress: bool,
        left_out: LeftOut,
    ) -> None:
        self.options = options
        self.lock = lock
        self.groups = groups
        self.tokenizer = Tokenizer.load(options.encode.vocabulary)
        plan = options.plan(groups, self.tokenizer)
        check_tokenizer_place(self.tokenizer, options.output)
        names = [
            shard_name(split, number, options.shards)
            for split in options.splits
            for number in range(options.shards)
        ]
        self.progress = Progress(options.output, plan, names, options.overwrite, self.tokenizer)
        shuffles = options.shuffle_seed is not None
        self.encoded = self.progress.folder if shuffles else options.output
        self.parts = [f"{group}-{n:05d}" for group in groups for n in range(options.shards)]
        self.counts = Counts()
        self.shards: dict[str, list[ShardSummary]] = {}
        self.problems = Problems(options.on_bad_input, left_out=left_out)
        self.seen = SeenHashes() if options.deduplicate else None
        self.lines = LineCounter()
        total = sum(file.size for files in groups.values() for file in files)
        self.show_progress = show_progress and self.progress.complete is None
        self.meter = Meter(total, self.show_progress)

    def run(self) -> Report:
        """Everything, or what an earlier run has left to do."""
        if self.progress.complete is not None:
            return Report(self.progress.complete, self.problems, self.meter, self.tokenizer)
        options = self.options
        finished = self.progress.finished(self.parts, self.encoded)
        for part in finished:
            self._take(part)
        done = {part.name for part in finished}
        hashes = options.deduplicate or options.validation_fraction > 0
        encode = replace(options.encode, hashes=hashes)
        with self.meter, EncoderPool(encode, options.workers, self.tokenizer, self.lock) as pool:
            before = 0
            for group, files in self.groups.items():
                self._run_group(group, files, before, pool, done)
                before += sum(file.size for file in files)
        if not self.counts.tokens:
            self.progress.clear()  # nothing to go on from
            raise self._no_documents()
        shards = (
            self.shards if options.shuffle_seed is None else self._shuffle(options.shuffle_seed)
        )
        tokenizer = describe_tokenizer(self.tokenizer)
        counts = asdict(self.counts)
        manifest = Manifest(tokenizer, self.progress.plan, counts, shards)
        save_beside_shards(self.tokenizer, options.output)
        self.progress.finish(manifest)
        return Report(manifest, self.problems, self.meter, self.tokenizer)

    def _no_documents(self) -> DataError:
        return DataError(f"no documents in {', '.join(self.options.inputs)}{self._why_nothing()}")

    def _why_nothing(self) -> str:
        """Why no document is left, as far as it is known."""
        if self.counts.too_short and not self.problems.count:
            chars = self.options.encode.min_chars
            return f": {self.counts.too_short:,} have fewer than {chars} characters"
        return self.problems.why_nothing()

    def _run_group(
        self, group: str, files: list[InputFile], before: int, pool: EncoderPool, done: set[str]
    ) -> None:
        """The parts of one list of files that are not done, in order."""
        left = [n for n in range(self.options.shards) if f"{group}-{n:05d}" not in done]
        jobs = make_jobs(files, self.options.shards, self.problems.left_out)
        jobs = (job for job in jobs if job.shard in left)
        for number, pairs in _by_part(left, pool.map(jobs)):
            part = Part(f"{group}-{number:05d}", is_published=self.encoded == self.options.output)
            if self.options.split_tokens is not None:
                part.shards = self._write_and_cut(part, pairs)
            else:
                splits = [group, VALIDATION] if self.options.validation_fraction else [group]
                prefixes = {
                    split: self.encoded / shard_name(split, number, self.options.shards)
                    for split in splits
                }
                part.shards = self._write(part, pairs, before, prefixes)
            self.progress.record(part)
            self._take(part, add_hashes=False)

    def _write(
        self,
        part: Part,
        pairs: Iterable[tuple[Job, Encoded]],
        before: int,
        prefixes: dict[str, Path],
    ) -> dict[str, ShardSummary]:
        """A shard a split from the documents of a part; counts go to ``part``."""
        hashes = [np.empty(0, np.uint64)]
        dtype = self.tokenizer.dtype
        problems = Problems(self.options.on_bad_input)
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(ShardWriter(p, dtype)) for p in prefixes.values()]
            for job, encoded in pairs:
                self._report(job, encoded.problems, problems)
                part.counts.too_short += encoded.short
                if self.seen is not None:
                    new = self.seen.add(encoded.hashes)
                    hashes.append(encoded.hashes[new])
                    part.counts.duplicates += int((~new).sum())
                    encoded = encoded.select(new)
                with _naming_input(job):
                    self._add(encoded, writers)
                part.counts.add(encoded.counts())
                self.meter.add(encoded.counts())
                self.meter.reach(before + job.end)
            part.counts.bad_inputs = problems.count
            part.problems = problems.examples
            if self.seen is not None:
                part.hashes = np.concatenate(hashes)
            if not part.counts.tokens and self.parts == [part.name]:
                self._take(part)
                raise self._no_documents()  # before anything is replaced by nothing
            is_hidden = any(prefix.parent == self.progress.folder for prefix in prefixes.values())
            replace_old = None if is_hidden else self.progress.replace_complete
            summaries = [writer.finish(replace_old) for writer in writers]
        return dict(zip(prefixes, summaries, strict=True))

    def _add(self, encoded: Encoded, writers: list[ShardWriter]) -> None:
        """To the only writer, or to those of the training and the validation split."""
        if len(writers) == 1:
            writers[0].add(encoded.tokens, encoded.lengths)
            return
        validates = encoded.hashes < np.uint64(int(self.options.validation_fraction * 2**64))
        for writer, mask in zip(writers, (~validates, validates), strict=True):
            chosen = encoded.select(mask)
            writer.add(chosen.tokens, chosen.lengths)

    def _write_and_cut(
        self, part: Part, pairs: Iterable[tuple[Job, Encoded]]
    ) -> dict[str, ShardSummary]:
        """All documents to one shard out of sight, then its tokens to the two splits."""
        whole = self.progress.folder / "all"
        self._write(part, pairs, 0, {TRAIN: whole})
        assert self.options.split_tokens is not None
        first, second = (self.options.output / split for split in (TRAIN, VALIDATION))
        replace_old = self.progress.replace_complete
        head, tail = cut_shard(whole, self.options.split_tokens, first, second, replace_old)
        return {TRAIN: head, VALIDATION: tail}

    def _shuffle(self, seed: int) -> dict[str, list[ShardSummary]]:
        """The shards of each split once more, its documents in the order of the seed. The order is
        one over all shards of the split, whatever their number; each gets as many documents."""
        total = self.options.shards
        shuffled: dict[str, list[ShardSummary]] = {}
        for key, (split, ordered) in enumerate(self.shards.items()):
            prefixes = [self.encoded / shard.name for shard in ordered]
            documents = ShuffledDocuments(prefixes, (seed, key))
            names = [f"shuffled-{split}-{number:05d}" for number in range(total)]
            finished = self.progress.finished(names, self.options.output)
            shuffled[split] = [part.shards[split] for part in finished]
            for number in range(len(finished), total):
                first, last = (documents.documents * n // total for n in (number, number + 1))
                prefix = self.options.output / shard_name(split, number, total)
                shard = documents.write(
                    first, last, prefix, self.show_progress, self.progress.replace_complete
                )
                self.progress.record(Part(names[number], shards={split: shard}))
                shuffled[split].append(shard)
        return shuffled

    def _report(self, job: Job, found: list[Problem], problems: Problems) -> None:
        for problem in found:
            line = problem.line
            if line is not None and isinstance(job.content, LineSpan):
                line += self.lines.before(problem.path, job.content.start)
            problems.report(
                problem.path if line is None else f"{problem.path}, line {line}", problem.what
            )

    def _take(self, part: Part, add_hashes: bool = True) -> None:
        """Count a finished part."""
        self.counts.add(part.counts)
        self.problems.merge(part.counts.bad_inputs, part.problems)
        for split, shard in part.shards.items():
            self.shards.setdefault(split, []).append(shard)
        if add_hashes and self.seen is not None and part.hashes is not None:
            self.seen.add(part.hashes)


@contextlib.contextmanager
def _naming_input(job: Job) -> Iterator[None]:
    """Say where in the input a write failed."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error} (while writing {job.where})") from None


def _by_part(
    numbers: list[int], pairs: Iterator[tuple[Job, Encoded]]
) -> Iterator[tuple[int, Iterable[tuple[Job, Encoded]]]]:
    """The documents of each part; parts may have none."""
    groups = groupby(pairs, key=lambda pair: pair[0].shard)
    current = next(groups, None)
    for number in numbers:
        if current is not None and current[0] == number:
            yield number, current[1]
            current = next(groups, None)
        else:
            yield number, ()
