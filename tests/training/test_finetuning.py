"""Fine-tuning on instructions: the answers alone, from any weights, as exactly as pretraining."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import (
    DataConfig,
    EGPTConfig,
    EncoderConfig,
    GenerationConfig,
    ModelConfig,
)
from megaegpt.config.data import InstructionConfig
from megaegpt.config.run import RunConfig
from megaegpt.data.instruction.named_templates import NAMED_TEMPLATES
from megaegpt.data.instruction.records import Instruction, InstructionDataset
from megaegpt.data.instruction.rows import InstructionSamples, trim_padding
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import CheckpointError, ConfigError, DataError, LaunchError
from megaegpt.generation.generator import sample_text
from megaegpt.interop.export import export_huggingface
from megaegpt.model.build import build_model
from megaegpt.model.calling import SequenceInputs
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.report.runs import read_run
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.finetuning import (
    InstructionData,
    finetune,
    finetuning_config,
    hold_out,
    model_of_weights,
)
from megaegpt.training.run_data import PretrainingData
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, losses, run_config, validation_losses
from tests.tiny.tokenizers import changed

TOKENIZER = Tokenizer.load()
LENGTH, CHUNK = 96, 32
GPT = ModelConfig(max_seq_len=LENGTH, hidden_size=16, num_layers=1, num_heads=2)
EGPT = dataclasses.replace(
    GPT, kind="egpt", bias=False, egpt=EGPTConfig(num_chunks=3, chunk_size=CHUNK)
)
RECORDS = [
    {"instruction": f"Say {word}{mark}", "input": "", "output": f"{word} " * count}
    for word in ("yes", "no")
    for mark in ".!"
    for count in (1, 2, 3, 9, 11)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, and weights of a gpt and of an egpt over it."""
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    grid = ProcessGrid()
    gpt = build_model(GPT, grid, seed=1)
    save_weights(gpt, folder / "gpt", grid)
    egpt = dataclasses.replace(EGPT, encoder=EncoderConfig(source=str(folder / "gpt")))
    fingerprint = FrozenEncoder(gpt).fingerprint  # type: ignore[arg-type]
    extra = {"encoder_fingerprint": fingerprint}
    save_weights(build_model(egpt, grid, seed=2), folder / "egpt", grid, extra)
    return folder


