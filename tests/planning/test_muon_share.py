"""Muon's share of a rank on few and on many ranks."""

from __future__ import annotations

from megaegpt.config import OptimizerConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.planning.muon_share import Matrix, MuonShare, share_of_muon

_BLOCK = [*4 * [Matrix(64, 64, 64 * 64)], Matrix(256, 64, 256 * 64), Matrix(64, 256, 64 * 256)]


def _share(replicas: int) -> MuonShare:
    training = TrainingConfig(global_batch_size=replicas, micro_batch_size=1)
    config = RunConfig(training=training, optimizer=OptimizerConfig(kind="muon"))
    share = share_of_muon(config, replicas, "bf16", 4 * _BLOCK)
    assert share is not None
    return share


def test_one_rank_has_all_matrices_and_sends_none() -> None:
    share = _share(1)
    assert (len(share.matrices), share.exchanged, share.gathered) == (24, 0, 0)


def test_many_ranks_have_two_matrices_at_most_and_exchange_no_more() -> None:
    largest = 4 * 64 * 256
    for replicas in (64, 512):
        share = _share(replicas)
        assert len(share.matrices) <= 2
        assert 0 < share.exchanged <= 2 * largest
        assert share.working < 5 * largest


def test_adamw_has_none() -> None:
    assert share_of_muon(RunConfig(), 1, "bf16", _BLOCK) is None
