"""The loop: what it shows, when it saves, how it stops, and that the encoder stays as it was."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from megaegpt import environment
from megaegpt.config import EncoderConfig
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.errors import CheckpointError, ConfigError, DataError, MegaEGPTError, TrainingError
from megaegpt.evaluation.text_loss import Evaluator
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel import compiling
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training import pretraining
from megaegpt.training.engine.engine import Engine, StepResult
from megaegpt.training.pretraining import pretrain
from megaegpt.training.stopping import StopRequests
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    CHUNK,
    StopAfter,
    corpus,
    encoder_config,
    losses,
    records,
    run_config,
    validation_losses,
    write_encoder,
)

__all__ = ["corpus"]


def _run(
    kind: str,
    corpus: Path,
    folder: Path,
    *,
    resume: bool = False,
    stops: StopRequests | None = None,
    sample_text: Any = None,
    **changes: Any,
) -> tuple[bool, str]:
    """Train; whether it is complete, and what was shown on this rank."""
    config = run_config(kind, corpus, folder, **changes)
    grid = grid_for(config.parallel.tensor_parallel_size)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        complete = pretrain(config, grid, resume=resume, stops=stops, sample_text=sample_text)
    return complete, shown.getvalue()


def _error_of(*args: Any, **kwargs: Any) -> MegaEGPTError:
    try:
        _run(*args, **kwargs)
    except MegaEGPTError as error:
        return error
    raise AssertionError("no error")


# -- what a run shows and leaves


def _go_on_without_the_source(corpus: Path, folder: Path) -> str:
    source = folder / "source"
    config = run_config("gpt", corpus, folder).model
    save_weights(build_model(config, grid_for(1), seed=5), source, grid_for(1))
    start = {"initialize_from": str(source)}
    _run("gpt", corpus, folder, training={"steps": 3, **start})
    shutil.rmtree(source)
    return _run("gpt", corpus, folder, resume=True, training={"steps": 6, **start})[1]


def test_a_run_goes_on_though_the_weights_that_it_began_with_are_gone(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _go_on_without_the_source, corpus, tmp_path)
    assert "resuming after step 3" in shown
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def _plain_run(corpus: Path, folder: Path) -> str:
    logging = {"gradient_norms": True}
    complete, shown = _run("egpt", corpus, folder, resume=True, logging=logging)
    assert complete
    return shown


def test_a_run_shows_derived_quantities_before_step_0_and_leaves_records(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 9.0}\n')  # an earlier start's
    (shown,) = distributed(1, _plain_run, corpus, tmp_path)
    before, _ = shown.split("step 00002/00006")
    kept = tmp_path / "earlier_1"
    assert f"notice: records of an earlier run lay here: they are in {kept} now" in before
    assert records(kept) == [{"step": 5, "loss": 9.0}]
    for words in (
        "10,944 trainable parameters over a frozen encoder of 8,768",
        "192 tokens = 8 samples of 24 = 1 ranks x 4 micro-steps x 2",
        "FLOP a token",
        "1,000 training tokens",
    ):
        assert words in before
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert sorted(validation_losses(tmp_path)) == [3, 6]
    assert losses(tmp_path)[6] < losses(tmp_path)[1]
    by_part = [r for r in records(tmp_path) if "grad_norm/layer_00" in r]
    assert [r["step"] for r in by_part] == [2, 4, 6]
    squares = [v**2 for n, v in by_part[0].items() if n.startswith("grad_norm/")]
    assert sum(squares) == pytest.approx(by_part[0]["grad_norm"] ** 2, rel=1e-4)
    speed = [r["step"] for r in records(tmp_path) if "tokens_per_second" in r]
    assert speed == [2, 3, 4, 6]  # step 3 was reported because it was saved
    assert "kind: egpt" in (tmp_path / "config.yaml").read_text()


# -- the frozen encoder


def _train_and_look_at_the_encoder(corpus: Path, folder: Path) -> None:
    built: dict[str, Any] = {}

    def watched(name: str, build: Any) -> Any:
        def building(*arguments: Any, **options: Any) -> Any:
            built[name] = build(*arguments, **options)
            return built[name]

        return building

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_encoder", "starting_model"):
            patch.setattr(pretraining, name, watched(name, getattr(pretraining, name)))
        _run("egpt", corpus, folder, parallel={"sequence_parallel": True})
    encoder, model = built["load_encoder"], built["starting_model"]
    assert encoder.gpt.stack.sequence_parallel
    assert model.stack.sequence_parallel
    from megaegpt.model.encoder import weights_fingerprint

    assert weights_fingerprint(encoder.gpt) == encoder.fingerprint
    assert not any(module.training for module in encoder.gpt.modules())
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    trained = {id(p) for p in model.parameters()}
    assert not any(id(p) in trained for p in encoder.parameters())


def test_training_leaves_the_encoder_bit_for_bit_and_out_of_the_checkpoint(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _train_and_look_at_the_encoder, corpus, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000006"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    with safe_open(checkpoint / "weights" / "model.safetensors", framework="pt") as file:
        exported = set(file.keys())
    assert exported == set(manifest["parameters"])
    assert not any("encoder" in name or "embedding" in name for name in exported)
    extra = json.loads((checkpoint / "weights" / "config.json").read_text())["extra"]
    assert extra["encoder_fingerprint"] == manifest["trainer"]["encoder"]


def _resume_over_another_encoder(corpus: Path, other: Path, folder: Path) -> str:
    _run("egpt", corpus, folder, stops=StopAfter(2), data={"history_features": "online"})
    error = _error_of(
        "egpt",
        corpus,
        folder,
        resume=True,
        data={"history_features": "online"},
        model={"encoder": run_config("egpt", other, folder).model.encoder},
    )
    assert isinstance(error, CheckpointError)
    return str(error)


def test_a_run_does_not_go_on_over_another_encoder(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    write_encoder(tmp_path / "other" / "encoder", seed=8)
    run = tmp_path / "run"
    (message,) = distributed(1, _resume_over_another_encoder, corpus, tmp_path / "other", run)
    assert "another encoder" in message


# -- stored and online features

_SOURCES = {
    "online": {"history_features": "online"},
    "stored history": {"history_features": "stored"},
    "stored": {"history_features": "stored", "token_features": "stored"},
}


def _train_from_each_source(corpus: Path, folder: Path) -> None:
    encoder = EncoderConfig(source=str(folder / "encoder"), overlap=3, batch_size=4)
    for name, data in _SOURCES.items():
        _run("egpt", corpus, folder / name, data=data, model={"encoder": encoder})


def test_stored_and_online_features_give_the_same_losses(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """Over an encoder that sees three tokens before each chunk."""
    gpt = build_model(encoder_config(max_seq_len=CHUNK + 3), ProcessGrid(), seed=7)
    save_weights(gpt, tmp_path / "encoder", ProcessGrid())
    distributed(2, _train_from_each_source, corpus, tmp_path)
    online = tmp_path / "online"
    assert not (online / "features").exists()
    for name in ("stored history", "stored"):
        stored = tmp_path / name
        assert sorted(p.name for p in (stored / "features").iterdir()) == ["train", "validation"]
        assert losses(stored) == pytest.approx(losses(online), rel=1e-6)
        assert validation_losses(stored) == pytest.approx(validation_losses(online), rel=1e-6)


# -- saving and stopping


def _fail_in_evaluation(corpus: Path, folder: Path) -> None:
    original = Evaluator.evaluate

    def failing(self: Evaluator, model: Any, *_: Any) -> Any:
        raise RuntimeError("out of memory in evaluation")

    Evaluator.evaluate = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            _run("gpt", corpus, folder)
    finally:
        Evaluator.evaluate = original  # type: ignore[method-assign]
    assert (folder / "checkpoints" / "step_00000003").is_dir()
    complete, _ = _run("gpt", corpus, folder, resume=True)
    assert complete


def test_a_checkpoint_precedes_evaluation_which_is_made_up_for_on_resume(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _fail_in_evaluation, corpus, tmp_path)
    assert sorted(validation_losses(tmp_path)) == [3, 6]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def _stop_by_signal(corpus: Path, folder: Path, number: int) -> tuple[bool, str, bool]:
    inherited = signal.getsignal(number)
    if number == signal.SIGINT:  # ignored in what a shell has started in the background
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    original = Engine.train_step

    def with_signal(self: Engine, step: int, micro_batches: Any) -> StepResult:
        if step == 1 and self.grid.rank == 1:
            os.kill(os.getpid(), number)
        return original(self, step, micro_batches)

    Engine.train_step = with_signal  # type: ignore[method-assign]
    try:
        complete, shown = _run("gpt", corpus, folder)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]
    restored = signal.getsignal(number) is before
    signal.signal(number, inherited)
    return complete, shown, restored


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_rank_saves_and_stops_all(
    corpus: Path, tmp_path: Path, name: str, distributed: Distributed
) -> None:
    results = distributed(2, _stop_by_signal, corpus, tmp_path, getattr(signal, name))
    assert [(complete, restored) for complete, _, restored in results] == [(False, True)] * 2
    # The ranks had begun to agree on step 3 before the signal came.
    assert f"stopped by {name} after step 3 of 6; go on with --resume" in results[0][1]
    assert results[1][1] == ""  # one rank speaks
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000003"


class _ReaderLeaves(io.StringIO):
    """From the line of step 2 on, nobody reads."""

    def write(self, text: str) -> int:
        if "step 00002" in text:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def _lose_the_reader(corpus: Path, folder: Path) -> bool:
    config = run_config("gpt", corpus, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "reader_has_left", lambda error: True)
        with contextlib.redirect_stdout(_ReaderLeaves()):
            return pretrain(config, grid_for(1))


def test_the_end_of_who_reads_rank_0_saves_and_stops_all(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    assert distributed(2, _lose_the_reader, corpus, tmp_path) == [False, False]
    # The ranks had begun to agree on step 3 before.
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000003"


def _stop_in_evaluation(corpus: Path, folder: Path, ranks: int) -> tuple[bool, str]:
    original = EvaluationWindows.batch

    def with_signal(self: EvaluationWindows, numbers: np.ndarray) -> Any:
        if numbers[0] == 2 * ranks - 1:  # the last rank's second
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, numbers)

    single = {"micro_batch_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationWindows, "batch", with_signal)
        complete, shown = _run("gpt", corpus, folder, training=single)
    assert not (folder / "checkpoints" / "step_00000006").exists()
    _run("gpt", corpus, folder, resume=True, training=single)
    return complete, shown


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_an_evaluation_leaves_it_for_the_next_start(
    corpus: Path, tmp_path: Path, ranks: int, distributed: Distributed
) -> None:
    results = distributed(ranks, _stop_in_evaluation, corpus, tmp_path, ranks)
    assert not any(complete for complete, _ in results)
    shown = results[0][1]
    assert "step 3: the evaluation was left for SIGTERM; --resume makes up for it" in shown
    assert "stopped by SIGTERM after step 3 of 6; go on with --resume" in shown
    assert sorted(validation_losses(tmp_path)) == [3, 6]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


class _Counted(StopRequests):
    """Notes the devices of the values that ranks agree on, one entry a step."""

    def __init__(self) -> None:
        super().__init__()
        self.agreements: list[str] = []

    def ask(self, failed: bool, grid: ProcessGrid) -> None:
        reduce = dist.all_reduce

        def noting(tensor: torch.Tensor, **options: Any) -> Any:
            self.agreements.append(tensor.device.type)
            assert options["group"] is grid.control_group
            return reduce(tensor, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", noting)
            super().ask(failed, grid)


def _count_agreements(corpus: Path, folder: Path) -> list[str]:
    stops = _Counted()
    assert _run("gpt", corpus, folder, stops=stops)[0]
    return stops.agreements


def test_ranks_agree_on_the_cpu_once_a_step_whether_to_go_on(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    assert distributed(2, _count_agreements, corpus, tmp_path) == [["cpu"] * 6] * 2


def _stop_by_time(corpus: Path, folder: Path) -> tuple[bool, str]:
    stops = StopRequests(exit_minutes=0.0)
    return _run("gpt", corpus, folder, stops=stops)


def test_a_time_limit_saves_and_stops(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    ((complete, shown),) = distributed(1, _stop_by_time, corpus, tmp_path)
    assert not complete
    assert "stopped by --exit-minutes 0 after step 0" in shown


def _start_again(corpus: Path, folder: Path) -> tuple[str, str, bool]:
    _run("gpt", corpus, folder, training={"steps": 3})
    error = _error_of("gpt", corpus, folder)
    assert isinstance(error, CheckpointError)
    _, fresh = _run("gpt", corpus, folder / "new", resume=True, training={"steps": 3})
    complete, _ = _run("gpt", corpus, folder / "new", resume=True, training={"steps": 3})
    return str(error), fresh, complete


def test_an_old_run_is_not_overwritten_and_resume_without_one_starts_clean(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    ((message, fresh, complete),) = distributed(1, _start_again, corpus, tmp_path)
    assert "step_00000003 is from an earlier run: go on with it by --resume" in message
    assert f"no checkpoint in {tmp_path / 'new' / 'checkpoints'}: starting at step 0" in fresh
    assert complete  # resuming a complete run does nothing
    assert sorted(losses(tmp_path / "new")) == [1, 2, 3]


# -- failures


def _fail_to_read_on_rank_1(corpus: Path, folder: Path) -> tuple[str, bool]:
    from megaegpt.data.tokens.samples import PretrainingSamples

    original = PretrainingSamples.batch

    def failing(self: Any, numbers: np.ndarray, out: Any = None) -> Any:
        if grid_for(1).rank == 1 and numbers[0] >= 16:
            raise DataError("train.bin: the disk is gone")
        return original(self, numbers)

    PretrainingSamples.batch = failing  # type: ignore[method-assign]
    try:
        error = _error_of("gpt", corpus, folder)
    finally:
        PretrainingSamples.batch = original  # type: ignore[method-assign]
    assert isinstance(error, DataError)
    return str(error), error.on_every_rank


def test_a_rank_that_cannot_read_ends_all_ranks(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    assert distributed(2, _fail_to_read_on_rank_1, corpus, tmp_path) == [
        ("rank 1: train.bin: the disk is gone", True),
        ("train.bin: the disk is gone", True),
    ]


def _meet_a_bad_loss(corpus: Path, folder: Path, policy: str) -> tuple[str, str]:
    """Rank 1's second micro-batch of step 3 has an infinite loss."""
    from megaegpt.model.calling import SequenceInputs

    original = SequenceInputs.loss
    calls = 0

    def bad(self: Any, model: Any, batch: Any, reduction: str = "sum") -> Any:
        nonlocal calls
        nats = original(self, model, batch, reduction)  # type: ignore[arg-type]
        calls += reduction == "sum"
        return nats * float("inf") if grid_for(1).rank == 1 and calls == 2 * 2 + 2 else nats

    SequenceInputs.loss = bad  # type: ignore[method-assign]
    shown, message = "", ""
    try:
        _, shown = _run(
            "gpt",
            corpus,
            folder,
            training={"on_nonfinite": policy, "eval_interval": 100},
            data={"validation": ()},
        )
    except TrainingError as error:
        message = str(error)
    finally:
        SequenceInputs.loss = original  # type: ignore[method-assign]
    return message, shown


