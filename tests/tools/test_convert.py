"""tools/convert.py: import, export, list and reshape, as they are typed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor

import tools.convert
from megaegpt.arguments import ArgumentParser
from megaegpt.config import EncoderConfig, LoRAConfig, ModelConfig, ParallelConfig
from megaegpt.config.run import RunConfig
from megaegpt.data.tokenizers.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    load_tokenizer,
    save_tokenizer,
)
from megaegpt.errors import CheckpointError
from megaegpt.interop.peft import peft_base
from megaegpt.model.adapter_files import Base, read_adapter, save_adapter
from megaegpt.model.adapters import adapter_state, add_adapters
from megaegpt.model.build import build_model, empty_model
from megaegpt.model.parts import freeze
from megaegpt.model.weights import (
    WEIGHTS,
    load_weights,
    read_weights_config,
    save_weights,
    tensors_digest,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.checkpoint.reshaping import reshape
from megaegpt.training.engine.engine import Engine
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import Curve, advance, nats, run_config
from tests.tiny.tokenizers import trained_tokenizer

ROOT = Path(__file__).parents[2]
GRID = ProcessGrid()
GPT = ModelConfig(vocab_size=100, max_seq_len=8, hidden_size=16, num_layers=2, num_heads=4)
SAVED, END, BATCH = 3, 6, 4
TEMPLATE = "{{ bos_token }}{{ 'tuned' }}\n"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A GPT-2-shaped model with biases that are not 0."""
    model = build_model(GPT, GRID, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    save_weights(model, tmp_path / "weights", GRID)
    return tmp_path / "weights"


class _Convert:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> str:
        """What it prints."""
        self._monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        tools.convert.main()
        return self._capsys.readouterr().out

    def fails(self, *words: str | Path) -> str:
        """The one line it prints instead."""
        with pytest.raises(SystemExit) as caught:
            self(*words)
        assert caught.value.code == 2
        said = self._capsys.readouterr().err
        assert said.count("\n") == 1
        return said


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> _Convert:
    return _Convert(monkeypatch, capsys)


class _Accepted(BaseException):
    """The command line is right; nothing has been done yet."""


def test_what_the_help_and_the_documentation_say_to_type_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    text = f"{tools.convert.__doc__}\n{page}".replace("\\\n", " ")
    commands = re.findall(r"^.*tools/convert\.py (.+)$", text, re.MULTILINE)
    assert len(commands) > 10
    parse = ArgumentParser.parse_args

    def parse_only(self: ArgumentParser) -> None:
        parse(self)
        raise _Accepted

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["convert.py", *shlex.split(command, comments=True)])
        with pytest.raises(_Accepted):
            tools.convert.main()


