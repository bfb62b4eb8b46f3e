"""Finding repeated documents by their hashes, in 8 bytes a document."""

from __future__ import annotations

import numpy as np


class SeenHashes:
    """The set of all hashes so far, as a few sorted arrays of growing size.

    Adding merges arrays of similar size, as a log-structured store does, so that a billion
    documents need 8 GB and no Python objects. Two different texts share a 64-bit hash with a
    probability of about n^2 / 2^65 among n documents: 0.0003 for a hundred million.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes (n,); returns (n,) bool, true for the first of each that was not there."""
        unique, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(unique), bool)
        for run in self._runs:
            places = np.searchsorted(run, unique)
            places[places == len(run)] = 0
            known |= run[places] == unique
        is_new = np.zeros(len(hashes), bool)
        is_new[first[~known]] = True
        self._insert(unique[~known])
        return is_new

    def _insert(self, run: np.ndarray) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)
