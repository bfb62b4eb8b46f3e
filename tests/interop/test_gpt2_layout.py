"""GPT-2s as people have them: what is imported computes their logits, the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaegpt.errors import CheckpointError
from megaegpt.interop.foreign_models import import_model
from tests.tiny.gpt2 import LENGTH, our_logits, random_gpt2, their_logits

CLOSE = 1e-5
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]
Write = Callable[[Tensors, Path], None]


def _folder(path: Path, change: Change, write: Write, **config: Any) -> Path:
    """A small model whose tensors, by transformers' names without the head's, went through
    ``change``.
    """
    model = random_gpt2(**config)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.1)  # logits of a size that fp32 gives to 1e-6
    model.config.save_pretrained(path)
    tensors = {
        n: t.clone() for n, t in model.state_dict().items() if config or n != "lm_head.weight"
    }
    write(change(tensors), path)
    return path


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def _under_the_heads_name(tensors: Tensors) -> Tensors:
    """As ``safetensors.torch.save_model`` keeps a shared tensor: under its first name."""
    return {n.replace("transformer.wte.weight", "lm_head.weight"): t for n, t in tensors.items()}


def _both_names(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def _with_masks(tensors: Tensors) -> Tensors:
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.uint8).tril()
    return tensors | {
        "transformer.h.0.attn.bias": mask,
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }


def _half(tensors: Tensors) -> Tensors:
    return {name: t.half() for name, t in tensors.items()}


def _bfloat16(tensors: Tensors) -> Tensors:
    return {name: t.bfloat16() for name, t in tensors.items()}


def _without_biases(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if not name.endswith(".bias")}


def _safetensors(tensors: Tensors, folder: Path) -> None:
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _sharded(tensors: Tensors, folder: Path) -> None:
    """Two files, and the index that says what is in which."""
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: parts[n % 2] for n, name in enumerate(tensors)}
    for part in parts:
        held = {n: t.contiguous() for n, t in tensors.items() if places[n] == part}
        save_file(held, folder / part, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _archive(tensors: Tensors, folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _before_torch_1_6(tensors: Tensors, folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [_safetensors, _sharded, _archive, _before_torch_1_6])
@pytest.mark.parametrize(
    "change",
    [
        dict,
        _bare,
        _under_the_heads_name,
        _both_names,
        _with_masks,
        _half,
        _bfloat16,
        _without_biases,
    ],
)
def test_a_tied_gpt2_computes_their_logits(tmp_path: Path, change: Change, write: Write) -> None:
    _compare(_folder(tmp_path / "theirs", change, write), tmp_path / "ours")


@pytest.mark.parametrize("write", [_safetensors, _sharded, _archive, _before_torch_1_6])
@pytest.mark.parametrize("change", [dict, _bare, _half])
def test_an_untied_gpt2_computes_their_logits(tmp_path: Path, change: Change, write: Write) -> None:
    folder = _folder(tmp_path / "theirs", change, write, tie_word_embeddings=False)
    _compare(folder, tmp_path / "ours")


def _compare(folder: Path, output: Path) -> None:
    import_model(folder, output)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (our_logits(output) - their_logits(theirs)).abs().max() < CLOSE


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_model_are_understood(tmp_path: Path, prefix: str) -> None:
    """transformers itself leaves such tensors out, and draws new ones."""

    def wrapped(tensors: Tensors) -> Tensors:
        return {prefix + name: t for name, t in tensors.items()}

    for name, change in (("plain", dict), ("wrapped", wrapped)):
        import_model(_folder(tmp_path / f"{name}-theirs", change, _archive), tmp_path / name)
    assert torch.equal(our_logits(tmp_path / "wrapped"), our_logits(tmp_path / "plain"))


def _another_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}


def _classifier(tensors: Tensors) -> Tensors:
    return tensors | {"score.weight": torch.zeros(2, 32)}


def _twice(tensors: Tensors) -> Tensors:
    return tensors | {"wpe.weight": tensors["transformer.wpe.weight"] + 1}


def _one_bias_less(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if n != "transformer.h.1.mlp.c_fc.bias"}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors | {name: change(tensors[name])}


def _with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_another_head, "lm_head.weight differs from wte.weight, though tie_word_embeddings is"),
        (_classifier, "no part of this GPT-2: score.weight"),
        (_twice, "it holds wpe.weight under two names"),
        (_one_bias_less, "the tensor h.1.mlp.c_fc.bias is missing"),
        (_changed("transformer.wpe.weight", Tensor.int), "wpe.weight is I32, not fp16"),
        (
            _changed("transformer.h.0.attn.c_attn.weight", Tensor.t),
            r"h.0.attn.c_attn.weight has shape \(96, 32\) in the file, \(32, 96\) by its",
        ),
        (
            _changed("transformer.ln_f.bias", _with_nan),
            "1 of 32 values of stack.norm.bias are NaN or infinite",
        ),
    ],
)
def test_what_would_be_left_out_or_misread_is_named(
    tmp_path: Path, change: Change, words: str
) -> None:
    folder = _folder(tmp_path / "theirs", change, _safetensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_model(folder, tmp_path / "ours")
    assert str(folder) in str(caught.value)


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw one at random."""
    folder = _folder(tmp_path / "theirs", dict, _safetensors)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"the tensor lm_head\.weight is missing"):
        import_model(folder, tmp_path / "ours")
