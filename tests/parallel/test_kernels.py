"""The products of few rows are chosen by what was measured on this machine, once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.errors import ConfigError
from megaegpt.files import locked_folder
from megaegpt.parallel import kernels
from megaegpt.parallel.kernels import (
    ROWS,
    KernelTable,
    Machine,
    ProductSpeed,
    choose_kernels,
    measure,
    stored_table,
)
from megaegpt.parallel.matmul import onednn_is_available, packed_order

MACHINE = Machine("a processor", "AVX2", "9.9.9", threads=3)
_BY_BLAS = {("fp32", "block", 1), ("fp32", "block", 8), ("bf16", "head", 4)}
SPEEDS = tuple(
    ProductSpeed(dtype, size, rows, 20.0, 30.0, (dtype, size, rows) in _BY_BLAS)
    for dtype in ("fp32", "bf16")
    for size in ("block", "head")
    for rows in ROWS
)


def _with_products(content: bytes, change: Callable[[list[Any]], list[Any]]) -> bytes:
    table = json.loads(content)
    return json.dumps(table | {"products": change(table["products"])}).encode()


class Measurer:
    """Gives ``SPEEDS`` and counts how often."""

    calls = 0

    def __call__(self) -> tuple[ProductSpeed, ...]:
        self.calls += 1
        return SPEEDS


@pytest.fixture
def measurer() -> Measurer:
    return Measurer()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tables are kept; nothing in the environment chooses, and the processor has all, for
    this process alone.
    """
    monkeypatch.setattr(kernels, "with_share_of_processor", lambda measured, _: (measured(), 1.0))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setenv("MEGAEGPT_CACHE", str(tmp_path))
    monkeypatch.delenv("MEGAEGPT_KERNELS")
    return tmp_path / "kernels"


def test_a_library_is_taken_for_the_rows_where_it_is_faster_by_more_than_chance() -> None:
    table = KernelTable(MACHINE, SPEEDS)
    assert table.blas_rows(torch.empty(768, 768)) == {1, 5, 6, 7, 8}
    assert table.blas_rows(torch.empty(16384, 1024)) == frozenset()
    assert table.blas_rows(torch.empty(16384, 1024, dtype=torch.bfloat16)) == {2, 3, 4}
    assert table.blas_rows(torch.empty(768, 768, dtype=torch.float64)) == frozenset()
    assert KernelTable().blas_rows(torch.empty(768, 768)) == frozenset()


def test_in_bf16_one_row_decides_whether_a_weight_is_kept_in_onednns_order() -> None:
    """Where it is not, torch's own product is what is taken with more rows as well."""
    faster = {("fp32", "block", 1), ("bf16", "block", 1)}
    products = tuple(
        dataclasses.replace(speed, blas_is_faster=(speed.dtype, speed.size, speed.rows) in faster)
        for speed in SPEEDS
    )
    table = KernelTable(MACHINE, products)
    assert table.blas_rows(torch.empty(768, 768)) == {1}
    assert table.blas_rows(torch.empty(768, 768, dtype=torch.bfloat16)) == set(range(1, 33))
    taken = {(p.dtype, p.size, p.rows) for p in products if table.takes_blas(p)}
    assert taken == {("fp32", "block", 1), *(("bf16", "block", rows) for rows in ROWS)}