def _with_and_without_sharing(corpus: Path, folder: Path) -> None:
    for ranks in (1, 2):
        config = _config(
            "egpt",
            corpus,
            folder / str(ranks),
            parallel={"context_parallel_size": ranks},
            training={"global_batch_size": 4, "micro_batch_size": 2},
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finetune(config, grid_for(1, ranks))


@pytest.mark.long
def test_ranks_that_share_the_chunks_of_records_learn_the_same(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """Most windows of records are shorter than the model's, and their chunks seldom divide."""
    chunks = EGPTConfig(num_chunks=4, chunk_size=16, token_memory=True)
    source = EncoderConfig(source=str(corpus / "gpt"))
    egpt = dataclasses.replace(EGPT, egpt=chunks, encoder=source)
    grid = ProcessGrid()
    gpt = build_model(GPT, grid, seed=1)
    extra = {"encoder_fingerprint": FrozenEncoder(gpt).fingerprint}  # type: ignore[arg-type]
    save_weights(build_model(egpt, grid, seed=2), tmp_path / "egpt", grid, extra)
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    distributed(2, _with_and_without_sharing, tmp_path, tmp_path / "runs")
    expected = losses(tmp_path / "runs" / "1")
    assert losses(tmp_path / "runs" / "2") == pytest.approx(expected, rel=1e-4)


def _config(kind: str, corpus: Path, folder: Path, packing: bool = False, **changes: Any) -> Any:
    config = run_config("gpt", corpus, folder, **changes)
    records = InstructionConfig(
        train=(str(corpus / "records.json"),), held_out=0.2, packing=packing
    )
    return dataclasses.replace(
        config,
        model=ModelConfig(),
        data=DataConfig(instructions=records),
        training=dataclasses.replace(config.training, initialize_from=str(corpus / kind)),
    )


def _finetune(config: RunConfig, **options: Any) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        finetune(config, grid_for(config.parallel.tensor_parallel_size), **options)
    return shown.getvalue()


def _straight(kind: str, corpus: Path, folder: Path, packing: bool, tp_size: int) -> str:
    config = _config(kind, corpus, folder, packing, parallel={"tensor_parallel_size": tp_size})
    return _finetune(config)


def _from_theirs(corpus: Path, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAEGPT_CACHE", str(folder / "cache"))
        return _straight("theirs", corpus, folder, True, 1)


def _interrupted(corpus: Path, folder: Path) -> str:
    config = _config("gpt", corpus, folder, packing=True)
    generation = GenerationConfig(prompt="Say {yes}.", max_new_tokens=2)
    config = dataclasses.replace(config, generation=generation)
    _finetune(config, stops=StopAfter(4))
    return _finetune(config, resume=True, sample_text=sample_text)


def _own_validation(corpus: Path, folder: Path) -> str:
    config = _config("gpt", corpus, folder)
    validation = (str(folder / f"{grid_for(1).rank}.json"),)
    records = dataclasses.replace(config.data.instructions, validation=validation)
    data = dataclasses.replace(config.data, instructions=records)
    try:
        _finetune(dataclasses.replace(config, data=data))
    except LaunchError as error:
        return str(error)
    return "no error"


def test_ranks_that_would_be_evaluated_on_other_records_do_not_start(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """Of other numbers of them, some ranks would wait for the others for ever."""
    for rank, count in enumerate((2, 12)):
        (tmp_path / f"{rank}.json").write_text(json.dumps(RECORDS[:count]))
    for error in distributed(2, _own_validation, corpus, tmp_path):
        assert error.startswith("ranks were not given the same: the fingerprint of the validation")
        assert "training" not in error


@pytest.mark.parametrize("kind", ["gpt", pytest.param("egpt", marks=pytest.mark.long)])
def test_batches_and_losses_do_not_depend_on_the_number_of_ranks(
    kind: str,
    corpus: Path,
    tmp_path: Path,
    distributed: Distributed,
) -> None:
    found = {}
    for ranks, tp_size in [(1, 1), (4, 2)]:
        folder = tmp_path / f"{ranks}"
        shown, *_ = distributed(ranks, _straight, kind, corpus, folder, kind == "gpt", tp_size)
        assert "16 training records" in shown
        assert "4 validation records" in shown
        found[ranks] = losses(folder), validation_losses(folder)
    for over_ranks, alone in zip(found[4], found[1], strict=True):
        assert over_ranks == pytest.approx(alone, rel=1e-5)
    assert found[1][1][6] < found[1][1][3] < 10.9


def test_weights_of_hugging_face_are_tuned_as_ours(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    export_huggingface(corpus / "gpt", corpus / "theirs")
    distributed(1, _straight, "gpt", corpus, tmp_path / "ours", True, 1)
    distributed(1, _from_theirs, corpus, tmp_path / "theirs")
    assert losses(tmp_path / "theirs") == losses(tmp_path / "ours")


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _straight, "gpt", corpus, tmp_path / "straight", True, 1)
    (shown,) = distributed(1, _interrupted, corpus, tmp_path / "interrupted")
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "straight")
    assert validation_losses(tmp_path / "interrupted") == validation_losses(tmp_path / "straight")
    assert "### Instruction:\nSay {yes}.\n\n### Response:\n" in shown  # the sample's prompt


def test_tokens_seen_are_those_of_the_records_and_not_of_full_windows(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _straight, "gpt", corpus, tmp_path / "run", False, 1)
    mean = re.search(r"rows of (\d+) tokens on average", shown)
    run = read_run(tmp_path / "run")
    samples = run.config.batches.samples_before(run.steps)
    assert mean is not None
    assert int(mean[1]) < LENGTH / 2
    assert run.tokens_before(run.steps) == pytest.approx(samples * int(mean[1]), abs=samples / 2)


def _go_on_otherwise(corpus: Path, folder: Path, packing: bool) -> list[str]:
    """Three steps of 8 rows, three of 2, and three whose rows are packed otherwise."""
    shown = []
    for number, (size, packed) in enumerate(((8, packing), (2, packing), (2, not packing))):
        config = _config(
            "gpt",
            corpus,
            folder,
            packed,
            training={"global_batch_size": size, "steps": 9},
            checkpoint={"keep": 3},
        )
        shown.append(_finetune(config, resume=number > 0, stops=StopAfter(3)))
    return shown


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_of_another_batch_or_packing_goes_on_behind_the_rows_that_were_seen(
    packing: bool, corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    ((_, smaller, repacked),) = distributed(1, _go_on_otherwise, corpus, tmp_path, packing)
    states = [
        Manifest.read(tmp_path / "checkpoints" / f"step_{step:08d}").trainer for step in (3, 6, 9)
    ]
    assert "notice: the data goes on behind the 24 samples that were drawn" in smaller
    assert [state["samples"] for state in states[:2]] == [24, 30]
    rows, others = states[0]["tokens_per_sample"], states[2]["tokens_per_sample"]
    assert (rows < others) != packing
    first = math.ceil(30 * rows / others)
    assert states[2]["samples"] == first + 6
    assert f"behind as many tokens as were seen, at sample {first}" in repacked
    run = read_run(tmp_path)
    seen = [24 * rows, 30 * rows, 30 * rows + 6 * others]
    assert [run.tokens_before(step) for step in (3, 6, 9)] == [round(tokens) for tokens in seen]


def test_packed_answers_cost_what_they_cost_alone() -> None:
    """And padding nothing, in a row or cut off it."""
    model = build_model(dataclasses.replace(GPT, init_std=0.4), ProcessGrid(), seed=3).eval()
    records = [Instruction(r["instruction"], r["input"], r["output"]) for r in RECORDS]
    dataset = InstructionDataset(records, TOKENIZER, LENGTH)
    inputs = SequenceInputs()
    with torch.no_grad():
        alone = sum(
            -model.logits(tokens[None])[0, t].log_softmax(-1)[y].item()  # type: ignore[operator]
            for tokens, targets in (dataset[item] for item in range(len(dataset)))
            for t, y in enumerate(targets.tolist())
            if y >= 0
        )
        for packing in (False, True):
            samples = InstructionSamples(dataset, LENGTH, 0, packing)
            total = 0.0
            for row in range(len(samples)):
                arrays = samples.read(torch.arange(row, row + 1).numpy())
                whole = {name: torch.from_numpy(array) for name, array in arrays.items()}
                batch = trim_padding(whole, multiple_of=8)
                assert batch["tokens"].shape[1] % 8 == 0
                assert packing or batch["tokens"].shape[1] < LENGTH
                total += inputs.loss(model, batch).item()
            assert total == pytest.approx(alone, rel=1e-5)


def test_the_model_is_that_of_the_weights(corpus: Path, tmp_path: Path) -> None:
    config = _config("egpt", corpus, tmp_path)
    config = dataclasses.replace(config, model=ModelConfig(dropout=0.25))
    found = finetuning_config(config, ProcessGrid()).model
    source = EncoderConfig(source=str(corpus / "gpt"))
    assert found == dataclasses.replace(EGPT, dropout=0.25, encoder=source)


@pytest.mark.parametrize("own", [0.0, 0.01])
def test_terms_of_the_loss_are_the_runs_own(own: float) -> None:
    """What the weights were trained with says nothing of the model."""
    wanted = ModelConfig(dropout=own, z_loss=own)
    found = model_of_weights(dataclasses.replace(EGPT, dropout=0.1, z_loss=0.001), wanted, "some")
    assert (found.dropout, found.z_loss) == (own, own)


def test_an_encoder_that_contradicts_the_weights_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = _config("egpt", corpus, tmp_path)
    encoder = dataclasses.replace(config.model.encoder, overlap=3, batch_size=2)
    model = dataclasses.replace(config.model, encoder=encoder)
    with pytest.raises(ConfigError, match=r"model\.encoder\.overlap=3, the weights have 0; leave"):
        finetuning_config(dataclasses.replace(config, model=model), ProcessGrid())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(hidden_size=32)}, "model.hidden_size=32, the weights have 16"),
        ({"training": {"initialize_from": None}}, "training.initialize_from is not set"),
        ({"data": DataConfig()}, "data.instructions.train is empty"),
        ({"data": {"train": ("shards",)}}, "data.train is for pretraining, and would not be read"),
        ({"data": {"weights": (1.0,)}}, "data.weights is for pretraining, and would not be read"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = _config("gpt", corpus, tmp_path)
    for name, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises(ConfigError, match=message):
        finetune(config, ProcessGrid())


def test_where_there_are_no_records_it_says_where_some_come_from(
    corpus: Path, tmp_path: Path
) -> None:
    config = _config("gpt", corpus, tmp_path)
    instructions = dataclasses.replace(config.data.instructions, train=("nowhere.jsonl",))
    data = dataclasses.replace(config.data, instructions=instructions)
    with pytest.raises(DataError, match=r"no records nowhere.jsonl; .*prepare_data.py"):
        finetune(dataclasses.replace(config, data=data), ProcessGrid())


def test_records_are_not_for_pretraining(corpus: Path, tmp_path: Path) -> None:
    config = _config("gpt", corpus, tmp_path)
    data = dataclasses.replace(config.data, train=("shards",))
    with pytest.raises(ConfigError, match=r"data\.instructions is for fine-tuning"):
        PretrainingData(dataclasses.replace(config, data=data))


def test_packing_is_for_a_gpt(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is for a gpt"):
        finetune(_config("egpt", corpus, tmp_path, packing=True), ProcessGrid())


def test_weights_of_another_vocabulary_are_refused(corpus: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(GPT, vocab_size=100)
    save_weights(build_model(small, ProcessGrid()), corpus / "small", ProcessGrid())
    with pytest.raises(CheckpointError, match="a vocabulary of 100"):
        finetune(_config("small", corpus, tmp_path), ProcessGrid())


def test_a_tokenizer_that_is_not_beside_its_weights_has_to_be_named(
    corpus: Path, tmp_path: Path
) -> None:
    extra = {"tokenizer_fingerprint": "another"}
    save_weights(build_model(GPT, ProcessGrid()), corpus / "lone", ProcessGrid(), extra)
    config = _config("lone", corpus, tmp_path)
    with pytest.raises(CheckpointError, match=r"its own is not beside it: set data\.vocabulary"):
        finetuning_config(config, ProcessGrid())
    data = dataclasses.replace(config.data, vocabulary="named")
    found = finetuning_config(dataclasses.replace(config, data=data), ProcessGrid())
    assert found.data.vocabulary == "named"


def test_held_out_records_are_a_share_and_not_trained_on() -> None:
    records = [Instruction(str(number), "", "x") for number in range(50)]
    train, held_out = hold_out(records, 0.1, seed=0)
    assert (len(train), len(held_out)) == (45, 5)
    assert set(train).isdisjoint(held_out)
    assert hold_out(records, 0.1, seed=0) == (train, held_out)
    assert hold_out(records, 0.1, seed=1)[1] != held_out
    assert hold_out(records, 0.0, seed=0) == (records, [])
    assert len(hold_out(records[:2], 0.01, seed=0)[1]) == 1
    assert hold_out(records[:1], 0.5, seed=0) == (records[:1], [])


def test_beside_conversations_a_task_is_asked_as_it_was_learned(
    corpus: Path, tmp_path: Path
) -> None:
    definition = changed()
    definition.settings["chat_template"] = NAMED_TEMPLATES["chatml"]
    save_tokenizer(HuggingFaceTokenizer(definition), tmp_path)
    roles = ("user", "assistant")
    chat = {"messages": [{"role": role, "content": "Hello"} for role in roles]}
    records = tmp_path / "mixed.jsonl"
    records.write_text("\n".join(map(json.dumps, [*RECORDS, chat])))
    config = _config("gpt", corpus, tmp_path)
    found = {}
    for template in (None, "tokenizer"):
        instructions = dataclasses.replace(
            config.data.instructions, train=(str(records),), template=template
        )
        data = dataclasses.replace(config.data, instructions=instructions, vocabulary=str(tmp_path))
        model = dataclasses.replace(GPT, vocab_size=700, max_seq_len=2 * LENGTH)
        tuned = InstructionData(dataclasses.replace(config, model=model, data=data))
        weights = tmp_path / str(template)
        weights.mkdir()
        found[template] = tuned.prompt("Say yes.").text, tuned.save_beside(weights)
        assert (weights / "chat_template.jinja").read_text() == NAMED_TEMPLATES["chatml"]
    assert found[None] == (Instruction("Say yes.", "", "").prompt, {"instructions": "mixed"})
    asked_in_chat = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    assert found["tokenizer"] == (asked_in_chat, {"instructions": "chats"})


def test_answers_behind_which_a_document_ends_are_refused_but_for_the_last(
    corpus: Path, tmp_path: Path
) -> None:
    """Alone in a row they would hide what is before them, and in packed rows not."""
    turns = ["Say yes.", "yes", "Again.", "yes"]
    roles = ["user", "assistant"] * 2
    said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    records = tmp_path / "chats.jsonl"
    config = _config("gpt", corpus, tmp_path)
    instructions = dataclasses.replace(
        config.data.instructions, train=(str(records),), template="alpaca"
    )
    model = dataclasses.replace(GPT, document_end=TOKENIZER.eot_token)
    data = dataclasses.replace(config.data, instructions=instructions)
    config = dataclasses.replace(config, model=model, data=data)
    records.write_text("\n".join(json.dumps({"messages": said[:2]}) for _ in range(4)))
    assert len(InstructionData(config).samples) == 3
    records.write_text("\n".join(json.dumps({"messages": said}) for _ in range(4)))
    message = r"instructions\.template: 3 training .* alpaca .*document_end=50256, .*chatml"
    with pytest.raises(ConfigError, match=message):
        InstructionData(config)
    model = dataclasses.replace(model, document_end=None)
    assert len(InstructionData(dataclasses.replace(config, model=model)).samples) == 3
