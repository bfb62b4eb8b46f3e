"""GPT-2 between Hugging Face's form and ours: the same logits on both sides, at any TP size."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from megaegpt.config import ModelConfig
from megaegpt.config.presets import create_model_config
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_FILES,
    has_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from megaegpt.errors import CheckpointError
from megaegpt.interop import hub
from megaegpt.interop.description import Description
from megaegpt.interop.export import export_huggingface, export_weights
from megaegpt.interop.families.gpt2 import GPT2
from megaegpt.interop.foreign_models import import_model
from megaegpt.interop.sources import resolve_weights_source, source_config
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.interop.translation import to_ours
from megaegpt.model.build import build_model, meta_model
from megaegpt.model.weights import read_weights_config, save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed
from tests.interop.over_ranks import logits_and_states
from tests.tiny.gpt2 import (
    LENGTH,
    SIZES,
    VOCAB,
    our_logits,
    random_gpt2,
    their_logits,
    tokens,
)
from tests.tiny.tokenizers import trained_tokenizer

GRID = ProcessGrid()
CLOSE = 1e-4
OURS = ModelConfig(
    vocab_size=VOCAB,
    max_seq_len=LENGTH,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    init_std=0.2,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions are kept where no other test finds them."""
    monkeypatch.setenv("MEGAEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


# -- from them to us ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 48, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    ],
    ids=["as_released", "untied", "other_mlp_and_norm"],
)
def test_an_imported_gpt2_computes_their_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = random_gpt2(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    difference = (our_logits(tmp_path / "ours") - their_logits(theirs)).abs().max()
    assert difference < CLOSE


def test_weights_in_many_files_or_pickled_are_read_too(tmp_path: Path) -> None:
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    theirs.config.save_pretrained(pickled)
    torch.save(theirs.transformer.state_dict(), pickled / "pytorch_model.bin")  # the oldest names
    for folder in (tmp_path / "many", pickled):
        import_model(folder, tmp_path / f"{folder.name}-ours")
        assert (our_logits(tmp_path / f"{folder.name}-ours") - their_logits(theirs)).abs().max() < (
            CLOSE
        )


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"not a pickle")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert (our_logits(tmp_path / "ours") - their_logits(theirs)).abs().max() < CLOSE


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    GPT2Config(vocab_size=VOCAB, **SIZES).save_pretrained(tmp_path)
    torch.save({"wte.weight": _Payload(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or unsafe"):
        import_model(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "mark").exists()


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_folder_of_theirs_is_a_gpt_and_an_encoder_at_tp_2(
    tmp_path: Path, distributed: Distributed
) -> None:
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        states = theirs.transformer(tokens()).last_hidden_state
    source = str(tmp_path / "theirs")
    cache = str(tmp_path / "cache")
    for logits, ours in distributed(2, logits_and_states, source, tokens(), cache):
        assert (logits[..., :VOCAB] - their_logits(theirs)).abs().max() < CLOSE
        assert (ours - states).abs().max() < CLOSE
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 1


@pytest.mark.parametrize(
    ("size", "preset"),
    [
        ({}, "gpt2-small (124M)"),
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, "gpt2-medium (355M)"),
        ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, "gpt2-large (774M)"),
        ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, "gpt2-xl (1558M)"),
    ],
)
def test_every_tensor_of_the_four_sizes_has_its_place(size: dict[str, int], preset: str) -> None:
    """Without weights: their configuration is our preset, their shapes are ours."""
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(**size))
    config = to_ours(Description(theirs.config.to_dict(), "config"), GPT2)
    assert config == create_model_config(preset)
    layout = TensorLayout(config, GPT2, gguf=False)
    assert layout.shapes == {n: tuple(t.shape) for n, t in theirs.transformer.state_dict().items()}
    model = meta_model(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    assert model.num_parameters() - padding == theirs.num_parameters()


# -- from us to them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": False}, {"bias": False, "activation": "gelu"}],
    ids=["tied", "untied", "no_biases"],
)
def test_an_exported_model_computes_our_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = build_model(dataclasses.replace(OURS, **changes), GRID, seed=3)
    for parameter in model.parameters():
        parameter.data += 0.05  # biases start at 0
    model.embedding.weight.data[VOCAB:] = 0.0
    save_weights(model, tmp_path / "ours", GRID)
    assert export_weights(tmp_path / "ours", tmp_path / "theirs") == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert (their_logits(theirs) - our_logits(tmp_path / "ours")).abs().max() < CLOSE


def test_there_and_back_again_is_bit_for_bit(tmp_path: Path) -> None:
    random_gpt2().save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "again")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_their_tokenizer_reads_what_is_exported_and_cuts_text_as_ours(tmp_path: Path) -> None:
    model = build_model(ModelConfig(max_seq_len=8, hidden_size=4, num_layers=1, num_heads=1), GRID)
    save_weights(model, tmp_path / "ours", GRID)
    export_huggingface(tmp_path / "ours", tmp_path / "theirs")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "theirs"), Tokenizer.load()
    text = "Well, Prince, 1805!\n\n  so Genoa's\tнити 日本語 🙂 é\u0301 \x00 they'll"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eot_token
    assert theirs("a<|endoftext|>b")["input_ids"] == [64, ours.eot_token, 65]
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 8


