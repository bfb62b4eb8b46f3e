"""A run on another tokenizer's shards: its weights carry the tokenizer to whatever comes after."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np

from megaegpt.config import DataConfig, RunConfig
from megaegpt.config.data import InstructionConfig
from megaegpt.data.preprocess.corpus import PreprocessOptions, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.generation.trained import load_for_inference
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.finetuning import InstructionData, finetuning_config
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed
from tests.tiny.runs import run_config
from tests.tiny.tokenizers import VOCAB_SIZE, trained_tokenizer


def _pretrain(config: RunConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, ProcessGrid())


def test_the_tokenizer_goes_from_shards_to_weights_and_on(
    tmp_path: Path, distributed: Distributed
) -> None:
    vocabulary, text = tmp_path / "vocabulary", tmp_path / "text.txt"
    vocabulary.mkdir()
    save_tokenizer(trained_tokenizer(), vocabulary)
    text.write_text("The tokens of a text and the weights of a run.\n" * 200)
    encode = EncodeOptions(vocabulary=str(vocabulary))
    options = PreprocessOptions(tmp_path / "corpus", (str(text),), encode=encode, split_tokens=0.8)
    preprocess(options)
    config = run_config(
        "gpt",
        tmp_path / "corpus",
        tmp_path / "run",
        model={"vocab_size": VOCAB_SIZE, "max_seq_len": 256},
        training={"steps": 3, "eval_interval": 3},
        checkpoint={"interval": 3},
    )
    distributed(1, _pretrain, config)
    loaded = load_for_inference(tmp_path / "run", ProcessGrid())
    assert loaded.tokenizer.fingerprint == trained_tokenizer().fingerprint
    assert loaded.is_own_tokenizer
    record = json.dumps({"instruction": "Say it.", "input": "", "output": "The tokens."})
    (tmp_path / "records.jsonl").write_text(f"{record}\n" * 4)
    instructions = InstructionConfig(train=(str(tmp_path / "records.jsonl"),))
    start = {"initialize_from": str(tmp_path / "run"), "steps": 3}
    tuned = run_config(
        "gpt",
        tmp_path,
        tmp_path / "tuned",
        data=vars(DataConfig(instructions=instructions)),
        training=start,
        model=vars(loaded.model.config),
    )
    data = InstructionData(finetuning_config(tuned, ProcessGrid()))
    assert data.tokenizer.fingerprint == trained_tokenizer().fingerprint
    assert int(data.samples.batch(np.arange(1))["tokens"].max()) < VOCAB_SIZE
