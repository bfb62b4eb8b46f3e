"""Computing a feature store over all ranks; an interrupted computation continues."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaegpt.bars import progress_bar
from megaegpt.config.data import VerifyPolicy
from megaegpt.data.features.contents import ChunkContents
from megaegpt.data.features.store import (
    MANIFEST,
    PLAN,
    STORED_AS,
    FeatureSpec,
    FeatureStore,
    check_same,
    part_name,
    part_problem,
    read_json,
    short_value,
    write_json,
)
from megaegpt.errors import DataError
from megaegpt.files import (
    naming_failures,
    publish,
    sha256_of_file,
    temporary_name,
    wait_for_files,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import (
    all_gather_object,
    all_reduce_max,
    broadcast_object,
    raising_together,
)


def compute_store(
    folder: str | Path,
    spec: FeatureSpec,
    contents: ChunkContents,
    grid: ProcessGrid,
    batch_size: int,
    title: str,
    verify: VerifyPolicy = "auto",
) -> FeatureStore:
    """Compute what is missing of a store, publish it, and open it. Collective over all ranks.

    A store that is complete already is held against its checksums, by all ranks in shares. Else
    each data-parallel rank computes its share of the missing parts; tensor-parallel ranks work on a
    part together and the first of them writes.

    Args:
        batch_size: chunks computed at once.
        title: what the progress bar calls it.
        verify: whether a complete store is read whole; see :meth:`FeatureStore.verify`.

    Raises:
        DataError: the folder holds a store of something else, a damaged one, or cannot be written;
            what it is computed from cannot be read; or ranks have different specs.
    """
    folder = Path(folder)
    _check_ranks_agree(folder, spec, grid)
    writer = _Writer(folder, spec, contents, grid, batch_size)
    complete = writer.prepare()
    if not complete:
        writer.write_missing_parts(title)
        writer.publish()
    with raising_together(grid):
        if not complete:
            writer.wait_for_all()
        store = FeatureStore.open(folder, spec)
        if complete:
            store.verify(verify, grid.rank, grid.world_size)
    return store


def _check_ranks_agree(folder: Path, spec: FeatureSpec, grid: ProcessGrid) -> None:
    """Each rank writes parts of its own: of another text, they would make a store of a mixture."""
    wanted, *others = all_gather_object(spec.as_json(), grid)
    for rank, found in enumerate(others, start=1):
        differences = [
            f"{name} is {short_value(wanted[name])} on rank 0 and {short_value(value)} on "
            f"rank {rank}"
            for name, value in found.items()
            if value != wanted[name]
        ]
        if differences:
            error = DataError(
                f"{folder}: ranks would write different stores: {'; '.join(differences)}. Give "
                "all of them one corpus, encoder and precision"
            )
            error.on_every_rank = True
            raise error


@dataclass
class _Writer:
    folder: Path
    spec: FeatureSpec
    contents: ChunkContents
    grid: ProcessGrid
    batch_size: int

    def prepare(self) -> bool:
        """Claim the folder (rank 0); whether a complete store is there already."""
        return broadcast_object(self._claim_folder, self.grid)

    def _claim_folder(self) -> bool:
        with naming_failures(self.folder):
            return self._claimed_complete()

    def _claimed_complete(self) -> bool:
        if FeatureStore.exists(self.folder):
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / PLAN).exists():
            check_same(self.folder, read_json(self.folder / PLAN), self.spec)
        else:
            write_json(self.folder / PLAN, self.spec.as_json())
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        return False

    def _missing_parts(self) -> list[int]:
        return [part for part in range(self.spec.num_parts) if not self._is_there(part)]

    def write_missing_parts(self, title: str) -> None:
        """Every rank does its share; after each round all know whether one of them failed."""
        spec, grid = self.spec, self.grid
        missing = broadcast_object(self._missing_parts, grid)
        done = spec.num_chunks - sum(len(spec.part_chunks(part)) for part in missing)
        bar = progress_bar(
            total=spec.num_chunks,
            initial=done,
            title=title,
            unit="chunk",
            disable=not grid.is_main,
        )
        with bar:
            for first in range(0, len(missing), grid.replica_size):
                round_parts = missing[first : first + grid.replica_size]
                own = (
                    round_parts[grid.replica_rank] if grid.replica_rank < len(round_parts) else None
                )
                with contextlib.ExitStack() as files:
                    with raising_together(grid), naming_failures(self.folder):
                        opened = self._open_part(own, files)
                    failure = None if own is None else self._write_part(own, opened)
                    is_whole = self._succeeded_on_all_of_tp_group(failure)
                    with raising_together(grid), naming_failures(self.folder):
                        if failure is not None:
                            raise failure
                        if is_whole:
                            for file in opened.values():
                                file.publish()
                bar.update(sum(len(spec.part_chunks(part)) for part in round_parts))

    def _is_there(self, part: int) -> bool:
        return not any(
            part_problem(self.folder, self.spec, array, part) for array in self.spec.arrays()
        )

    def _open_part(self, part: int | None, stack: contextlib.ExitStack) -> dict[str, PartFile]:
        """The files of a part, on the one rank of a TP group that writes them."""
        if part is None or self.grid.tp_rank != 0:
            return {}
        return {
            array: stack.enter_context(PartFile(self.folder, self.spec, array, part))
            for array in self.spec.arrays()
        }

    def _write_part(self, part: int, files: dict[str, PartFile]) -> Exception | None:
        """Compute and write one part; what went wrong with it. The ranks of a TP group compute to
        the end even if one of them cannot read or write: it is collective, so the others would wait
        for it for ever. A rank that cannot compute raises at once, which ends all of them.
        """
        chunks = self.spec.part_chunks(part)
        failure: Exception | None = None
        for start in range(0, len(chunks), self.batch_size):
            batch = chunks[start : start + self.batch_size]
            inputs = self.contents.blank(len(batch))
            try:
                if failure is None:
                    inputs = self.contents.read(batch)
            except OSError as error:
                failure = DataError(f"{self.folder}: its inputs cannot be read ({error})")
            except Exception as error:
                failure = error
            try:
                with torch.no_grad():
                    arrays = self.contents.compute(*(x.to(self.grid.device) for x in inputs))
            except Exception as error:
                if self.grid.tp_size > 1:
                    raise
                return error
            try:
                if failure is None:
                    for array, file in files.items():
                        file.append(arrays[array])
            except Exception as error:
                failure = error
        return failure

    def _succeeded_on_all_of_tp_group(self, failure: Exception | None) -> bool:
        """Whether the part is of what its chunks hold: a rank that failed computes with blanks, and
        what the others made with it must not be published. Collective over all ranks.
        """
        grid = self.grid
        own = [failure is not None and grid.replica_rank == r for r in range(grid.replica_size)]
        return not all_reduce_max(own, grid)[grid.replica_rank]

    def publish(self) -> None:
        """Write the manifest (rank 0), with checksums each rank took of its share of the files."""
        names = self.spec.part_names()
        own: dict[str, str] = {}
        with raising_together(self.grid), naming_failures(self.folder):
            share = names[self.grid.rank :: self.grid.world_size]
            wait_for_files(self.folder / name for name in share)
            for name in share:
                own[name] = sha256_of_file(self.folder / name)
        shares = all_gather_object(own, self.grid)
        with raising_together(self.grid), naming_failures(self.folder):
            if self.grid.is_main:
                checksums = {name: share[name] for share in shares for name in share}
                parts = {name: checksums[name] for name in names}
                write_json(self.folder / MANIFEST, {**self.spec.as_json(), "parts": parts})

    def wait_for_all(self) -> None:
        """Let this machine see what the others have written."""
        wait_for_files(self.folder / name for name in (*self.spec.part_names(), MANIFEST))


class PartFile:
    """One part of one array, written row by row under a temporary name; a context manager.

    Ordinary writes, not a writable memory map: on a full disk a map ends the process by a signal.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, array: str, part: int) -> None:
        self._path = folder / part_name(array, part)
        self._temporary = temporary_name(self._path)
        self._bfloat16 = spec.dtype_of(array) == "bfloat16"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by __exit__)
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(STORED_AS[spec.dtype_of(array)])),
            "fortran_order": False,
            "shape": (len(spec.part_chunks(part)), *spec.arrays()[array]),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: Tensor) -> None:
        """Add rows (n, ...)."""
        values = values.detach().cpu().contiguous()
        rows = values.bfloat16().view(torch.uint16) if self._bfloat16 else values.float()
        self._file.write(rows.numpy().data)

    def publish(self) -> None:
        """Flush to disk and take the final name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        publish(self._temporary, self._path)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the disk that was full still is
            self._file.close()
        self._temporary.unlink(missing_ok=True)