def test_what_gpt2_cannot_compute_keeps_our_form(tmp_path: Path) -> None:
    rotary = dataclasses.replace(OURS, positions="rotary", num_kv_heads=2)
    save_weights(build_model(rotary, GRID, seed=3), tmp_path / "ours", GRID)
    save_tokenizer(trained_tokenizer(), tmp_path / "ours")
    assert export_weights(tmp_path / "ours", tmp_path / "out") == [
        "num_kv_heads=2",
        "positions=rotary",
    ]
    written = load_tokenizer(str(tmp_path / "out"))
    assert written.fingerprint == trained_tokenizer().fingerprint
    assert torch.equal(our_logits(tmp_path / "out"), our_logits(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match="GPT-2 has no num_kv_heads=2, positions=rotary"):
        export_huggingface(tmp_path / "ours", tmp_path / "theirs")


def test_numbers_that_fp16_cannot_hold_are_not_written(tmp_path: Path) -> None:
    model = build_model(OURS, GRID)
    with torch.no_grad():
        model.stack.blocks[0].mlp.up.weight[0, 0] = 1e5
    save_weights(model, tmp_path / "ours", GRID)
    with pytest.raises(CheckpointError, match=r"numbers up to 1e\+05, which fp16 cannot hold"):
        export_weights(tmp_path / "ours", tmp_path / "theirs", torch.float16)
    assert not (tmp_path / "theirs").exists()
    export_weights(tmp_path / "ours", tmp_path / "theirs", torch.bfloat16)


def test_the_beginning_of_a_text_is_the_tokenizer_s_own(tmp_path: Path) -> None:
    model = build_model(dataclasses.replace(OURS, vocab_size=700), GRID)
    save_weights(model, tmp_path / "ours", GRID)
    save_tokenizer(trained_tokenizer(), tmp_path / "ours")
    settings = tmp_path / "ours" / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"bos_token": "<|im_start|>"}
    settings.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "theirs")
    described = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert described["bos_token_id"] == tokenizer.bos_token != described["eos_token_id"]


@pytest.mark.parametrize(
    ("rows", "trained_with", "written"),
    [(50304, Tokenizer.load().fingerprint, True), (50257, "0" * 64, False), (50304, None, False)],
)
def test_gpt2s_tokenizer_goes_with_what_was_trained_with_it_whatever_the_rows(
    tmp_path: Path, rows: int, trained_with: str | None, written: bool
) -> None:
    model = build_model(dataclasses.replace(OURS, vocab_size=rows), GRID)
    extra = {} if trained_with is None else {"tokenizer_fingerprint": trained_with}
    save_weights(model, tmp_path / "ours", GRID, extra)
    export_weights(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "vocab.json").is_file() == written
    described = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert described["vocab_size"] == rows
    assert described["eos_token_id"] == (50256 if written else None)


