"""Runs over several corpora by weight, and over documents that do not see each other."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.model.build import build_model
from megaegpt.model.calling import SequenceInputs
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed
from tests.tiny.runs import StopAfter, corpus, encoder_config, losses, records, run_config

__all__ = ["corpus"]


def _config(kind: str, corpus: Path, folder: Path) -> RunConfig:
    return run_config(
        kind,
        corpus,
        folder,
        data={"train": (f"{corpus}/train", f"{corpus}/validation"), "weights": (3.0, 1.0)},
        training={"steps": 8, "eval_interval": 8},
        checkpoint={"interval": 5},
        logging={"tensorboard": True},
    )


def _run(config: RunConfig, resume: bool = False, stop_after: int = 99) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        pretrain(config, ProcessGrid(), resume=resume, stops=StopAfter(stop_after))
    return shown.getvalue()


def _straight_and_interrupted(kind: str, corpus: Path, folder: Path) -> str:
    shown = _run(_config(kind, corpus, folder / "straight"))
    interrupted = _config(kind, corpus, folder / "interrupted")
    _run(interrupted, stop_after=3)
    _run(interrupted, resume=True)
    other = replace(interrupted, data=replace(interrupted.data, weights=(1.0, 1.0)))
    return shown + _run(other, resume=True)


@pytest.mark.parametrize("kind", ["gpt", "egpt"])
def test_a_blended_run_resumes_and_counts_tokens_and_epochs_by_corpus(
    corpus: Path, tmp_path: Path, kind: str, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _straight_and_interrupted, kind, corpus, tmp_path)
    assert f"75.0% {corpus}/train (" in shown
    assert "the samples of the steps to come change: data.weights [3.0, 1.0] -> [1.0, 1.0]" in shown
    assert sorted(losses(tmp_path / "straight")) == list(range(1, 9))
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "straight")
    last = records(tmp_path / "straight")[-2]
    assert last["step"] == 8
    tokens = [last[f"tokens/{corpus}/{split}"] for split in ("train", "validation")]
    assert sum(tokens) == 8 * 8 * (8 if kind == "gpt" else 24)
    assert 0 < tokens[1] < tokens[0]
    assert last[f"epochs/{corpus}/validation"] > 0
    assert _board_tags(tmp_path / "straight") >= {
        f"training/{name}/{corpus}/{split}"
        for name in ("tokens", "epochs")
        for split in ("train", "validation")
    }


def _board_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_packed_documents_of_a_shard_do_not_see_each_other(tmp_path: Path) -> None:
    """Documents shorter than the context, drawn from a shard, cost what they cost alone."""
    end = 99
    texts = [np.arange(1, 6), np.arange(20, 29), np.arange(50, 53)]
    with ShardWriter(tmp_path / "s") as writer:
        for text in texts:
            writer.add_document(np.append(text, end).astype(np.uint16))
        writer.finish()
    stream = TokenStream([str(tmp_path / "s")])
    row = torch.from_numpy(stream.read(0, 20).astype(np.int64))
    config = encoder_config(max_seq_len=19, document_end=end)
    model = build_model(config, ProcessGrid(), seed=1).eval()
    inputs = SequenceInputs()

    def nats(tokens: torch.Tensor) -> torch.Tensor:
        batch = {"tokens": tokens[None, :-1], "targets": tokens[None, 1:]}
        with torch.no_grad():
            return inputs.loss(model, batch, "none")[0]

    packed = nats(row)
    start = 0
    for text in texts:
        alone = nats(row[start : start + len(text) + 1])
        torch.testing.assert_close(packed[start : start + len(text)], alone)
        start += len(text) + 1
    model = build_model(replace(config, document_end=None), ProcessGrid(), seed=1).eval()
    assert not torch.allclose(nats(row)[6:14], packed[6:14])