def test_a_machine_is_measured_once(folder: Path, measurer: Measurer) -> None:
    first = stored_table(MACHINE, measurer)
    assert first == KernelTable(MACHINE, SPEEDS)
    assert stored_table(MACHINE, measurer) == first
    assert measurer.calls == 1
    for other in (
        dataclasses.replace(MACHINE, threads=4),
        dataclasses.replace(MACHINE, torch="9.9.8"),
        dataclasses.replace(MACHINE, processor="another"),
        dataclasses.replace(MACHINE, instructions="AVX512"),
    ):
        assert stored_table(other, measurer).machine == other
    assert measurer.calls == 5
    assert stored_table(MACHINE, measurer) == first
    assert stored_table(MACHINE, measurer, anew=True) == first
    assert measurer.calls == 6
    assert len(list(folder.glob("*.json"))) == 5
    assert len(list(folder.iterdir())) == 5  # neither a lock nor half a file is left


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: content.replace(b"a processor", b"b processor"),
        lambda content: content.replace(b"20.0", b"NaN", 1),
        lambda content: content.replace(b"block", b"clock"),
        lambda content: _with_products(content, lambda products: []),
        lambda content: _with_products(content, lambda products: products[1:]),
        lambda content: _with_products(content, lambda products: products[1:2] + products[1:]),
    ],
)
def test_a_damaged_or_foreign_table_is_measured_again(
    folder: Path, measurer: Measurer, damage: Callable[[bytes], bytes]
) -> None:
    stored_table(MACHINE, measurer)
    (path,) = folder.glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert stored_table(MACHINE, measurer) == KernelTable(MACHINE, SPEEDS)
    assert measurer.calls == 2
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("MEGAEGPT_CACHE", str(file / "cache"))
    for calls in (1, 2):
        assert stored_table(MACHINE, measurer).products == SPEEDS
        assert measurer.calls == calls
    monkeypatch.setenv("MEGAEGPT_CACHE", "/proc/megaegpt")
    assert stored_table(MACHINE, measurer).products == SPEEDS


def test_a_table_that_was_measured_without_products_of_bf16_is_none_for_a_processor_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    with monkeypatch.context() as without:
        without.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        fewer = tuple(speed for speed in SPEEDS if speed.dtype == "fp32")
        assert stored_table(MACHINE, lambda: fewer).products == fewer
        assert stored_table(MACHINE, measurer).products == fewer
    assert stored_table(MACHINE, measurer).products == SPEEDS
    assert measurer.calls == 1


def test_two_processes_do_not_measure_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    folder.mkdir()
    with locked_folder(folder):
        assert stored_table(MACHINE, measurer) == KernelTable(MACHINE)
    assert measurer.calls == 0
    assert sum(waited) == pytest.approx(2)
    assert stored_table(MACHINE, measurer).products == SPEEDS


@pytest.mark.parametrize("left", [True, False])
def test_the_table_of_a_process_that_is_measuring_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer, left: bool
) -> None:
    """Whether it leaves one, or ends without."""
    stored_table(MACHINE, measurer)
    (path,) = folder.glob("*.json")
    content = path.read_bytes()
    path.unlink()
    other = contextlib.ExitStack()

    def sleep(_: float) -> None:
        if left:
            path.write_bytes(content)
        other.close()

    monkeypatch.setattr(time, "sleep", sleep)
    with other:
        other.enter_context(locked_folder(folder))
        assert stored_table(MACHINE, measurer).products == SPEEDS
    assert measurer.calls == (1 if left else 2)


def test_what_must_be_the_same_everywhere_is_not_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    monkeypatch.setattr(kernels, "measure", measurer)
    for choice in ("", "blas", "measure"):
        monkeypatch.setenv("MEGAEGPT_KERNELS", choice)
        assert choose_kernels(processes=2).products == ()
        torch.use_deterministic_algorithms(True)
        try:
            assert choose_kernels().products == ()
        finally:
            torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("MEGAEGPT_KERNELS", "mkl")
    with pytest.raises(ConfigError, match="MEGAEGPT_KERNELS=mkl is not known"):
        choose_kernels(processes=2)
    monkeypatch.setenv("MEGAEGPT_KERNELS", "")
    assert measurer.calls == 0
    assert choose_kernels() == KernelTable(Machine.here(), SPEEDS)
    assert measurer.calls == 1


