"""Trained models from wherever they lie, with the encoder they were trained with and no other."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import EncoderConfig, ModelConfig
from megaegpt.data.instruction.conversations import Message
from megaegpt.data.instruction.named_templates import NAMED_TEMPLATES
from megaegpt.data.instruction.records import Instruction
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import CHAT_TEMPLATE_FILE, save_tokenizer
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.generation.chat import find_chat
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.trained import choose_products, load_for_inference, round_to_int8
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.foreign_models import import_model
from megaegpt.interop.gguf_export import export_gguf
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import save_weights
from megaegpt.parallel import int8_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.int8_weights import Int8Weight
from tests.generation.test_generator import VARIANTS
from tests.tiny.models import EGPT, GPT, SAMPLING_24, build_with_encoder, prompt
from tests.tiny.tokenizers import BLANK_FIRST, changed, trained_tokenizer, with_bos

GRID = ProcessGrid()
BIG_VOCABULARY = {"vocab_size": 50257, "hidden_size": 16, "num_heads": 2}


class RankOfTwo(ProcessGrid):
    """A place in a tensor-parallel pair that communicates with nobody."""

    world_size = 1


def save_gpt(folder: Path, seed: int = 1, **changes: object) -> Path:
    """A tiny GPT for the real tokenizer."""
    model = build_model(replace(GPT, **(BIG_VOCABULARY | changes)), GRID, seed=seed)
    save_weights(model, folder, GRID)
    return folder


def save_egpt(
    folder: Path, encoder: Path, source: str | None = None, like: ModelConfig = EGPT
) -> Path:
    """A tiny EGPT over the encoder in a folder, which it calls ``source``."""
    config: ModelConfig = replace(
        like, **BIG_VOCABULARY, encoder=EncoderConfig(source=source or str(encoder))
    )
    frozen = FrozenEncoder.from_source(EncoderConfig(source=str(encoder)), GRID)
    save_weights(build_model(config, GRID, seed=2), folder, GRID, frozen.description())
    return folder


def test_a_loaded_model_writes_what_the_saved_one_wrote(tmp_path: Path) -> None:
    model = build_model(replace(GPT, **BIG_VOCABULARY), GRID, seed=1).eval()
    save_weights(model, tmp_path, GRID)
    loaded = load_for_inference(tmp_path, GRID)
    assert not loaded.model.training
    assert loaded.encoder is None
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    texts = [TextGenerator(m).generate([[1, 2]], SAMPLING_24) for m in (model, loaded.model)]
    assert texts[0] == texts[1]


def test_whichever_library_multiplies_the_logits_are_the_same_to_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gpt(tmp_path, hidden_size=64)
    tokens = torch.tensor([[1, 2, 3]])
    logits = {}
    for library in ("onednn", "blas"):
        monkeypatch.setenv("MEGAEGPT_KERNELS", library)
        model = load_for_inference(tmp_path, GRID).model
        with torch.inference_mode():
            logits[library] = model.head.full_logits(model.hidden_states(tokens))
        assert (3 in model.head.blas_rows) == (library == "blas")
    torch.testing.assert_close(logits["onednn"], logits["blas"], rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("MEGAEGPT_KERNELS", "blas")
    assert load_for_inference(tmp_path, GRID, torch.bfloat16).model.head.packed is None


def test_a_library_that_is_not_known_is_refused_for_a_tiny_model_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEGAEGPT_KERNELS", "mkl")
    with pytest.raises(ConfigError, match="MEGAEGPT_KERNELS=mkl is not known"):
        choose_products(build_model(GPT, GRID))


@pytest.mark.parametrize("kind", ["gpt", "encoder"])
def test_ranks_that_cannot_share_a_model_or_its_encoder_are_refused_by_name(
    tmp_path: Path, kind: str
) -> None:
    nine = save_gpt(tmp_path / "gpt", hidden_size=18, num_heads=9)
    if kind == "encoder":
        config = replace(EGPT, **(BIG_VOCABULARY | {"hidden_size": 18}))
        description = FrozenEncoder.from_source(EncoderConfig(str(nine)), GRID).description()
        model = build_model(replace(config, encoder=EncoderConfig(str(nine))), GRID, seed=2)
        save_weights(model, tmp_path / "egpt", GRID, description)
    source = tmp_path / ("gpt" if kind == "gpt" else "egpt")
    ours = re.escape(f"{nine} on 2 tensor-parallel ranks: model.num_heads=9 is not divisible by")
    with pytest.raises(ConfigError, match=f"^{ours} .*: use one of 1, 3, 9$"):
        load_for_inference(source, RankOfTwo(tp_size=2))
    assert load_for_inference(source, GRID).model.config.hidden_size == 18


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_in_int8_writes_what_the_numbers_that_it_is_rounded_to_write(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, same = (build_with_encoder(VARIANTS[name]) for _ in range(2))
    for part, plain in zip(parts, same, strict=True):
        if part is None or plain is None:
            continue
        round_to_int8(part)
        for module, other in zip(plain.modules(), part.modules(), strict=True):
            if isinstance(weight := getattr(other, "packed", None), Int8Weight):
                module.weight.data = weight.whole(torch.float64)
    with monkeypatch.context() as patched:
        patched.setattr(int8_weights, "MOST_ROWS", 0)  # where the weights alone are rounded
        text, expected = (
            TextGenerator(*m).generate([prompt(5)], SAMPLING_24) for m in (parts, same)
        )
    assert text == expected
    assert len(TextGenerator(*parts).generate([prompt(5)], SAMPLING_24)[0]) == len(text[0])


def test_a_model_loaded_in_int8_predicts_as_well_in_a_quarter_of_the_memory(
    tmp_path: Path,
) -> None:
    save_gpt(tmp_path, hidden_size=64, init_std=0.1)
    plain = load_for_inference(tmp_path, GRID).model
    model = load_for_inference(tmp_path, GRID, int8=True).model
    tokens = torch.arange(3 * 16).view(3, 16)
    with torch.no_grad():
        losses = [m.head.loss(m.hidden_states(tokens), tokens) / 48 for m in (plain, model)]  # type: ignore[operator]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0.02)
    taken = {p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    for module in model.modules():
        if isinstance(weight := getattr(module, "packed", None), Int8Weight):
            taken |= {t.data_ptr(): t.nbytes for t in weight}
    assert sum(taken.values()) < 0.27 * sum(p.nbytes for p in plain.parameters())


def test_an_encoder_for_a_model_without_one_is_refused(tmp_path: Path) -> None:
    save_gpt(tmp_path / "gpt")
    with pytest.raises(ConfigError, match="gpt is a plain gpt, without an encoder: leave the enc"):
        load_for_inference(tmp_path / "gpt", GRID, encoder_source="elsewhere")


@pytest.mark.parametrize("given", ["step_00000007/weights", "step_00000007", ".", ".."])
def test_a_run_its_checkpoints_one_of_them_and_its_weights_are_found(
    tmp_path: Path, given: str
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    save_gpt(checkpoints / "step_00000003" / "weights", seed=3)
    save_gpt(checkpoints / "step_00000007" / "weights", seed=7)
    (checkpoints / "latest").write_text("step_00000007\n")
    wanted = build_model(replace(GPT, **BIG_VOCABULARY), GRID, seed=7)
    model = load_for_inference(checkpoints / given, GRID).model
    assert torch.equal(model.embedding.weight, wanted.embedding.weight)


def test_the_precision_is_chosen_on_loading(tmp_path: Path) -> None:
    save_gpt(tmp_path / "encoder")
    model, encoder, *_ = load_for_inference(
        save_egpt(tmp_path / "egpt", tmp_path / "encoder"), GRID, torch.bfloat16
    )
    assert encoder is not None
    assert {p.dtype for m in (model, encoder) for p in m.parameters()} == {torch.bfloat16}
    assert len(TextGenerator(model, encoder).generate([[1, 2]], SAMPLING_24)[0]) == 24


def test_the_encoder_is_found_where_it_was_or_beside_the_weights_or_where_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gpt(tmp_path / "encoder")
    egpt = save_egpt(tmp_path / "egpt", tmp_path / "encoder", source="../encoder")
    monkeypatch.chdir(tmp_path / "egpt")
    assert load_for_inference(egpt, GRID).encoder is not None
    monkeypatch.chdir(tmp_path)
    assert load_for_inference(egpt, GRID).encoder is not None
    moved = tmp_path / "elsewhere" / "gpt"
    moved.parent.mkdir()
    shutil.move(tmp_path / "encoder", moved)
    with pytest.raises(
        CheckpointError, match=r"encoder of .*egpt cannot be loaded: .*\.\./encoder"
    ):
        load_for_inference(egpt, GRID)
    assert load_for_inference(egpt, GRID, encoder_source=str(moved)).encoder is not None


def test_another_encoder_is_refused_by_name(tmp_path: Path) -> None:
    save_gpt(tmp_path / "encoder")
    egpt = save_egpt(tmp_path / "egpt", tmp_path / "encoder")
    shutil.rmtree(tmp_path / "encoder")
    save_gpt(tmp_path / "encoder", seed=2)
    with pytest.raises(CheckpointError, match=r"/encoder is not the encoder that .*/egpt was"):
        load_for_inference(egpt, GRID)


def test_an_encoder_of_the_same_weights_that_computes_otherwise_is_refused(
    tmp_path: Path,
) -> None:
    save_gpt(tmp_path / "encoder")
    egpt = save_egpt(tmp_path / "egpt", tmp_path / "encoder")
    assert load_for_inference(egpt, GRID).encoder is not None
    save_gpt(tmp_path / "encoder", activation="gelu", layer_norm_eps=1e-3)
    with pytest.raises(CheckpointError) as raised:
        load_for_inference(egpt, GRID)
    assert "model.activation is gelu_tanh there and gelu here" in str(raised.value)
    assert "model.layer_norm_eps is 1e-05 there and 0.001 here" in str(raised.value)


def test_weights_of_an_earlier_version_name_their_encoder_by_its_fingerprint_alone(
    tmp_path: Path,
) -> None:
    frozen = FrozenEncoder.from_source(
        EncoderConfig(source=str(save_gpt(tmp_path / "encoder"))), GRID
    )
    config = replace(
        EGPT, **BIG_VOCABULARY, encoder=EncoderConfig(source=str(tmp_path / "encoder"))
    )
    extra = {"encoder_fingerprint": frozen.fingerprint}
    save_weights(build_model(config, GRID, seed=2), tmp_path / "egpt", GRID, extra)
    assert load_for_inference(tmp_path / "egpt", GRID).encoder is not None


def test_weights_that_do_not_name_their_encoder_are_refused(tmp_path: Path) -> None:
    config = replace(EGPT, **BIG_VOCABULARY, encoder=EncoderConfig(source="somewhere"))
    save_weights(build_model(config, GRID), tmp_path, GRID)
    with pytest.raises(CheckpointError, match="does not say which encoder"):
        load_for_inference(tmp_path, GRID)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    save_weights(build_model(GPT, GRID), tmp_path, GRID)
    with pytest.raises(CheckpointError, match="vocabulary of 90 tokens"):
        load_for_inference(tmp_path, GRID)


def test_a_tokenizer_that_lies_with_the_weights_is_the_models_own(tmp_path: Path) -> None:
    """Other programs' models have more rows than their tokenizers have ids."""
    save_gpt(tmp_path, vocab_size=1000)
    with pytest.raises(CheckpointError, match="the tokenizer gpt2 has 50257"):
        load_for_inference(tmp_path, GRID)
    save_tokenizer(trained_tokenizer(), tmp_path)
    loaded = load_for_inference(tmp_path, GRID)
    assert loaded.tokenizer.fingerprint == trained_tokenizer().fingerprint
    assert loaded.is_own_tokenizer


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_for_inference(tmp_path, GRID)
    with pytest.raises(CheckpointError, match=r"there is no folder .*/absent"):
        load_for_inference(tmp_path / "absent", GRID)


