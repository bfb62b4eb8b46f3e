"""Every family against transformers' own model: what is imported computes the same, and what is
exported is the same again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megaegpt.config import GenerationConfig, ModelConfig, RopeScalingConfig
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.generation.generator import TextGenerator
from megaegpt.interop import export, foreign_models
from megaegpt.interop.description import Description
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.families import FAMILIES
from megaegpt.interop.foreign_models import import_model, read_foreign
from megaegpt.interop.tensor_files import open_tensors
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.interop.translation import (
    differences,
    family_of,
    lack,
    nearest_family,
    to_ours,
    to_theirs,
)
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import empty_model
from megaegpt.model.gpt import GPT
from megaegpt.model.rotary import rotary_frequencies
from megaegpt.model.segments import padding_segments
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed
from tests.interop.over_ranks import logits_and_states
from tests.interop.tensors_alive import TensorsAlive
from tests.tiny.families import CASES, VOCAB, in_fp64, random_model, sequences
from tests.tiny.tokenizers import trained_tokenizer

GRID = ProcessGrid()
FP64 = 1e-9
"""Relative to the largest value."""


def _saved(case: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = random_model(case, **changes)
    model.save_pretrained(folder)
    return model


def _imported(source: Path, output: Path) -> GPT:
    import_model(source, output)
    model = empty_model(read_weights_config(output)[0], GRID).eval()
    load_weights(model, output, GRID)
    assert isinstance(model, GPT)
    return model


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_are_theirs(tmp_path: Path, case: str) -> None:
    """At the longest length, four times what the scaled ones were trained on."""
    theirs = in_fp64(_saved(case, tmp_path / "theirs"))
    ours = _imported(tmp_path / "theirs", tmp_path / "ours").double()
    tokens, targets = sequences(), sequences(seed=3)
    logits = theirs(tokens).logits
    assert _relative(ours.logits(tokens)[..., :VOCAB], logits) <= FP64
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    our_loss = ours(tokens, targets)
    assert _relative(our_loss, loss) <= FP64

    loss.backward()
    our_loss.backward()
    family = family_of(Description({"model_type": theirs.config.model_type}, case))
    layout = TensorLayout(ours.config, family, gguf=False)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {layout.full_name(name) for name in layout.shapes} == expected.keys()
    for name in layout.shapes:
        assert _relative(layout.give(name, gradients.get), expected[layout.full_name(name)]) <= (
            FP64
        ), name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_rows_padded_on_the_left_have_their_logits(tmp_path: Path, case: str) -> None:
    """Computed at once, and in pieces through a cache, the first of which ends behind the padding
    of every row.
    """
    theirs = in_fp64(_saved(case, tmp_path / "theirs"))
    ours = _imported(tmp_path / "theirs", tmp_path / "ours").double()
    tokens, real = sequences(33, rows=3), torch.ones(3, 33, dtype=torch.bool)
    real[0, :12] = real[2, :3] = False
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits[real]
    segments = padding_segments(real)
    at_once = ours.logits(tokens, segments=segments)[real]
    assert _relative(at_once[:, :VOCAB], expected) <= FP64

    cache = KVCache(ours.config, GRID, 3, 33, dtype=torch.float64)
    sizes = [13, 1, 7, 1, 11]
    pieces = zip(tokens.split(sizes, dim=1), segments.split(sizes, dim=1), strict=True)
    cached = torch.cat([ours.logits(piece, cache, own) for piece, own in pieces], dim=1)[real]
    assert _relative(cached[:, :VOCAB], expected) <= FP64


GREEDY = [(case, 35) for case in ("llama3", "llama_yarn", "mistral", "qwen2", "qwen3", "olmo2")]
GREEDY_LONG = [pytest.param(case, 200, marks=pytest.mark.long) for case in CASES]


@pytest.mark.parametrize(("case", "new"), [*GREEDY, *GREEDY_LONG])
def test_greedy_text_under_the_cache_is_theirs(tmp_path: Path, case: str, new: int) -> None:
    longest = "n_positions" if case == "gpt2" else "max_position_embeddings"
    theirs = _saved(case, tmp_path / "theirs", **{longest: new + 5})
    ours = _imported(tmp_path / "theirs", tmp_path / "ours")
    prompt = sequences(5, rows=1)
    expected = theirs.generate(
        prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    greedy = GenerationConfig(max_new_tokens=new, temperature=0.0)
    assert [*prompt[0].tolist(), *TextGenerator(ours).stream(prompt[0].tolist(), greedy)] == (
        expected[0].tolist()
    )


OVER_TWO = [(case, {}, 2) for case in ("llama_with_biases", "qwen3", "olmo2")]
OVER_FOUR = [
    pytest.param(
        case, {"num_key_value_heads": 4} if case == "olmo2" else {}, 4, marks=pytest.mark.long
    )
    for case in CASES
]


@pytest.mark.parametrize(("case", "changes", "ranks"), [*OVER_TWO, *OVER_FOUR])
def test_ranks_compute_what_one_does(
    tmp_path: Path, distributed: Distributed, case: str, changes: dict[str, int], ranks: int
) -> None:
    """OLMo 2's norm is over the heads of all, so that each needs a key head of its own."""
    theirs = _saved(case, tmp_path / "theirs", **changes)
    with torch.no_grad():
        expected = theirs(sequences()).logits
        states = theirs.base_model(sequences()).last_hidden_state
    source, cache = str(tmp_path / "theirs"), str(tmp_path / "cache")
    for logits, ours in distributed(ranks, logits_and_states, source, sequences(), cache):
        assert _relative(logits[..., :VOCAB], expected) < 1e-5
        assert _relative(ours, states) < 1e-5