def test_a_tokenizer_is_not_taken_for_gpt2s_by_the_number_of_rows_or_tokens(
    tmp_path: Path,
) -> None:
    save_weights(
        build_model(dataclasses.replace(OURS, vocab_size=50257), GRID), tmp_path / "a", GRID
    )
    export_weights(tmp_path / "a", tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "plain")
    assert not has_tokenizer(tmp_path / "plain")
    (tmp_path / "theirs" / CHAT_TEMPLATE_FILE).write_text("{{ 'chat' }}")
    import_model(tmp_path / "theirs", tmp_path / "chat")
    assert load_tokenizer(tmp_path / "chat").chat_template == "{{ 'chat' }}"
    for name in TOKENIZER_FILES:
        (tmp_path / "theirs" / name).unlink(missing_ok=True)
    save_tokenizer(trained_tokenizer(), tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").fingerprint == trained_tokenizer().fingerprint


def test_an_export_overwrites_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    save_weights(build_model(OURS, GRID), tmp_path / "ours", GRID)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(CheckpointError, match="taken exists already"):
        export_huggingface(tmp_path / "ours", tmp_path / "taken")
    weights = tmp_path / "ours" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        export_weights(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "taken"]


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary"}], ids=["gpt2_shaped", "other"])
def test_weights_that_are_not_finite_are_not_exported(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = build_model(dataclasses.replace(OURS, **changes), GRID)
    model.stack.norm.bias.data[:2] = torch.tensor([torch.nan, torch.inf])
    save_weights(model, tmp_path / "ours", GRID)
    with pytest.raises(CheckpointError, match=r"2 of (the )?32 \w+ of stack\.norm\.bias are"):
        export_weights(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path) -> None:
    save_weights(build_model(OURS, GRID), tmp_path / "ours", GRID)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"theirs cannot be written: .*too large"):
            export_weights(tmp_path / "ours", tmp_path / "theirs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_others_may_read_what_the_user_lets_them_read(tmp_path: Path) -> None:
    """safetensors makes files that nobody else on a cluster could load."""
    save_weights(build_model(OURS, GRID), tmp_path / "ours", GRID)
    export_weights(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "ordinary").touch()
    wanted = (tmp_path / "ordinary").stat().st_mode
    for folder in ("ours", "theirs"):
        assert {p.stat().st_mode for p in (tmp_path / folder).iterdir()} == {wanted}


# -- sources --------------------------------------------------------------------------------------


def test_a_conversion_is_kept_until_the_folder_changes(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "theirs"
    random_gpt2().save_pretrained(folder)
    first = resolve_weights_source(folder, GRID)
    assert first.parent == own_cache
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_weights_source(folder, GRID) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    random_gpt2(n_layer=1).save_pretrained(folder)
    second = resolve_weights_source(folder, GRID)
    assert second != first
    assert read_weights_config(second)[0].num_layers == 1


def test_a_cache_that_cannot_be_written_can_be_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_gpt2().save_pretrained(tmp_path / "theirs")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGAEGPT_CACHE", str(tmp_path / "file" / "cache"))
    message = r"/file/cache/converted/.* cannot be written: Not a directory; MEGAEGPT_CACHE=FOLDER"
    with pytest.raises(CheckpointError, match=message):
        resolve_weights_source(tmp_path / "theirs", GRID)


def test_two_conversions_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two machines that share a home: the slower one takes what the quicker one made."""
    random_gpt2().save_pretrained(tmp_path / "theirs")
    slower = hub.import_model

    def meanwhile(folder: Path, output: Path) -> None:
        monkeypatch.setattr(hub, "import_model", slower)
        resolve_weights_source(tmp_path / "theirs", GRID)
        slower(folder, output)

    monkeypatch.setattr(hub, "import_model", meanwhile)
    found = resolve_weights_source(tmp_path / "theirs", GRID)
    assert (our_logits(found) - their_logits(random_gpt2())).abs().max() < CLOSE
    assert [p.name for p in found.parent.iterdir()] == [found.name]


def test_a_damaged_conversion_is_found_and_named(tmp_path: Path) -> None:
    random_gpt2().save_pretrained(tmp_path / "theirs")
    kept = resolve_weights_source(tmp_path / "theirs", GRID) / "model.safetensors"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 4
    kept.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{kept} is damaged"):
        resolve_weights_source(tmp_path / "theirs", GRID)


def test_a_name_of_the_hub_is_downloaded_as_safetensors_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns, local_files_only))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = resolve_weights_source("gpt2-medium", GRID)
    assert (our_logits(folder) - their_logits(theirs)).abs().max() < CLOSE
    resolve_weights_source("hf:somebody/gpt2-variant", GRID)
    assert {name for name, _, _ in asked} == {"gpt2-medium", "somebody/gpt2-variant"}
    assert {p[-1] for _, p, _ in asked} == {"model*.safetensors*"}
    assert all({"config.json", "tokenizer.json"} <= set(p) for _, p, _ in asked)
    assert not any(only_here for _, _, only_here in asked)
    assert source_config("hf:somebody/gpt2-variant").hidden_size == 32
    assert asked[-1][2], "describing a model must not download it"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-13m", "smollm2-13m, and no model of this name: did you mean smollm2-135m?"),
        (
            "x",
            "x, and no model of this name; there are gpt2, gpt2-medium, gpt2-large, gpt2-xl, smol",
        ),
        ("runs/x", "runs/x"),
    ],
)
def test_a_word_that_names_nothing_is_an_error_with_the_names_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for find in (lambda name: resolve_weights_source(name, GRID), source_config):
        with pytest.raises(CheckpointError) as error:
            find(name)
        assert str(error.value).startswith(f"there is no folder {words}")


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", os.devnull)
    words = r"gpt2-xl cannot be had .* and give its folder; without a network .*, smollm2-135m "
    with pytest.raises(CheckpointError, match=words):
        resolve_weights_source("gpt2-xl", GRID)
    words = r"^model\.encoder\.source=hf:a/b: a/b cannot be had"
    with pytest.raises(CheckpointError, match=words):
        resolve_weights_source("hf:a/b", GRID, key="model.encoder.source")
    with pytest.raises(CheckpointError, match=words):
        source_config("hf:a/b", "model.encoder.source")
    assert source_config("gpt2-xl") == create_model_config("gpt2-xl (1558M)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bloom"}, "model_type=bloom is not supported, only gpt2, llama"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "relu"}, "activation_function=relu is none of"),
        ({"n_head": 5}, "not divisible by"),
        ({"n_head": None}, "n_head must be an integer, not null"),
        ({"n_embd": 64, "n_head": 8}, "has shape"),
        ({"n_layer": 3}, "it holds 2 layers, n_layer is 3"),
        ({"n_layer": 1}, "it holds 2 layers, n_layer is 1"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    random_gpt2().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        resolve_weights_source(tmp_path / "theirs", GRID)