def test_it_is_known_and_said_whether_the_tokenizer_is_the_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gpt(tmp_path / "unsaid")
    save_gpt(tmp_path / "padded", vocab_size=50304)
    save_gpt(tmp_path / "larger", vocab_size=100_277)
    known = [load_for_inference(tmp_path / n, GRID).is_own_tokenizer for n in ("unsaid", "padded")]
    assert known == [True, True]
    assert capsys.readouterr().err == ""
    assert not load_for_inference(tmp_path / "larger", GRID).is_own_tokenizer
    model = build_model(replace(GPT, **BIG_VOCABULARY), GRID)
    save_weights(model, tmp_path / "other", GRID, {"tokenizer_fingerprint": "0" * 64})
    assert not load_for_inference(tmp_path / "other", GRID).is_own_tokenizer
    warned = rf"warning: {tmp_path}/other was not trained with the tokenizer gpt2.* --vocabulary"
    assert re.search(warned, capsys.readouterr().err)


def test_a_model_that_was_tuned_on_tasks_is_talked_to_in_their_prompt(tmp_path: Path) -> None:
    model = build_model(replace(GPT, **BIG_VOCABULARY), GRID, seed=1)
    save_weights(model, tmp_path, GRID, {"instructions": "tasks"})
    loaded = load_for_inference(tmp_path, GRID)
    assert loaded.chat_template is not None
    assert not loaded.asked_in_chats
    task = Instruction("Name a colour.", "", "")
    messages = (Message("user", task.instruction),)
    expected = loaded.tokenizer.encode_prompt(task.prompt)
    assert loaded.chat_template.encode_prompt(messages, loaded.tokenizer) == expected