def test_the_environment_chooses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    monkeypatch.setattr(kernels, "measure", measurer)
    weight = torch.empty(768, 768)
    monkeypatch.setenv("MEGAEGPT_KERNELS", "onednn")
    assert choose_kernels().blas_rows(weight) == frozenset()
    monkeypatch.setenv("MEGAEGPT_KERNELS", "blas")
    assert choose_kernels().blas_rows(weight) == frozenset(range(1, max(ROWS) + 1))
    assert measurer.calls == 0
    monkeypatch.setenv("MEGAEGPT_KERNELS", "measure")
    for calls in (1, 2):
        assert choose_kernels().products == SPEEDS
        assert measurer.calls == calls
    monkeypatch.setenv("MEGAEGPT_KERNELS", "mkl")
    with pytest.raises(ConfigError, match=r"MEGAEGPT_KERNELS=mkl is not known: onednn and blas"):
        choose_kernels()


def test_what_a_busy_machine_had_no_time_for_is_measured_again(folder: Path) -> None:
    for _ in range(2):
        assert stored_table(MACHINE, lambda: SPEEDS[:9]).products == SPEEDS[:9]
        assert list(folder.iterdir()) == []


def test_what_was_measured_beside_other_work_is_used_and_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(kernels, "with_share_of_processor", lambda measured, _: (measured(), 0.75))
        assert stored_table(MACHINE, measurer).products == SPEEDS
        assert list(folder.iterdir()) == []
    assert stored_table(MACHINE, measurer).products == SPEEDS
    assert measurer.calls == 2
    assert len(list(folder.iterdir())) == 1


def test_the_share_of_the_processor_is_that_of_all_threads() -> None:
    def half_asleep() -> tuple[ProductSpeed, ...]:
        begun = time.process_time()
        while time.process_time() - begun < 0.05:
            pass
        time.sleep(0.05)
        return SPEEDS

    products, share = kernels.with_share_of_processor(half_asleep, threads=2)
    assert products == SPEEDS
    assert 0 < share <= 0.3  # a quarter, and what the process does beside


def _clock(onednn: list[float], blas: list[float]) -> Callable[[], float]:
    """A clock by which rounds, of which the first is not counted, take these seconds."""

    def readings() -> Iterator[float]:
        now = 0.0
        yield now  # the beginning of all
        while True:
            yield now  # whether there is time for more
            for first, second in zip(onednn, blas, strict=True):
                yield now
                now += first
                yield now
                now += second
                yield now

    found = readings()
    return lambda: next(found)


def test_a_product_is_faster_if_it_is_in_every_round() -> None:
    speeds = measure(_clock([9, 0.04, 0.02, 0.03], [0, 0.03, 0.01, 0.02]), cold_bytes=1)
    assert [(s.dtype, s.size, s.rows) for s in speeds] == [("fp32", "block", 1)]  # 1.5 s are over
    assert speeds[0].onednn == pytest.approx(768 * 768 * 4 / 1e9 / 0.02)
    assert speeds[0].blas == pytest.approx(768 * 768 * 4 / 1e9 / 0.01)
    assert speeds[0].blas_is_faster
    for blas in ([9, 0.03, 0.03, 0.02], [9, 0.039, 0.01, 0.02]):
        speed = measure(_clock([9, 0.04, 0.02, 0.03], blas), cold_bytes=1)[0]
        assert not speed.blas_is_faster


def test_a_table_has_every_type_size_and_number_of_rows() -> None:
    speeds = measure(_clock([0] * 4, [0] * 4), cold_bytes=1)
    keys = [(speed.dtype, speed.size, speed.rows) for speed in speeds]
    dtypes = {"fp32"} | ({"bf16"} if onednn_is_available(torch.bfloat16) else set())
    assert keys == [(s.dtype, s.size, s.rows) for s in SPEEDS if s.dtype in dtypes]


def test_bf16_is_not_measured_where_the_processor_has_no_product_of_onednn_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without AVX-512, where torch raises: its table is whole, and kept."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    table = stored_table(MACHINE, lambda: measure(_clock([0] * 4, [0] * 4), cold_bytes=1))
    assert {speed.dtype for speed in table.products} == {"fp32"}
    assert len(list(folder.glob("*.json"))) == 1
    assert packed_order(torch.ones(64, 64).bfloat16()) is None
