"""Adapters in PEFT's form, as PEFT itself loads and writes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import LoRAConfig
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.interop.foreign_models import import_model
from megaegpt.interop.peft import export_peft, import_peft
from megaegpt.model.adapter_files import Base, load_merged, read_adapter, save_adapter
from megaegpt.model.adapters import add_adapters, initialize_adapters, target_layers
from megaegpt.model.build import Model, build_model, empty_model
from megaegpt.model.weights import load_weights, read_weights_config, tensors_digest
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of
from tests.tiny.families import in_fp64, random_model, sequences
from tests.tiny.tokenizers import trained_tokenizer

peft = pytest.importorskip("peft", reason="the package peft is not installed")

GRID = ProcessGrid()
TARGETS = {
    "llama_of_one_key_head": [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ],
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


@pytest.fixture(scope="module", params=["llama_of_one_key_head", "gpt2"])
def case(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in their form and in ours."""
    folder = tmp_path_factory.mktemp(case)
    random_model(case).save_pretrained(folder / "theirs")
    import_model(folder / "theirs", folder / "base")
    return folder


def adapted(folder: Path, lora: LoRAConfig, output: Path) -> Model:
    """The base with a random adapter, which is saved."""
    config, _ = read_weights_config(folder / "base")
    model = build_model(config, GRID)
    load_weights(model, folder / "base", GRID)
    add_adapters(model, lora)
    for layer in target_layers(model, lora).values():
        assert layer.lora is not None
        spec = spec_of(layer.lora.b)
        layer.lora.b.tp_spec = dataclasses.replace(spec, init_std=0.1)  # type: ignore[attr-defined]
    initialize_adapters(model, 1, GRID)
    base = Base(str(folder / "base"), tensors_digest(folder / "base"))
    save_adapter(model, output, GRID, lora, base)
    return model.eval()


@torch.no_grad()
def difference(ours: Model, theirs: Any) -> float:
    """Largest, of the logits, relative to the largest of them."""
    tokens = sequences(20)
    wanted = theirs(tokens).logits
    found = ours.head.full_logits(ours.hidden_states(tokens))[..., : wanted.shape[-1]]
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("targets", [("attention", "mlp"), ("query", "value", "up")])
def test_peft_loads_ours_and_computes_the_same(
    folder: Path, case: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    lora = LoRAConfig(rank=2, alpha=5.0, targets=targets)
    ours = adapted(folder, lora, tmp_path / "adapter")
    save_tokenizer(trained_tokenizer(), tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert load_tokenizer(tmp_path / "peft").fingerprint == trained_tokenizer().fingerprint
    theirs = peft.PeftModel.from_pretrained(random_model(case), tmp_path / "peft").eval()
    assert difference(ours, theirs) < 1e-6
    theirs = peft.PeftModel.from_pretrained(in_fp64(random_model(case)), tmp_path / "peft")
    assert difference(ours.double(), theirs.double().eval()) < 1e-9


def random_peft(case: str, output: Path, **options: Any) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=TARGETS[case], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(random_model(case), config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(output)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 1e-9),
        ({"use_rslora": True}, 1e-9),
        ({"layers_to_transform": [1]}, 1e-9),
        (  # scales that differ go into b, which is in fp32
            {
                "rank_pattern": {"c_attn": 2, "q_proj": 2},
                "alpha_pattern": {"c_fc": 1, "up_proj": 1},
            },
            1e-6,
        ),
    ],
    ids=["plain", "rslora", "some layers", "patterns"],
)
def test_adapters_of_peft_are_imported_with_equal_logits(
    folder: Path, case: str, options: dict[str, Any], bound: float, tmp_path: Path
) -> None:
    random_peft(case, tmp_path / "peft", **options)
    theirs = peft.PeftModel.from_pretrained(in_fp64(random_model(case)), tmp_path / "peft")
    (tmp_path / "ours").mkdir()
    base = folder / "base"
    import_peft(tmp_path / "peft", str(base), base, tmp_path / "ours")
    config, _ = read_weights_config(base)
    merged = empty_model(config, GRID).double().eval()
    load_merged(merged, read_adapter(tmp_path / "ours"), base, GRID)
    assert difference(merged, theirs.double().eval()) < bound


def test_an_adapter_comes_back_from_ours_bit_for_bit(
    folder: Path, case: str, tmp_path: Path
) -> None:
    random_peft(case, tmp_path / "peft")
    (tmp_path / "ours").mkdir()
    import_peft(tmp_path / "peft", "x", folder / "base", tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again")
    load = peft.utils.save_and_load.load_peft_weights
    before, after = (load(str(tmp_path / name), device="cpu") for name in ("peft", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is no adapter of low rank alone"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' is no adapter",
        ),
    ],
)
def test_what_adapters_of_ours_do_not_compute_is_refused(
    folder: Path, case: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    random_peft(case, tmp_path / "peft", **options)
    with pytest.raises(CheckpointError, match=message):
        import_peft(tmp_path / "peft", "x", folder / "base", tmp_path / "ours")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "has the rank 3, and adapter_config.json says 0"),
        ({"r": 5}, "has the rank 3, and adapter_config.json says 5"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not null"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be finite"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 is no probability"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"rank_pattern": [4]}, "rank_pattern must be"),
        ({"alpha_pattern": {"(": 1.0}}, r"'\(' is no pattern"),
        ({"alpha_pattern": {"(.*)*x": 1.0}}, "may take any time to match"),
    ],
)
def test_a_description_that_does_not_fit_its_tensors_is_refused(
    folder: Path, case: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    random_peft(case, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    described = json.loads(file.read_text()) | {"rank_pattern": {}, "alpha_pattern": {}}
    file.write_text(json.dumps(described | values))
    with pytest.raises(CheckpointError, match=message):
        import_peft(tmp_path / "peft", "x", folder / "base", tmp_path / "ours")


def test_an_adapter_of_another_model_is_refused(folder: Path, case: str, tmp_path: Path) -> None:
    random_peft(case, tmp_path / "peft")
    other = "gpt2" if case != "gpt2" else "llama_tied"
    random_model(other).save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "base")
    with pytest.raises(CheckpointError, match="which has no place in"):
        import_peft(tmp_path / "peft", "x", tmp_path / "base", tmp_path / "ours")