@pytest.mark.parametrize("form", ["theirs", "model.gguf"])
@pytest.mark.parametrize("tuned_on", ["tasks", "chats"])
def test_a_tuned_model_is_asked_as_it_was_tuned_in_another_form_too(
    tuned_on: str, form: str, tmp_path: Path
) -> None:
    definition = changed()
    definition.settings["chat_template"] = NAMED_TEMPLATES["llama3"]
    tokenizer = HuggingFaceTokenizer(definition)
    extra = {"instructions": tuned_on, "tokenizer_fingerprint": tokenizer.fingerprint}
    model = build_model(replace(GPT, vocab_size=tokenizer.vocab_size), GRID, seed=1)
    save_weights(model, tmp_path / "ours", GRID, extra)
    save_tokenizer(tokenizer, tmp_path / "ours")
    if tuned_on == "chats":
        (tmp_path / "ours" / CHAT_TEMPLATE_FILE).write_text(NAMED_TEMPLATES["chatml"])
    if form == "model.gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
        export_gguf(tmp_path / "ours", tmp_path / form)
    else:
        export_huggingface(tmp_path / "ours", tmp_path / form)
    import_model(tmp_path / form, tmp_path / "again")
    template = NAMED_TEMPLATES["chatml" if tuned_on == "chats" else "alpaca"]
    for name in ("ours", "again"):
        loaded = load_for_inference(tmp_path / name, GRID)
        assert loaded.asked_in_chats == (tuned_on == "chats")
        assert loaded.chat_template is not None
        assert loaded.chat_template.source == template


