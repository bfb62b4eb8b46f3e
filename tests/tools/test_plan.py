"""``tools/plan.py`` as a user calls it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megaegpt.config import ModelConfig
from megaegpt.config.loading import load_config
from megaegpt.planning import published, roofline
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.plan import Machines, make_plan
from tests.generation.test_trained import save_gpt
from tools import plan

SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.num_heads=2", "model.vocab_size=500"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call the program; its exit code."""
    words = ["plan.py", "--config", "configs/gpt2_124m.yaml", *SMALL, *arguments]
    monkeypatch.setattr(sys, "argv", words)
    try:
        plan.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_plan_names_all_that_a_run_takes(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "16") == 0
    shown = capsys.readouterr().out
    for words in (
        "trainable parameters",
        "16 x NVIDIA H100 80GB HBM3 in 2 machines",
        "FLOP a step",
        "GiB a rank",
        "gradients",
        "s a step (products",
        "exposed communication",
        "% MFU",
        "tokens/s a GPU",
        "matrix products",
        "Megatron's 7.1B",
        "pipeline parallelism",
    ):
        assert words in shown
    assert "warning" not in shown


def test_a_plan_says_which_optimizer_it_counts(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "16") == 0
    shown = capsys.readouterr().out
    assert ", AdamW " in shown
    assert "Muon" not in shown
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "16", "optimizer.kind=muon") == 0
    shown = capsys.readouterr().out
    assert ", Muon " in shown
    assert "Muon's matrices 0 GB gathered and" in shown
    assert "iterations in bf16 on" in shown


def test_the_model_of_a_run_that_fine_tunes_is_that_of_its_weights(
    monkeypatch, capsys, tmp_path: Path
) -> None:
    weights = save_gpt(tmp_path / "gpt", max_seq_len=64)
    words = ["plan.py", "--config", "configs/finetune_chat.yaml", "--gpu", "h100", "--gpus", "1"]
    monkeypatch.setattr(sys, "argv", [*words, f"training.initialize_from={weights}"])
    plan.main()
    shown = capsys.readouterr().out
    # Adapters of rank 16 beside the 4 layers of 16 x 16 and the 2 of 16 x 64 of both blocks.
    assert f"gpt, {2 * 16 * (4 * (16 + 16) + 2 * (16 + 64)):,} trainable parameters" in shown
    assert "notice: the step, its memory and its time are those of records of 64 tokens" in shown
    assert "2,048 tokens = 32 samples of 64 = 1 ranks x 8 micro-steps x 4" in shown
    monkeypatch.setattr(sys, "argv", [*words, "training.initialize_from=nowhere/gpt"])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: training.initialize_from=nowhere/gpt: there is no folder nowhere/gpt\n"


def test_an_efficiency_takes_the_place_of_the_simulation(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "16", "--efficiency", "0.4") == 0
    shown = capsys.readouterr().out
    assert "s a step at 40% of the peak" in shown
    assert "MFU" not in shown


def test_a_share_of_the_peak_gives_no_time_where_parts_are_frozen(monkeypatch, capsys) -> None:
    freeze = ["--efficiency", "0.4", "training.freeze=[embeddings]"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "1", *freeze) == 0
    shown = capsys.readouterr().out
    assert "n/a: parts are frozen, and operations are counted as if everything were" in shown
    assert "tokens/s" not in shown


def test_more_gpus_than_samples_get_a_sample_each_and_it_is_said(monkeypatch, capsys) -> None:
    batch = ["training.micro_batch_size=4"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "128", *batch) == 0
    shown = capsys.readouterr().out
    assert "notice: training.global_batch_size=512, not 256" in shown
    assert "512 samples of 1,024 = 128 ranks x 1 micro-steps x 4" in shown
    asked = [*batch, "training.global_batch_size=256"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "128", *asked) == 2


def test_other_programs_runs_are_shown_beside_what_is_predicted(monkeypatch, capsys) -> None:
    runs = published.published_runs()[:1]
    monkeypatch.setattr(published, "published_runs", lambda: runs)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--published"])
    plan.main()
    shown = capsys.readouterr().out
    assert "Megatron 1.7B, H100 80GB HBM3" in shown
    assert "36,259" in shown


@pytest.mark.long
def test_alternatives_name_what_is_not_possible(monkeypatch, capsys) -> None:
    few = ["training.global_batch_size=16", "training.micro_batch_size=2"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "4", "--alternatives", *few) == 0
    shown = capsys.readouterr().out
    assert "recommended, with the largest micro-batch that fits, the fastest first:" in shown
    assert "MFU  exposed" in shown
    assert "tensor_parallel_size 4 is not possible: " in shown


