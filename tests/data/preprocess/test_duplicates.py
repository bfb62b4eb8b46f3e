"""The compact set of hashes is a set."""

from __future__ import annotations

import numpy as np
import pytest
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


def test_a_batch_after_many_others_is_looked_up_in_few_arrays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = SeenHashes()
    generator = np.random.default_rng(1)
    for _ in range(500):
        assert seen.add(generator.integers(0, 2**63, 100).astype(np.uint64)).all()
    lookups, search = [], np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda *a: lookups.append(1) or search(*a))
    seen.add(np.zeros(1, np.uint64))
    assert 0 < len(lookups) < 20