def test_a_model_of_others_is_asked_in_its_tokenizers_template(tmp_path: Path) -> None:
    definition = changed()
    save_gpt(tmp_path, vocab_size=700)
    for template in (None, NAMED_TEMPLATES["chatml"]):
        definition.settings["chat_template"] = template
        save_tokenizer(HuggingFaceTokenizer(definition), tmp_path)
        assert load_for_inference(tmp_path, GRID).asked_in_chats == (template is not None)


@pytest.mark.parametrize(
    ("parts", "bos"),
    [({}, "<|im_start|>"), ({}, None), ({"pre_tokenizer": BLANK_FIRST}, "<|im_start|>")],
    ids=["named", "of the post-processor", "and a blank"],
)
def test_the_prompt_of_tasks_begins_with_the_bos_in_a_conversation_too(
    parts: dict[str, Any], bos: str | None, tmp_path: Path
) -> None:
    tokenizer = with_bos(parts, bos_token=bos)
    model = build_model(replace(GPT, vocab_size=tokenizer.vocab_size), GRID, seed=1)
    save_weights(model, tmp_path, GRID, {"instructions": "tasks"})
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_for_inference(tmp_path, GRID)
    task = Instruction("Name a colour.", "", "")
    expected = loaded.tokenizer.encode_prompt(task.prompt)
    assert expected[0] == 1
    for chat in (find_chat(loaded), find_chat(loaded, "alpaca")):
        assert chat is not None
        assert chat.encode((Message("user", task.instruction),)) == expected
