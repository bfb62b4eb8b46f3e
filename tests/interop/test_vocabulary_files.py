"""The tokenizer and the chat template that go from one form of a model to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.data.instruction.named_templates import NAMED_TEMPLATES
from megaegpt.data.tokenizers.gguf_vocabulary import read_gguf_definition
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.gguf_export import export_gguf
from megaegpt.interop.peft import export_peft
from megaegpt.interop.vocabulary_files import is_gpt2_tokenizer, tokenizer_beside
from megaegpt.model.adapter_files import Base, save_adapter
from megaegpt.model.adapters import add_adapters, initialize_adapters
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights, tensors_digest
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.tokenizers import changed

GRID = ProcessGrid()
GPT = ModelConfig(vocab_size=700, max_seq_len=16, hidden_size=8, num_layers=1, num_heads=1)
ASKED = [{"role": "user", "content": "Name a colour."}]
ALPACA = NAMED_TEMPLATES["alpaca"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and an adapter, tuned on tasks over a base whose tokenizer is for conversations."""
    folder = tmp_path_factory.mktemp("tuned")
    definition = changed()
    definition.settings["chat_template"] = NAMED_TEMPLATES["chatml"]
    tokenizer = HuggingFaceTokenizer(definition)
    extra = {"instructions": "tasks", "tokenizer_fingerprint": tokenizer.fingerprint}
    model = build_model(GPT, GRID)
    save_weights(model, folder / "weights", GRID, extra)
    lora = LoRAConfig(rank=1)
    add_adapters(model, lora)
    initialize_adapters(model, 1, GRID)
    base = Base("base", tensors_digest(folder / "weights"))
    save_adapter(model, folder / "adapter", GRID, lora, base, extra)
    for name in ("weights", "adapter"):
        save_tokenizer(tokenizer, folder / name)
    return folder


def test_what_was_tuned_on_tasks_is_asked_in_their_prompt_elsewhere_too(
    tuned: Path, tmp_path: Path
) -> None:
    """Whatever template the tokenizer came with."""
    export_huggingface(tuned / "weights", tmp_path / "theirs")
    export_peft(tuned / "adapter", tmp_path / "peft")
    for name in ("theirs", "peft"):
        assert load_tokenizer(tmp_path / name).chat_template == ALPACA
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        text = theirs.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
        assert str(text).endswith("### Instruction:\nName a colour.\n\n### Response:\n")


def test_gpt2s_vocabulary_with_other_rules_is_not_taken_for_its_tokenizer(tmp_path: Path) -> None:
    """Its files would not be kept, and the rules be lost with them."""
    save_tokenizer(load_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [50256, 198]}')
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.end_tokens == {50256, 198}
    config = dataclasses.replace(GPT, vocab_size=50257)
    assert not is_gpt2_tokenizer(tokenizer, config)
    tokenizer.definition = dataclasses.replace(tokenizer.definition, ends=())
    assert is_gpt2_tokenizer(tokenizer, config)
    tokenizer.adds_bos = True
    assert not is_gpt2_tokenizer(tokenizer, config)


def test_a_tokenizer_of_another_model_can_be_taken_from_its_folder_but_not_from_a_file(
    tuned: Path, tmp_path: Path
) -> None:
    smaller = dataclasses.replace(GPT, vocab_size=699)
    with pytest.raises(CheckpointError, match="it is another model's; without its files"):
        tokenizer_beside(tuned / "weights", smaller)
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    export_gguf(tuned / "weights", tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"it is another model's$"):
        tokenizer_beside(tmp_path / "model.gguf", smaller)


def test_a_gguf_file_of_what_was_tuned_on_tasks_has_their_prompt(
    tuned: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    export_gguf(tuned / "weights", tmp_path / "model.gguf")
    assert read_gguf_definition(tmp_path / "model.gguf").chat_template == ALPACA