def test_export_and_import_are_inverse(convert: _Convert, weights: Path, tmp_path: Path) -> None:
    said = convert("export", weights, tmp_path / "theirs")
    assert (
        said
        == f"{tmp_path / 'theirs'}: in Hugging Face's form, a GPT-2 in fp32, without a tokenizer\n"
    )
    said = convert("import", tmp_path / "theirs", tmp_path / "back")
    assert f"{tmp_path / 'back'}: weights" in said
    assert "2 layers of width 16, 4 heads" in said
    first, back = (load_file(f / "model.safetensors") for f in (weights, tmp_path / "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)


def test_other_models_are_exported_as_they_are(convert: _Convert, tmp_path: Path) -> None:
    config = ModelConfig(**{**vars(GPT), "attention": "latent", "document_end": 7})
    save_weights(build_model(config, GRID), tmp_path / "weights", GRID)
    said = convert("export", tmp_path / "weights", tmp_path / "out")
    assert said.endswith(
        "as safetensors in the type that it has; it is no model of Hugging Face's: "
        "GPT-2 has no attention=latent\n"
    )
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "weights" / name).read_bytes()


def test_a_llama_goes_to_a_gguf_file_and_back(convert: _Convert, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    llama = {"norm": "rms_norm", "mlp": "swiglu", "bias": False, "positions": "rotary"}
    weights, file = tmp_path / "weights", tmp_path / "model.gguf"
    save_weights(build_model(ModelConfig(**{**vars(GPT), **llama}), GRID), weights, GRID)
    said = convert("export", weights, file, "--dtype", "fp32")
    notice, wrote = said.splitlines()
    assert "without a tokenizer" in notice
    assert wrote == f"{file}: a GGUF file in fp32"
    assert f"{file}: a GGUF file, Llama" in convert("list", file)
    convert("import", file, "--output", tmp_path / "back")
    first, back = (load_file(f / "model.safetensors") for f in (weights, tmp_path / "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    assert "model.gguf exists already" in convert.fails("export", weights, file)
    other = tmp_path / "other.gguf"
    assert "is written in fp32 or fp16" in convert.fails("export", weights, other, "--dtype=bf16")
    assert "name the new folder once" in convert.fails("import", file)
    assert not other.exists()


def test_mistakes_are_one_line(convert: _Convert, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "describes no model in Hugging Face's form" in convert.fails("import", weights, out)
    assert "no folder of a model in Hugging Face's form" in convert.fails("import", tmp_path, out)
    assert "absent is no model in another form" in convert.fails("import", tmp_path / "absent", out)
    assert "holds no weights" in convert.fails("export", tmp_path / "absent", out)
    assert "weights exists already" in convert.fails("export", weights, weights)
    assert "holds no weights" in convert.fails("list", tmp_path / "absent")
    assert not out.exists()
    convert("export", weights, out)
    assert "have no checksums to verify" in convert.fails("list", out, "--verify")


def test_what_was_never_imported_is_exported_no_more_than_it_is_named(
    convert: _Convert, tmp_path: Path
) -> None:
    theirs, file, out = tmp_path / "theirs", tmp_path / "a.gguf", tmp_path / "out"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    file.write_bytes(b"GGUF")
    for source in (theirs, file, "smollm2-135m", "hf:someone/model"):
        said = convert.fails("export", source, out)
        assert f"{source} is a model in another form: import it first" in said


def test_list_finds_damaged_weights(convert: _Convert, weights: Path) -> None:
    said = convert("list", weights, "--verify")
    assert "weights, whatever the parallelism, verified" in said
    assert "stack.blocks.1.mlp.down.weight          16 x 64" in said
    path = weights / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "16 x 64" in convert("list", weights)
    assert f"error: {path} is damaged" in convert.fails("list", weights, "--verify")


def _save_adapter(folder: Path, base: Base) -> None:
    lora = LoRAConfig(rank=2, alpha=6.0)
    model = build_model(GPT, GRID)
    add_adapters(model, lora)
    for _, parameter in adapter_state(model):
        parameter.data.normal_()
    save_adapter(model, folder, GRID, lora, base)


def test_adapters_are_merged_and_go_to_peft_and_back(
    convert: _Convert, weights: Path, tmp_path: Path
) -> None:
    adapter, again, merged = (tmp_path / name for name in ("adapter", "again", "merged"))
    _save_adapter(adapter, Base("../weights", tensors_digest(weights)))
    assert "an adapter" in convert("list", adapter, "--verify")
    convert("merge", adapter, merged)  # the base is found beside it, where the adapter says
    assert "in PEFT's form, of a GPT-2" in convert("export", adapter, tmp_path / "peft")
    convert("import", tmp_path / "peft", again, "--base", weights)
    convert("merge", again, tmp_path / "merged_again", "--base", weights)
    ours, theirs = (load_file(tmp_path / n / WEIGHTS) for n in ("merged", "merged_again"))
    plain = load_file(weights / WEIGHTS)
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, rtol=1e-6, atol=1e-6)
        is_adapted = (name.endswith(".weight") and ".attention." in name) or ".mlp." in name
        assert torch.equal(tensor, plain[name]) != (is_adapted and name.endswith(".weight"))
    assert "merge it first" in convert.fails("export", adapter, tmp_path / "file.gguf")
    failed = convert.fails("import", weights, tmp_path / "x", "--base", weights)
    assert "--base is for adapters of PEFT's" in failed


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
    ],
)
def test_an_adapter_of_pefts_brings_its_chat_template(
    convert: _Convert, weights: Path, tmp_path: Path, file: str, content: str
) -> None:
    _save_adapter(tmp_path / "adapter", Base(str(weights), tensors_digest(weights)))
    convert("export", tmp_path / "adapter", tmp_path / "peft")
    (weights / CHAT_TEMPLATE_FILE).write_text("{{ 'of the base' }}")
    for name, wanted in (("without", "{{ 'of the base' }}"), ("with", TEMPLATE)):
        convert("import", tmp_path / "peft", tmp_path / name)
        assert (tmp_path / name / CHAT_TEMPLATE_FILE).read_text() == wanted
        (tmp_path / "peft" / file).write_text(content)


def test_a_base_of_the_hub_is_named_to_peft_and_by_it_as_peft_does(
    convert: _Convert, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _save_adapter(Path("adapter"), Base("hf:owner/name-1.5B", tensors_digest(weights)))
    convert("export", "adapter", "peft")
    named = json.loads(Path("peft/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "owner/name-1.5B"
    assert peft_base(Path("peft")) == "hf:owner/name-1.5B"
    shutil.copytree(weights, "owner/name-1.5B")
    convert("import", "peft", "again")  # a folder of this name goes before it
    assert read_adapter(Path("again")).base.source == "owner/name-1.5B"


# -- checkpoints ----------------------------------------------------------------------------------


def _config(tp: int) -> RunConfig:
    training = {"global_batch_size": BATCH, "micro_batch_size": 1}
    encoder = EncoderConfig(source="encoder")
    model = {"kind": "egpt", "num_kv_heads": 1, "tied_embeddings": False, "encoder": encoder}
    parallel = {"tensor_parallel_size": tp, "zero_stage": 0}  # cut and joined by this project
    return run_config(model=model, parallel=parallel, training=training)


def _engine(config: RunConfig, grid: ProcessGrid) -> Engine:
    model = build_model(config.model, grid, seed=3)
    freeze(model, ["norm"])
    return Engine(model, grid, config, nats)


def _train_and_save(folder: Path) -> None:
    """Two checkpoints over two tensor-parallel ranks."""
    config, grid = _config(tp=2), grid_for(2)
    engine = _engine(config, grid)
    parts = {"weights": lambda copies: lambda part: save_weights(engine.model, part, grid)}
    manager, state = CheckpointManager(folder, keep=2), {"global_batch_size": BATCH}
    for step in (SAVED - 1, SAVED):
        advance(engine, config, range(step - 1, step))
        manager.save(engine, step, state, parts)
    manager.mark_best(SAVED, grid)
    engine.close()


def _resume(tp: int, folders: list[Path]) -> list[Curve]:
    config, curves = _config(tp), []
    for folder in folders:
        engine = _engine(config, grid_for(tp))
        CheckpointManager(folder, keep=1).load(engine)
        curves.append(advance(engine, config, range(SAVED, END)))
        engine.close()
    return curves


def _assert_equal(ours: Curve, theirs: Curve) -> None:
    assert ours.losses == theirs.losses
    assert ours.norms == theirs.norms
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)


def _split(merged: Path, folder: Path) -> None:
    """Over two tensor-parallel ranks again; what cannot be done is refused."""
    grid = grid_for(2)
    reshape(merged / "step_00000003", folder, grid, zero_stage=3)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        reshape(merged / "step_00000003", folder, grid)


def _reshape_what_shared_its_samples(folder: Path) -> None:
    parallel = {"context_parallel_size": 2, "zero_stage": 1}
    training = {"global_batch_size": 1, "micro_batch_size": 1}
    config, grid = run_config(parallel=parallel, training=training), grid_for(1, 2)
    engine = Engine(build_model(config.model, grid), grid, config, nats)

    def save(part: Path) -> None:
        if grid.is_main:
            save_weights(engine.model, part, grid)

    parts = {"weights": lambda copies: save}
    state = {"step": 1, "global_batch_size": 1}
    saved = CheckpointManager(folder / "run", keep=1).save(engine, 1, state, parts)
    reshaped = reshape(saved, folder / "reshaped", grid_for(1))
    assert CheckpointManager(reshaped.parent, keep=1).load(engine) == state
    engine.close()


def test_a_checkpoint_of_fewer_samples_than_ranks_is_reshaped(
    distributed: Distributed, tmp_path: Path
) -> None:
    """Ranks that share samples are data-parallel there, and have none of their own."""
    distributed(2, _reshape_what_shared_its_samples, tmp_path)


@pytest.mark.long
def test_checkpoints_are_listed_merged_and_split_with_their_optimizer_state(
    distributed: Distributed, convert: _Convert, tmp_path: Path
) -> None:
    saved, merged = tmp_path / "run" / "checkpoints", tmp_path / "merged"
    distributed(2, _train_and_save, saved)

    listed = convert("list", tmp_path / "run", "--verify")
    assert "step_00000003 latest, best" in listed
    assert listed.count("tensor parallel 2 x data parallel 1, ZeRO stage 0, fp32, verified") == 2
    checkpoint = saved / "step_00000003"
    listed = convert("list", checkpoint)
    assert "global_batch_size=4" in listed
    assert "stack.blocks.0.attention.query.weight   32 x 32         rows over 2" in listed
    assert "stack.blocks.0.attention.key.weight     8 x 32          on each of 2" in listed
    assert "stack.blocks.0.attention.output.weight  32 x 32         columns over 2" in listed

    command = [sys.executable, "tools/convert.py", "reshape", str(saved / "best"), str(merged)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step_00000003 latest" in convert("list", merged)
    name = Path("weights") / "model.safetensors"
    assert (merged / checkpoint.name / name).read_bytes() == (checkpoint / name).read_bytes()
    _assert_equal(*distributed(1, _resume, 1, [merged, saved])[0])

    split = tmp_path / "split"
    distributed(2, _split, merged, split)
    _assert_equal(*distributed(2, _resume, 2, [split, saved])[0])

    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    listed = convert("list", tmp_path / "run", "--verify")
    assert f"step_00000003 latest, best  DAMAGED: {path} has " in listed
    assert f"error: {path} has " in convert.fails("list", checkpoint, "--verify")


def _train_in_bf16(stage: int, folder: Path) -> dict[str, Tensor]:
    """The masters by name, in whole, of a checkpoint in ``folder``; some are frozen."""
    config = dataclasses.replace(
        _config(tp=2), parallel=ParallelConfig(tensor_parallel_size=2, zero_stage=stage)
    )
    training = dataclasses.replace(config.training, precision="bf16")
    config, grid = dataclasses.replace(config, training=training), grid_for(2)
    engine = _engine(config, grid)
    parts = {"weights": lambda copies: lambda part: save_weights(engine.model, part, grid)}
    advance(engine, config, range(3))
    CheckpointManager(folder, keep=1).save(engine, 3, {}, parts)
    masters = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            own = safe_get_full_fp32_param(parameter)
            masters[name] = unshard(
                own.view(getattr(parameter, "ds_shape", parameter.shape)), spec_of(parameter), grid
            ).clone()
    engine.close()
    return masters


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_masters_are_the_fp32_weights_that_the_optimizer_has(
    distributed: Distributed, convert: _Convert, tmp_path: Path, stage: int
) -> None:
    masters = distributed(2, _train_in_bf16, stage, tmp_path / "run")[0]
    save_tokenizer(trained_tokenizer(), tmp_path / "run" / "step_00000003" / "weights")
    said = convert("masters", tmp_path / "run", tmp_path / "masters")
    assert load_tokenizer(tmp_path / "masters").fingerprint == trained_tokenizer().fingerprint
    assert "the fp32 weights of step 3, trained in bf16" in said
    rounded = load_file(tmp_path / "run" / "step_00000003" / "weights" / "model.safetensors")
    exported = load_file(tmp_path / "masters" / "model.safetensors")
    assert exported.keys() == rounded.keys() > masters.keys()
    for name, value in exported.items():
        assert value.dtype == torch.float32
        assert value.equal(masters.get(name, rounded[name].float())), name
        assert value.bfloat16().equal(rounded[name]), name
    assert any(not value.equal(rounded[name].float()) for name, value in exported.items())
    config, _ = read_weights_config(tmp_path / "masters")
    model = empty_model(config, ProcessGrid())
    load_weights(model, tmp_path / "masters", ProcessGrid())  # as training.initialize_from does
    assert all(parameter.equal(exported[name]) for name, parameter in model.named_parameters())
    written = {path.name for path in (tmp_path / "masters").iterdir()}
    assert written == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "exists already" in convert.fails("masters", tmp_path / "run", tmp_path / "masters")


def test_on_a_cpu_deepspeed_says_nothing_among_what_masters_says(tmp_path: Path) -> None:
    """It is imported by another way than a run's, which imports an engine."""
    command = [sys.executable, "tools/convert.py", "masters", tmp_path / "absent", tmp_path / "new"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)  # which this process has by now
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "absent" in done.stderr
    assert done.stdout == ""