@pytest.mark.long
def test_ranks_are_checked_for_the_same_collectives(monkeypatch, capsys) -> None:
    grid = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "16", "--check-ranks", "4", *grid) == 0
    shown = capsys.readouterr().out
    assert "4 of 16 ranks have their slices of 20 parameters, and make the same" in shown


@pytest.mark.parametrize("options", [["--published", "--gpus", "8"], ["--gpus", "8"], []])
def test_options_that_do_not_go_together_or_are_missing(
    options: list[str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *options])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 2
    words = "takes nothing else" if "--published" in options else "are required: --gpu"
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_what_does_not_fit_is_said_with_the_knobs_and_what_would(monkeypatch, capsys) -> None:
    batch = ["training.micro_batch_size=128", "training.global_batch_size=128"]
    wide = ["model.hidden_size=4096", "model.num_layers=3"]
    assert run(monkeypatch, "--gpu", "rtx3090", "--gpus", "1", *wide, *batch) == 0
    shown = capsys.readouterr().out
    assert "warning: " in shown
    for knob in ("training.micro_batch_size", "training.activation_checkpointing", "--gpus"):
        assert knob in shown.split("warning: ")[1]
    assert "the fastest first:" in shown


def test_a_speed_that_is_not_known_is_asked_for(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--gpu", "cpu", "--gpus", "2") == 0
    assert "unknown: give the GPU's peak in fp32 by --tflops" in capsys.readouterr().out


@pytest.mark.long
def test_an_automatic_micro_batch_is_the_largest_that_fits(monkeypatch, capsys) -> None:
    batch = ["training.micro_batch_size=auto", "training.global_batch_size=64"]
    assert run(monkeypatch, "--gpu", "rtx3090", "--gpus", "1", *batch) == 0
    shown = capsys.readouterr().out
    assert "training.micro_batch_size=auto is " in shown
    assert "90% of NVIDIA GeForce RTX 3090" in shown
    assert "warning" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h42", "--gpus", "1"], "error: --gpu h42 is not in the table: choose one of"),
        (["--gpu", "h100", "--gpus", "3"], "training.global_batch_size"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus"),
    ],
)
def test_wrong_arguments_exit_with_2(monkeypatch, capsys, arguments: list[str], words: str) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_roofline_has_the_parts_of_a_step_and_what_it_assumes(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "2", "--roofline") == 0
    shown = capsys.readouterr().out
    for words in (
        "products with weights",
        "attention",
        "head between its products",
        "optimizer",
        "communication",
        "MFU with nothing compiled",
        "assumed, not measured",
    ):
        assert words in shown


def test_what_is_offloaded_has_no_time_in_a_roofline(monkeypatch, capsys) -> None:
    offload = ["parallel.zero_stage=3", "parallel.offload=optimizer"]
    assert run(monkeypatch, "--gpu", "h100", "--gpus", "2", "--roofline", *offload) == 0
    shown = capsys.readouterr().out
    for part in ("optimizer, AdamW", "communication, if nothing hides it"):
        (row,) = (line for line in shown.splitlines() if line.startswith(part))
        assert row.removeprefix(part).split() == ["n/a"]


def test_alternatives_say_what_is_offloaded() -> None:
    offload = ["parallel.zero_stage=3", "parallel.offload=optimizer"]
    config = load_config("configs/gpt2_124m.yaml", [*SMALL, *offload])
    machines = Machines(find_accelerator("h100", 1), 1, 1)
    heading, table = plan.compare([make_plan(config, machines)], {}, lambda _: None)
    assert "the fastest first, those whose time is not known last:" in heading
    assert "offload" in table.splitlines()[0].split()
    assert "optimizer" in table.splitlines()[-1].split()


def test_the_sizes_of_gpt2_need_no_configuration(monkeypatch, capsys) -> None:
    small = {"tiny": roofline.gpt2_runs()["GPT-2 124M"]}
    tiny = ModelConfig(vocab_size=500, hidden_size=64, num_layers=1, num_heads=2)
    small["tiny"] = replace(small["tiny"], model=tiny)
    monkeypatch.setattr(roofline, "gpt2_runs", lambda: small)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpu", "h100", "--gpus", "1", "--roofline"])
    plan.main()
    shown = capsys.readouterr().out
    assert "the most MFU on one NVIDIA H100" in shown
    assert "65,536" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--gpus", "8"], "--gpus"),
        (["--gpus", "1", "--per-node", "1", "--tflops", "100"], "--per-node, --tflops"),
        (["--gpus", "1", "--efficiency", "0.4", "--alternatives"], "--efficiency, --alternatives"),
    ],
)
def test_options_of_a_run_are_refused_where_the_sizes_of_gpt2_are_shown(
    options: list[str], named: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpu", "h100", "--roofline", *options])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 2
    assert f"on one GPU and takes no {named}: name a run by --config" in capsys.readouterr().err
