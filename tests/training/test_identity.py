"""What a run is: resumed, begun from weights, or spread over ranks, it is held against what it was
or what the others were given, and says what is not the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from megaegpt.config import BatchRampConfig, ModelConfig, RunConfig
from megaegpt.config.arithmetic import RESOLVED, model_arithmetic
from megaegpt.config.loading import config_to_yaml
from megaegpt.config.model_rules import CONDITIONS
from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.model.build import build_model
from megaegpt.model.initialization import initialization_problems
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.checkpoint.manifest import Manifest, Topology
from megaegpt.training.identity import (
    EFFECTS,
    READ_FROM,
    check_initialization,
    check_resume,
    flatten,
    judged_by,
    run_identity,
)
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    StopAfter,
    corpus,
    encoder_config,
    run_config,
)

__all__ = ["corpus"]

_CORPUS = "a" * 64


def test_every_key_of_a_configuration_has_an_effect_and_no_other_key_has() -> None:
    """A new key must be classified in ``identity``; this test then names it."""
    keys = set(flatten(RunConfig()))
    assert keys - set(EFFECTS) == set()
    assert set(EFFECTS) - keys == set()
    models = {f"model.{name}" for name in {*RESOLVED, *CONDITIONS}}
    for table in (READ_FROM, models):
        assert set(table) <= keys


def _with_another(section: Any, key: str) -> Any:
    """A section of a configuration with another value of one key, valid or not."""
    name, _, rest = key.partition(".")
    value = getattr(section, name)
    if rest:
        other = _with_another(value, rest)
    elif isinstance(value, str):
        other = "another"
    elif isinstance(value, bool):
        other = not value
    else:
        other = 0 if value is None else value + 1
    return dataclasses.replace(section, **{name: other})


def test_what_a_decoder_copies_of_an_encoder_s_blocks_is_judged_by_all_of_their_arithmetic() -> (
    None
):
    encoder = ModelConfig(attention="latent", positions="rotary")
    assert initialization_problems(encoder, encoder) == []
    elsewhere = {
        "model.kind",
        "model.vocab_size",  # compared for every encoder
        "model.hidden_size",
        "model.num_layers",  # the last ones are copied
        "model.window",  # of what the decoder attends to
        "model.document_end",
        "model.tied_embeddings",
    }
    for key in model_arithmetic(encoder).keys() - elsewhere:
        decoder = _with_another(encoder, key.removeprefix("model."))
        assert initialization_problems(decoder, encoder), key


# -- resuming --------------------------------------------------------------------------------------


def _checkpoint(folder: Path, config: RunConfig, step: int = 3, **state: Any) -> Path:
    """What :func:`check_resume` reads of a checkpoint."""
    place = folder / f"step_{step:08d}"
    save_weights(build_model(config.model, ProcessGrid()), place / "weights", ProcessGrid())
    known = {"step": step, **run_identity(config, None, _CORPUS)}
    Manifest(step, dataclasses.asdict(Topology(1, 1, 0, "fp32")), {}, {**known, **state}, {}).write(
        place
    )
    return place


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(
        config,
        **{n: dataclasses.replace(getattr(config, n), **values) for n, values in sections.items()},
    )


def _check(config: RunConfig, checkpoint: Path, corpus: str = _CORPUS) -> list[str]:
    return check_resume(
        config, run_identity(config, None, corpus), checkpoint, Manifest.read(checkpoint)
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config("gpt", tmp_path, tmp_path)


def test_an_unchanged_run_is_resumed_without_a_word(config: RunConfig, tmp_path: Path) -> None:
    assert _check(config, _checkpoint(tmp_path, config)) == []


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("num_heads", 4, 2),
        ("positions", "none", "sinusoidal"),
        ("window", None, 4),
        ("activation", "gelu_tanh", "gelu"),
        ("layer_norm_eps", 1e-5, 1e-6),
        ("document_end", None, 3),
        ("vocab_size", 100, 101),
    ],
)
def test_arithmetic_that_no_shape_tells_is_refused_by_name_with_both_values(
    config: RunConfig, tmp_path: Path, key: str, value: Any, other: Any
) -> None:
    config = _changed(config, model={"positions": "none"})
    checkpoint = _checkpoint(tmp_path, config)
    there = "null" if value is None else value
    with pytest.raises(CheckpointError, match=rf"model\.{key} is {there} there and {other} here"):
        _check(_changed(config, model={key: other}), checkpoint)


def test_every_other_changed_key_is_named_in_one_line(config: RunConfig, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, config)
    (line,) = _check(
        _changed(
            config,
            model={"dropout": 0.2},
            optimizer={"lr": 1e-3, "schedule": "linear", "beta2": 0.9, "weight_decay": 0.0},
            training={"steps": 9, "micro_batch_size": 1, "gradient_clipping": 0.0, "seed": 5},
            logging={"interval": 1},
        ),
        checkpoint,
    )
    order, optimization, rest = line.split("; ")
    assert order.endswith("the samples of the steps to come change: training.seed 1337 -> 5")
    for change in (
        "model.dropout 0.1 -> 0.2",
        "training.steps 6 -> 9",
        "training.micro_batch_size 2 -> 1",
        "training.gradient_clipping 1.0 -> 0.0",
        "optimizer.lr 0.003 -> 0.001",
        "optimizer.schedule cosine -> linear",
        "optimizer.beta2 0.95 -> 0.9",
        "optimizer.weight_decay 0.1 -> 0.0",
    ):
        assert change in optimization
    assert rest == "without effect on the losses: logging.interval 2 -> 1"


def test_other_parameter_groups_are_named(config: RunConfig, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, config)
    groups = (ParameterGroup("*.bias", weight_decay=0.5),)
    (line,) = _check(_changed(config, optimizer={"groups": groups}), checkpoint)
    assert "the optimization changes: optimizer.groups [] -> [{'match': '*.bias'" in line


def test_another_kind_of_optimizer_is_refused(config: RunConfig, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "checkpoint", config)
    with pytest.raises(CheckpointError, match=r"optimizer\.kind is adamw there and muon here"):
        _check(_changed(config, optimizer={"kind": "muon"}), folder)


def test_other_groups_of_optimizer_states_at_stage_3_are_refused(
    config: RunConfig, tmp_path: Path
) -> None:
    raw = {"zero_optimization": {"sub_group_size": 1000}}
    checkpoint = _checkpoint(tmp_path / "two", config)
    grouped = dataclasses.replace(config, deepspeed=raw)
    _check(grouped, checkpoint)  # of no other stage's states
    config = _changed(config, parallel={"zero_stage": 3})
    checkpoint = _checkpoint(tmp_path / "three", config)
    with pytest.raises(CheckpointError, match="sub_group_size is None there and 1000 here"):
        _check(dataclasses.replace(config, deepspeed=raw), checkpoint)


def test_another_corpus_and_another_batch_are_named(config: RunConfig, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, config)
    ramp = BatchRampConfig(start=2, increment=2, steps=1)
    (line,) = _check(_changed(config, training={"batch_ramp": ramp}), checkpoint, "b" * 64)
    assert "training.batch_ramp.start null -> 2" in line
    assert f"shards {'a' * 12} -> {'b' * 12}" in line


@pytest.mark.parametrize(("saved", "steps"), [(5, 4), (5, 5)])
def test_no_more_steps_than_are_done_are_refused(
    config: RunConfig, tmp_path: Path, saved: int, steps: int
) -> None:
    checkpoint = _checkpoint(tmp_path, config, step=saved)
    with pytest.raises(CheckpointError, match=rf"training\.steps={steps} is not above the 5 steps"):
        _check(_changed(config, training={"steps": steps}), checkpoint)


@pytest.mark.parametrize("section", ["checkpoint", "logging"])
def test_the_checkpoint_of_another_run_is_refused_and_a_moved_run_is_not(
    config: RunConfig, tmp_path: Path, section: str
) -> None:
    checkpoint = _checkpoint(tmp_path, config)
    moved = _changed(config, **{section: {"directory": str(tmp_path / "moved")}})
    (line,) = _check(moved, checkpoint)
    assert f"{section}.directory" in line
    reason = rf"is of another run: {section}\.directory.*seed is 13"
    with pytest.raises(CheckpointError, match=reason):
        _check(_changed(moved, training={"seed": 1}), checkpoint)


def test_an_encoder_of_the_same_weights_and_another_arithmetic_is_refused(
    config: RunConfig, tmp_path: Path
) -> None:
    there = model_arithmetic(encoder_config(num_heads=2))
    checkpoint = _checkpoint(tmp_path, config, encoder="e" * 64, encoder_arithmetic=there)
    here = {"encoder": "e" * 64, "encoder_arithmetic": model_arithmetic(encoder_config())}
    with pytest.raises(CheckpointError, match=r"model\.num_heads is 2 there and 4 here"):
        check_resume(
            config,
            {**run_identity(config, None, _CORPUS), **here},
            checkpoint,
            Manifest.read(checkpoint),
        )


def test_an_older_checkpoint_is_held_against_what_its_run_wrote_down(
    config: RunConfig, tmp_path: Path
) -> None:
    """Checkpoints did not always hold the configuration; a few values and the model they did."""
    checkpoint = _checkpoint(tmp_path, config)
    manifest = Manifest.read(checkpoint)
    for name in ("config", "encoder_arithmetic"):
        del manifest.trainer[name]
    manifest.write(checkpoint)
    other = _changed(config, optimizer={"lr": 1e-2}, training={"seed": 5})
    (line,) = _check(other, checkpoint)
    assert "training.seed 1337 -> 5" in line
    assert "lr" not in line
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    (line,) = _check(other, checkpoint)
    assert "optimizer.lr 0.003 -> 0.01" in line
    (tmp_path / "config.yaml").write_text("{")
    assert len(_check(other, checkpoint)) == 1
    with pytest.raises(CheckpointError, match="another model"):
        _check(_changed(config, model={"window": 4}), checkpoint)


def _resume_another_model(folder: Path, corpus: Path) -> tuple[str, str]:
    """What resuming with rotary positions says, and the ``config.yaml`` that is then there."""
    grid = grid_for(1)
    config = run_config("gpt", corpus, folder, model={"positions": "none"})
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid, stops=StopAfter(2))
        try:
            pretrain(_changed(config, model={"positions": "rotary"}), grid, resume=True)
        except CheckpointError as error:
            return str(error), (folder / "config.yaml").read_text()
    raise AssertionError("it went on")


def test_a_run_does_not_go_on_with_other_positions(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    ((message, recorded),) = distributed(1, _resume_another_model, tmp_path, corpus)
    assert "model.positions is none there and rotary here" in message
    assert "positions: none" in recorded


# -- beginning from weights ------------------------------------------------------------------------


def test_weights_of_another_arithmetic_are_refused_and_what_may_be_meant_is_named(
    tmp_path: Path,
) -> None:
    trained = encoder_config(positions="none")
    save_weights(build_model(trained, ProcessGrid()), tmp_path, ProcessGrid())
    assert check_initialization(trained, tmp_path) == []
    for key, value in (("activation", "gelu"), ("num_heads", 2), ("positions", "rotary")):
        with pytest.raises(ConfigError, match=rf"model\.{key} is .* there and {value} here"):
            check_initialization(dataclasses.replace(trained, **{key: value}), tmp_path)
    meant = dataclasses.replace(trained, window=4, window_every=2, document_end=3, max_seq_len=16)
    (notice,) = check_initialization(meant, tmp_path)
    assert "model.window null -> 4" in notice
    assert "model.window_every null -> 2" in notice
    assert "model.document_end null -> 3" in notice
    assert "model.max_seq_len 8 -> 16" in notice


# -- ranks -----------------------------------------------------------------------------------------


def test_what_the_best_is_chosen_on_has_a_fingerprint(config: RunConfig, tmp_path: Path) -> None:
    def judged(
        fingerprint: str = "a", best_of: str = "validation", length: int = 8, masked: bool = False
    ) -> str:
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, max_seq_len=length),
            data=dataclasses.replace(
                config.data,
                tasks=(f"words={tmp_path}/words.jsonl",),
                mask_after_document_end=masked,
            ),
            checkpoint=dataclasses.replace(config.checkpoint, best_of=best_of),
        )
        known = {"the training samples": "x", "the validation split": fingerprint}
        return judged_by(changed, known | {"the validation_other split": "b"})

    (tmp_path / "words.jsonl").write_text("one", encoding="utf-8")
    found = [judged(), judged("b"), judged(best_of="other"), judged(best_of="words")]
    (tmp_path / "words.jsonl").write_text("two", encoding="utf-8")
    found += [judged(best_of="words"), judged(best_of="words", length=16)]
    found += [judged(length=16), judged(masked=True)]
    assert len(set(found)) == len(found)
    assert judged() == found[0] == "validation a in samples of 8"  # as in earlier checkpoints
    assert judged(best_of="words", masked=True) == judged(best_of="words")