# -- back again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again_is_bit_for_bit(tmp_path: Path, case: str) -> None:
    theirs = _saved(case, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "again")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(reloaded(sequences()).logits, theirs(sequences()).logits)
    import_model(tmp_path / "again", tmp_path / "ours_again")
    assert read_weights_config(tmp_path / "ours_again")[0] == _resolved_like(
        read_weights_config(tmp_path / "ours")[0], read_weights_config(tmp_path / "ours_again")[0]
    )


def _resolved_like(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """Defaults are spelled out in what is exported; another family may have the same model."""
    assert differences(config, nearest_family(other)[0]) == []
    return other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = random_model("qwen2").to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "again", dtype)
    again = load_file(tmp_path / "again" / "model.safetensors")
    kept = {n: t for n, t in theirs.state_dict().items() if n in again}
    assert kept.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert AutoConfig.from_pretrained(tmp_path / "again").dtype == dtype


@pytest.mark.parametrize("case", ["gpt2", "olmo2"])
def test_one_tensor_at_a_time_is_in_memory(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = TensorsAlive(), TensorsAlive()
    monkeypatch.setattr(foreign_models, "open_tensors", reading.opening(open_tensors))
    monkeypatch.setattr(export, "open_ours", writing.open_ours)
    _saved(case, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "again")
    assert min(len(reading.counts), len(writing.counts)) > 20
    assert max(reading.counts) <= 2  # the last one, until the next has its name
    parts = 3 if case == "gpt2" else 1  # queries, keys and values are one tensor there
    assert max(writing.counts) <= parts + 1


# -- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: Any) -> None:
    theirs = AutoConfig.for_model(family.model_type).to_dict()
    full = to_ours(Description(theirs, "full"), family)
    sparse = to_ours(Description({"model_type": family.model_type}, "sparse"), family)
    assert differences(full, family) == differences(sparse, family) == []
    assert (full.kv_heads, full.head_size) == (sparse.kv_heads, sparse.head_size)
    assert full.rope_base == sparse.rope_base


def _scaling(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": None, "rope_scaling": values}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("llama", {"model_type": "gpt_neox"}, "model_type=gpt_neox is not supported, only gpt2, l"),
        ("llama", {"mlp_bias": True}, "attention_bias=False with mlp_bias=True cannot be"),
        ("llama", {"hidden_act": "relu"}, "hidden_act=relu is none of silu"),
        ("llama", {"residual_multiplier": 2.0}, "residual_multiplier=2.0 is not known to Llama"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"auto_map": {"AutoModel": "x.py"}}, "auto_map="),
        ("llama", {"head_dim": "8"}, 'head_dim must be an integer or null, not "8"'),
        ("llama", _scaling(rope_type="dynamic", factor=2.0), "rope_type=dynamic is none of"),
        ("llama", _scaling(rope_type="linear"), "factor is missing"),
        ("llama", _scaling(rope_type="linear", factor=0.5), "factor"),
        ("llama", _scaling(rope_type="linear", factor=2.0, beta_fast=1), "beta_fast=1 has no"),
        ("llama", _scaling(rope_type="llama3", factor=8.0), "low_freq_factor is missing"),
        ("llama", _scaling(rope_type="yarn", factor=2.0, truncate=False), "truncate=False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
            | {"layer_types": None},
            "max_window_layers=1 of 2 layers without a window cannot be expressed",
        ),
        (
            "qwen2_with_windows",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types without a window where every n-th layer is",
        ),
        ("qwen2_with_windows", {"layer_types": ["x"]}, "layer_types=.* is no list of"),
        ("qwen2_with_windows", {"use_sliding_window": False}, "there is no sliding_window in use"),
        ("olmo2", {"num_hidden_layers": 3}, "it holds 2 layers, num_hidden_layers is 3"),
        ("olmo2", {"intermediate_size": 40}, r"gate_proj.weight has shape \(44, 24\) in the"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_name(
    tmp_path: Path, case: str, changes: dict[str, Any], words: str
) -> None:
    _saved(case, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        import_model(tmp_path / "theirs", tmp_path / "ours")
    assert str(tmp_path / "theirs") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_that_qwen_does_not_say_has_its_default_size() -> None:
    theirs = random_model("qwen2").config.to_dict() | {"use_sliding_window": True}
    theirs |= {"max_window_layers": 0, "layer_types": None}
    del theirs["sliding_window"]
    assert to_ours(Description(theirs, "x"), family_of(Description(theirs, "x"))).window == 4096


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = random_model("qwen3")
    kept = {n: t for n, t in model.state_dict().items() if "1.self_attn.k_norm" not in n}
    model.save_pretrained(tmp_path / "theirs", state_dict=kept)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight is missing"):
        import_model(tmp_path / "theirs", tmp_path / "ours")


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_weights_are_written(
    tmp_path: Path,
) -> None:
    _saved("llama", tmp_path / "theirs")
    save_tokenizer(trained_tokenizer(), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"theirs holds a tokenizer of 700 tokens and a mod"):
        import_model(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_old_and_new_words_for_rotary_positions_mean_the_same(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` before version 5 of transformers."""
    model = random_model("llama3")
    new = model.config.to_dict()
    parameters = dict(new.pop("rope_parameters"))
    old = new | {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    family = family_of(Description(old, "old"))
    new = model.config.to_dict()
    assert to_ours(Description(old, "x"), family) == to_ours(Description(new, "x"), family)


def test_the_smallest_published_models_are_described_as_ours(tmp_path: Path) -> None:
    """SmolLM2-135M's config.json."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    }
    theirs = Description(published, "config.json")
    config = to_ours(theirs, family_of(theirs))
    layout = TensorLayout(config, family_of(theirs), gguf=False)
    assert sum(torch.Size(shape).numel() for shape in layout.shapes.values()) == 134_515_008
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"describes a model of 134,479,872 parameters or"):
        read_foreign(tmp_path)


def test_scaling_by_a_larger_base_is_exported_as_that_base() -> None:
    family = family_of(Description({"model_type": "llama"}, "x"))
    config = to_ours(Description({"model_type": "llama"}, "x"), family)
    scaling = RopeScalingConfig("ntk", 4.0)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    assert differences(scaled, family) == []
    again = to_ours(Description(to_theirs(scaled, family), "x"), family)
    device = torch.device("cpu")
    torch.testing.assert_close(
        rotary_frequencies(again, device), rotary_frequencies(scaled, device), rtol=1e-14, atol=0
    )


def test_what_is_no_gpt_is_lacked_by_all_families() -> None:
    family, lacking = nearest_family(ModelConfig(kind="egpt"))
    assert lack(family, lacking) == "no family has kind=egpt"
    family, lacking = nearest_family(ModelConfig(attention="latent"))
    assert lack(family, lacking) == "GPT-2 has no attention=latent"


def test_families_have_their_articles() -> None:
    assert {"a Llama", "a GPT-2", "a Qwen 3", "an OLMo 2"} < set(map(str, FAMILIES))


@torch.no_grad()
def test_scaling_by_a_larger_base_computes_what_that_base_does(tmp_path: Path) -> None:
    """A Llama of transformers at four times the length, whose base is the one that NTK gives."""
    base = 500.0 * 4.0 ** (6 / (6 - 2))  # heads of 6 columns
    parameters = {"rope_type": "default", "rope_theta": base}
    theirs = in_fp64(_saved("llama", tmp_path / "theirs", rope_parameters=parameters))
    import_model(tmp_path / "theirs", tmp_path / "ours")
    config = read_weights_config(tmp_path / "ours")[0]
    assert (config.rope_base, config.head_size) == (base, 6)
    scaling = RopeScalingConfig("ntk", 4.0)
    config = dataclasses.replace(config, rope_base=500.0, rope_scaling=scaling)
    ours = empty_model(config, GRID).eval()
    load_weights(ours, tmp_path / "ours", GRID)
    logits = ours.double().logits(sequences())
    assert _relative(logits[..., :VOCAB], theirs(sequences()).logits) <= FP64