def test_a_loss_that_is_not_finite_stops_with_step_rank_and_samples(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    # Samples of step 3: 16..23; micro-step 1 of rank 1 has (1 * 2 ranks + 1) * 2 = 6 and 7 of them.
    for message, _ in distributed(2, _meet_a_bad_loss, corpus, tmp_path, "stop"):
        assert message.startswith("step 3: the loss is not finite on rank 1 (samples 22, 23)")
        assert "on_nonfinite=skip" in message


def test_a_loss_that_is_not_finite_is_skipped_if_asked(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (message, shown), _ = distributed(2, _meet_a_bad_loss, corpus, tmp_path, "skip")
    assert message == ""
    assert "skipped: step 3: the loss is not finite on rank 1 (samples 22, 23)" in shown
    assert "skipped 1" in shown.splitlines()[-2]
    assert {step for step, loss in losses(tmp_path).items() if loss is None} == {3}
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def _meet_an_infinite_loss(corpus: Path, folder: Path, policy: str, where: str) -> tuple[str, str]:
    """One training step's loss, or each validation loss, is infinite and its gradient is not."""
    from megaegpt.model.calling import SequenceInputs

    original = SequenceInputs.loss
    calls = 0

    def bad(self: Any, model: Any, batch: Any, reduction: str = "sum") -> Any:
        nonlocal calls
        loss = original(self, model, batch, reduction)  # type: ignore[arg-type]
        if reduction == "none":
            return loss + float("nan") if where == "validation" else loss
        calls += 1
        return loss + float("inf") if where == "training" and calls == 3 * 4 + 1 else loss

    SequenceInputs.loss = bad  # type: ignore[method-assign]
    shown, message = "", ""
    try:
        _, shown = _run("gpt", corpus, folder, training={"on_nonfinite": policy})
    except TrainingError as error:
        message = str(error)
    finally:
        SequenceInputs.loss = original  # type: ignore[method-assign]
    return message, shown


def test_an_infinite_loss_with_a_finite_gradient_stops_before_anything_is_saved(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    run = (corpus, tmp_path, "stop", "training")
    ((message, _),) = distributed(1, _meet_an_infinite_loss, *run)
    assert message.startswith("step 4: the loss is not finite on rank 0 (samples 24, 25)")
    assert "its gradient is, and was applied" in message
    assert "--resume goes back to" in message
    assert message.endswith("step_00000003")


def test_a_validation_loss_that_is_not_a_number_stops_the_run_and_is_never_the_best(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    run = (corpus, tmp_path / "stop", "stop", "validation")
    ((message, _),) = distributed(1, _meet_an_infinite_loss, *run)
    assert message.startswith("step 3: the validation loss is not finite (nan)")
    run = (corpus, tmp_path / "skip", "skip", "validation")
    ((message, shown),) = distributed(1, _meet_an_infinite_loss, *run)
    assert message == ""
    assert "skipped: step 6: the validation loss is not finite (nan)" in shown


def _train_with_a_short_validation_split(corpus: Path, folder: Path, tokens: int) -> Any:
    folder.mkdir()
    with ShardWriter(folder / "short") as writer:
        writer.add_document(np.arange(tokens, dtype=np.uint16))
        writer.finish()
    try:
        _run(
            "egpt",
            corpus,
            folder,
            data={"validation": (str(folder / "short"),), "token_features": "stored"},
        )
    except DataError as error:
        return str(error)
    return validation_losses(folder)


def test_a_validation_split_shorter_than_a_chunk_is_evaluated(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    run = (corpus, tmp_path / "run", 5)
    (found,) = distributed(1, _train_with_a_short_validation_split, *run)
    assert sorted(found) == [3, 6]
    assert all(3 < loss < 6 for loss in found.values())


def test_a_validation_split_without_a_token_to_predict_is_refused(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    run = (corpus, tmp_path / "run", 1)
    (message,) = distributed(1, _train_with_a_short_validation_split, *run)
    assert message.startswith("data.validation (")
    assert "has no token to predict" in message


def _evaluate_apart(corpus: Path, folder: Path) -> tuple[bool, str]:
    """Rank 1's validation losses are one unit in the last place above rank 0's at step 3, and
    below them at step 6: seen from there the loss is still falling.
    """
    from megaegpt.evaluation.text_loss import Evaluation, Evaluator

    rank, losses = grid_for(1).rank, iter((4.0, 4.0))
    shift = iter((math.inf, -math.inf) if rank else (4.0, 4.0))

    def evaluate(self: Any, model: Any, *_: Any) -> Evaluation:
        return Evaluation(math.nextafter(next(losses), next(shift)), 1.0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", evaluate)
        return _run("gpt", corpus, folder, training={"patience": 1, "steps": 9})


@pytest.mark.long
def test_ranks_whose_losses_differ_in_the_last_bit_stop_together(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (complete, shown), (other, _) = distributed(2, _evaluate_apart, corpus, tmp_path)
    assert complete == other
    assert "ended after step 6 of 9" in shown


def _misfits(corpus: Path, folder: Path) -> list[tuple[str, bool]]:
    errors = [
        _error_of("egpt", corpus, folder, model={"hidden_size": 32}),
        _error_of("gpt", corpus, folder, data={"train": (str(corpus / "nothing"),)}),
        _error_of("gpt", corpus, folder, training={"global_batch_size": 9}),
    ]
    assert [type(e) for e in errors] == [ConfigError, DataError, ConfigError]
    return [(str(e), e.on_every_rank) for e in errors]


def test_what_does_not_fit_is_one_error_on_all_ranks(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    for encoder, shards, batch in distributed(2, _misfits, corpus, tmp_path):
        assert "its hidden_size is 16, model's 32" in encoder[0]
        assert "nothing" in shards[0]
        assert "training.global_batch_size=9" in batch[0]
        assert all(everywhere for _, everywhere in (encoder, shards, batch))


# -- compilation


def _run_without_a_compiler(corpus: Path, folder: Path) -> str:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    compiling.compile_problem.forget()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", fails if is_last else lambda function: function)
        _, shown = _run("egpt", corpus, folder, training={"compile": True})
    compiling.compile_problem.forget()
    return shown


def test_where_a_rank_can_compile_nothing_a_run_says_so_once_and_goes_on(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    notice = "notice: training.compile is off, it does not work here: RuntimeError: no C++ compiler"
    for ranks, where in ((1, ""), (2, " (on rank 1)")):
        compiled, plain = tmp_path / f"compiled_{ranks}", tmp_path / f"plain_{ranks}"
        shown = distributed(ranks, _run_without_a_compiler, corpus, compiled)
        assert shown[0].count(f"{notice}{where}\n") == 1
        distributed(ranks, _run, "egpt", corpus, plain)
        assert losses(compiled) == losses(plain)


# -- samples


def _sample(model: Any, encoder: Any, tokenizer: Any, generation: Any, prompt: Any) -> str:
    assert encoder is not None
    return f"{prompt.text} and so on"


def _run_with_samples(corpus: Path, folder: Path) -> str:
    generation = {"max_new_tokens": 4, "prompt": "Once"}
    return _run("egpt", corpus, folder, sample_text=_sample, generation=generation)[1]


def test_a_sample_is_shown_at_every_evaluation(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _run_with_samples, corpus, tmp_path)
    assert shown.count("Once and so on") == 2
