"""Shipped experiments are valid and say what they share; wrong ones are refused in one message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megaegpt.errors import ConfigError
from tools.experiment.plan import decoder_values, load_plan, make_run

CONFIGS = Path(__file__).parents[3] / "configs" / "experiments"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_variants_differ_in_the_model_only_and_share_steps_and_order(path, tmp_path):
    plan = load_plan(path)
    runs = {v: make_run(decoder_values(plan, v), tmp_path) for v in plan.variants}
    base = runs[plan.baseline]
    frozen = base.training.freeze
    for run in runs.values():
        assert replace(run.training, freeze=frozen) == base.training
        assert replace(run.data, predictions=base.data.predictions) == base.data
        assert run.model.sample_len == base.model.sample_len
    assert base.checkpoint.interval == base.training.eval_interval
    if path.name == "smollm2.yaml":  # what a memory is worth, whose zero is the encoder itself
        memories = set(runs) - {"deepgpt", "original"}
        assert not runs["original"].model.egpt.token_memory
        for name, run in runs.items():
            assert run.model.egpt.token_memory or name not in memories
            assert (run.optimizer == base.optimizer) == (name in memories)
            assert set(run.training.freeze) | {"sink"} == set(frozen) or name not in memories
        return
    assert all(
        (run.training, run.optimizer) == (base.training, base.optimizer) for run in runs.values()
    )
    assert base.model.kind == "deepgpt"
    assert runs["egpt_improved"].model.egpt.local_attention
    if "ablations" in path.name:
        return
    assert {"deepgpt", "egpt_no_history", "egpt"} <= set(runs)
    assert runs["egpt_no_history"].model.egpt.history is False
    assert not runs["egpt"].model.egpt.token_memory


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_ablations_undo_one_thing_each(size, tmp_path):
    plan = load_plan(CONFIGS / f"{size}_ablations.yaml")
    runs = {v: make_run(decoder_values(plan, v), tmp_path) for v in plan.variants}
    improved = runs["egpt_improved"].model
    assert runs["no_adapter_residual"].model == replace(
        improved, egpt=replace(improved.egpt, adapter_residual=False)
    )
    assert not runs["no_local_attention"].model.egpt.local_attention
    assert len({run.model for run in runs.values()}) == len(runs)


def test_everything_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "corpora: {a: {trian: [x]}}\nbaseline: b\nseeds: 0\nbudgets: [flops]\ncontrols: {c: e}\n"
        "variants: {c: {base: d}, d: {}}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_plan(path)
    wrong = ["corpora.a.trian", "baseline=b is none", "seeds=0", "must hold steps", "encoder"]
    wrong.append("controls: e is none of variants")
    for words in [*wrong, "variants.c.base=d is none of the variants above it"]:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("runs_of: bible", "runs_of: psalms", "runs_of=psalms: no corpus above it trains"),
        (
            "runs_of: bible",
            "runs_of: bible\n    train: [moby_dick]",
            "give held_out, and leave train out",
        ),
        ("readings: [dense]", "readings: [x]", "readings: x: not in readings"),
        ("  dense: {", "  4096: {", r"wrong\.yaml: readings: 4096 is no name: quote it"),
        ("  bible: {", "  1984: {", r"wrong\.yaml: corpora: 1984 is no name: quote it"),
        ("  egpt_no_history:", "  512:", r"wrong\.yaml: variants: 512 is no name: quote it"),
        ("{egpt: egpt_no", "{512: egpt_no", r"wrong\.yaml: controls: 512 is no name: quote it"),
        ("{egpt_improved: [", "{8: [", r"wrong\.yaml: memory_lengths: 8 is no name: quote it"),
        ("  bible: {", "  encoder: {", r"corpora\.encoder: what the encoder is pretrained on is"),
        ("overlap: 8", "overlap: -8", r"readings\.behind_8\.overlap=-8 must not be negative"),
        ("overlap: 8", "context: -3", r"readings\.behind_8\.context=-3 must be greater than 0"),
        ("overlap: 8", "rope_scaling: {factor: 2.0}", r"behind_8\.rope_scaling has no kind"),
        ("overlap: 8", "rope_scaling: {kind: yarnn}", r"behind_8\.rope_scaling\.kind"),
        ("overlap: 8", "rope_scaling: {factr: 2.0}", r"behind_8\.rope_scaling\.factr"),
        ("report_tokens: 193", "report_tokens: -193", r"report_tokens=-193 must be greater than"),
        ("{egpt_improved: [", "{egpt_improvd: [", "memory_lengths: egpt_improvd is none of"),
        ("{egpt_improved: [", "{egpt: [", r"memory_lengths\.egpt: the variant has no token mem"),
        ("[16, 64]", "[a]", r"memory_lengths\.egpt_improved must be a list of whole numbers"),
        ("memory_tokens: 256", "memory_tokens: 15", "memory_tokens: 15 is less than a chunk of 16"),
        ("[16, 64]", "[64, 15]", r"memory_lengths\.egpt_improved: 15 is less than a chunk of 16"),
        ("steps: 4,", "steps: 4, patience: 1,", r"deepgpt: training\.patience=1 may end runs"),
        ("steps: 6,", "steps: 6, patience: 1,", r"encoder\.run: training\.patience=1 may end runs"),
        (
            "model: {kind: egpt}",
            "{model: {kind: egpt}, training: {steps: 12}}",
            r"wrong\.yaml: variants\.egpt: training\.steps=12, and 4 of the baseline deepgpt",
        ),
        (
            "model: {kind: egpt}",
            "model: {kind: egpt, egpt: {num_chunks: 2}}",
            r"wrong\.yaml: variants\.egpt: windows of 32 tokens .*, and 64 of the baseline deepgpt",
        ),
        (
            "model: {kind: egpt}",
            "model: {kind: gpt, max_seq_len: 64}",
            r"wrong\.yaml: variants\.egpt: model\.kind=gpt reads no encoder",
        ),
        (
            "model: {kind: deepgpt}",
            "model: {kind: gpt, max_seq_len: 64}",
            r"wrong\.yaml: variants\.deepgpt: model\.kind=gpt reads no encoder",
        ),
        (
            "{train: [king_james_bible], train_share: 0.8}",
            "",
            r"corpora\.bible\.train names no text: there is nothing to train on",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(tmp_path, right, wrong, words):
    path = tmp_path / "wrong.yaml"
    path.write_text((CONFIGS / "smoke.yaml").read_text().replace(right, wrong))
    with pytest.raises(ConfigError, match=words):
        load_plan(path)


def test_what_is_trained_and_chunks_of_another_size_may_differ(tmp_path):
    path = tmp_path / "plan.yaml"
    changed = (
        "{training: {freeze: [head]}, model: {kind: egpt, egpt: {chunk_size: 8, num_chunks: 8}}}"
    )
    whole = (CONFIGS / "smoke.yaml").read_text()
    path.write_text(whole.replace("model: {kind: egpt}", changed))
    assert "freeze" in load_plan(path).variants["egpt"]["training"]


def test_equal_steps_come_before_what_is_scaled_from_them(tmp_path):
    path = tmp_path / "plan.yaml"
    whole = (CONFIGS / "smoke.yaml").read_text()
    path.write_text(whole.replace("[steps, flops]", "[time, steps]"))
    assert load_plan(path).budgets == ("steps", "time")


def test_a_base_left_empty_is_none(tmp_path):
    path = tmp_path / "plan.yaml"
    whole = (CONFIGS / "smoke.yaml").read_text()
    path.write_text(whole.replace("\n  egpt:\n", "\n  egpt:\n    base:\n"))
    assert decoder_values(load_plan(path), "egpt") == decoder_values(
        load_plan(CONFIGS / "smoke.yaml"), "egpt"
    )


def test_a_variant_may_be_based_on_one_that_changes_nothing(tmp_path):
    plan = load_plan(CONFIGS / "smoke.yaml")
    plan = replace(plan, variants={"a": None, "b": {"base": "a"}})
    assert decoder_values(plan, "b") == decoder_values(plan, "a")


def test_a_wrong_key_of_a_variant_is_named(tmp_path):
    path = tmp_path / "wrong.yaml"
    text = (CONFIGS / "smoke.yaml").read_text().replace("local_attention", "local_atention")
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"variants\.egpt_improved: model\.egpt\.local_atention"):
        load_plan(path)


def test_a_variant_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("variants: {a: 3}\nbaseline: a\n")
    with pytest.raises(
        ConfigError, match=r"variants\.a must be a mapping of keys to values, not 3"
    ):
        load_plan(path)
