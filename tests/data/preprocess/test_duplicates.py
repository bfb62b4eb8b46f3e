"""The compact set of hashes is a set."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.preprocess.duplicates import SeenHashes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12))
def test_it_says_what_a_python_set_says(batches: list[list[int]]) -> None:
    seen, expected = SeenHashes(), set()
    for batch in batches:
        flags = seen.add(np.array(batch, np.uint64))
        for value, is_new in zip(batch, flags.tolist(), strict=True):
            assert is_new == (value not in expected)
            expected.add(value)
    assert seen.values().tolist() == sorted(expected)


def test_many_batches_leave_few_arrays() -> None:
    seen = SeenHashes()
    generator = np.random.default_rng(1)
    for _ in range(500):
        assert seen.add(generator.integers(0, 2**63, 100).astype(np.uint64)).all()
    assert len(seen._runs) < 20
