"""The names for notebooks: their examples run, and they agree with what is behind them."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import megaegpt
from megaegpt import api
from megaegpt.config import EncoderConfig, ModelConfig, RunConfig
from megaegpt.errors import ConfigError, DataError, NotFiniteError
from megaegpt.model.weights import load_weights, save_weights
from megaegpt.parallel.grid import ProcessGrid

CONFIG = ModelConfig(
    vocab_size=90, max_seq_len=16, hidden_size=32, num_layers=2, num_heads=4, init_std=0.4
)
BYTES = SimpleNamespace(
    encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode()
)


@pytest.fixture
def model():
    return api.GPTModel(CONFIG)


@pytest.mark.parametrize("name", megaegpt.__all__)
def test_every_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented = getattr(api, name)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(documented, name, module=sys.modules[documented.__module__])
    results = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF | doctest.ELLIPSIS).run(
        example
    )
    assert results.attempted > 0
    assert results.failed == 0


def test_the_page_on_notebooks_is_true(tmp_path, monkeypatch):
    page = Path(megaegpt.__file__).parents[1] / "docs" / "notebooks.md"
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert results.attempted > 10
    assert results.failed == 0


def test_importing_the_package_imports_neither_torch_nor_anything_of_its_own():
    program = (
        "import sys, megaegpt\n"
        "print({'torch', 'numpy', 'megaegpt.config'} & set(sys.modules))\n"
        "print(set(megaegpt.__all__) <= set(dir(megaegpt)))\n"
        "from megaegpt import create_model_config\n"
        "print('deepspeed' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["set()", "True", "False False"], done.stderr


def test_overrides_of_a_configuration_that_is_made_already_are_refused():
    with pytest.raises(ConfigError, match=r"dataclasses\.replace"):
        megaegpt.pretrain(RunConfig(), ["training.steps=3"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"megaegpt.*no attribute 'GTPModel'"):
        megaegpt.GTPModel  # noqa: B018


def test_the_loss_is_cross_entropy_of_the_logits(model):
    inputs, targets = torch.randint(90, (2, 3, 12)).unbind()
    targets[0, :5] = -100
    loss = api.compute_batch_loss(inputs, targets, model)
    logits = model(inputs)
    assert logits.shape == (3, 12, 90)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    through_logits = torch.autograd.grad(
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    torch.testing.assert_close(grads, through_logits)


def test_a_batch_without_targets_has_loss_and_gradient_0(model):
    inputs = torch.randint(90, (2, 4))
    loss = api.compute_batch_loss(inputs, torch.full_like(inputs, -100), model)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_greedy_text_is_the_largest_logit_again_and_again(model):
    prompts = torch.randint(90, (2, 5))
    model.train()
    ids = api.generate_text_autoregressive(model, prompts, max_new_tokens=8)
    assert model.training
    expected = prompts
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)


def test_text_ends_at_the_given_token_and_is_filled_up_with_it(model):
    prompts = torch.randint(90, (2, 5), generator=torch.Generator().manual_seed(1))
    free = api.generate_text_autoregressive(model, prompts, 8)
    first = free[0, 5].item()
    assert first not in free[1, 5:]
    ids = api.generate_text_autoregressive(model, prompts, 8, eos_token_id=first)
    assert ids[0, 5:].tolist() == [first] * 8
    assert torch.equal(ids[1], free[1])
    alone = api.generate_text_autoregressive(model, prompts[:1], 8, eos_token_id=first)
    assert torch.equal(alone, prompts[:1])


def test_the_seed_decides_what_is_drawn(model):
    prompt = torch.randint(90, (1, 5))
    texts = [
        api.generate_text_autoregressive(model, prompt, 10, temperature=1.0, seed=seed).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_any_tokenizer_with_encode_and_decode_will_do():
    ids = api.text_to_token_ids("ab", BYTES)
    assert ids.tolist() == [[97, 98]]
    assert api.token_ids_to_text(ids, BYTES) == api.token_ids_to_text(ids[0], BYTES) == "ab"
    with pytest.raises(DataError, match="one row"):
        api.token_ids_to_text(torch.zeros(2, 3, dtype=torch.int64))


def test_all_of_a_text_is_ordinary_to_an_encoding_of_tiktoken_too():
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    text = "one<|endoftext|>two"
    assert api.text_to_token_ids(text, encoding).tolist() == [list(text.encode())]
    inputs, _ = next(iter(api.create_pretraining_dataloader(text, 1, 18, tokenizer=encoding)))
    assert inputs.tolist() == [list(text[:18].encode())]


def test_windows_cover_the_text_and_targets_follow_their_inputs():
    text = "".join(map(chr, range(33, 33 + 25)))
    batches = api.create_pretraining_dataloader(
        text, batch_size=2, max_length=6, tokenizer=BYTES, shuffle=False
    )
    rows = [
        (row.tolist(), following.tolist())
        for batch in batches
        for row, following in zip(*batch, strict=True)
    ]
    starts = range(33, 33 + 24, 6)
    assert rows == [(list(range(s, s + 6)), list(range(s + 1, s + 7))) for s in starts]


def test_stride_order_and_incomplete_batches_are_the_callers_choice():
    def starts(**options):
        batches = api.create_pretraining_dataloader(
            "".join(map(chr, range(1, 26))), 4, 6, tokenizer=BYTES, **options
        )
        return [row[0].item() for inputs, _ in batches for row in inputs]

    assert starts(stride=3, shuffle=False, drop_last=False) == [1, 4, 7, 10, 13, 16, 19]
    assert starts(stride=3, shuffle=False) == [1, 4, 7, 10]
    drawn = starts(stride=3, drop_last=False)
    assert drawn != sorted(drawn) == [1, 4, 7, 10, 13, 16, 19]
    assert drawn == starts(stride=3, drop_last=False) != starts(stride=3, drop_last=False, seed=2)
    with pytest.raises(DataError, match=r"25 tokens.*max_length \+ 1 = 26"):
        api.create_pretraining_dataloader("x" * 25, max_length=25, tokenizer=BYTES)


def test_weights_move_between_the_api_and_the_package(model, tmp_path):
    save_weights(model, tmp_path, ProcessGrid())
    other = api.GPTModel(CONFIG, seed=2)
    tokens = torch.randint(90, (1, 7))
    assert not torch.equal(model(tokens), other(tokens))
    load_weights(other, tmp_path, ProcessGrid())
    assert torch.equal(model(tokens), other(tokens))


def test_the_models_grid_follows_its_weights(model):
    assert model.to("meta").grid.device.type == "meta"


def test_other_kinds_of_model_are_refused():
    config = ModelConfig(kind="egpt", encoder=EncoderConfig(source="somewhere"))
    with pytest.raises(ConfigError, match="kind gpt, not egpt"):
        api.GPTModel(config)


@pytest.mark.parametrize("prompts", [[], [[]], torch.zeros(2, 0, dtype=torch.int64), [1, 2]])
def test_no_prompts_are_named(model, prompts):
    with pytest.raises(DataError, match="are no prompts"):
        api.generate_text_autoregressive(model, prompts, 3)


def test_prompts_of_different_lengths_are_named(model):
    with pytest.raises(DataError, match="different lengths"):
        api.generate_text_autoregressive(model, [[1], [1, 2]], 3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_k": -1},
        {"seed": 2**64},
        {"seed": -1},
        {"max_new_tokens": -1},
    ],
)
def test_sampling_out_of_range_is_named(model, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        api.generate_text_autoregressive(model, [[1]], **{"max_new_tokens": 3, **options})


def test_a_text_too_short_for_one_batch_is_named():
    with pytest.raises(DataError, match="has 2 windows of max_length=6, not the 4 of one batch"):
        api.create_pretraining_dataloader("x" * 14, 4, 6, tokenizer=BYTES)
    batches = api.create_pretraining_dataloader("x" * 14, 4, 6, tokenizer=BYTES, drop_last=False)
    assert len(list(batches)) == 1
    with pytest.raises(ConfigError, match="stride=0 must be a whole number of at least 1"):
        api.create_pretraining_dataloader("x" * 50, 4, 6, stride=0, tokenizer=BYTES)


@pytest.mark.parametrize("wrong", [-1, 90])
def test_prompts_outside_the_vocabulary_are_named(model, wrong):
    with pytest.raises(DataError, match=f"the id {wrong}, and the model's are 0 to 89"):
        api.generate_text_autoregressive(model, [[1, wrong]], 3)


@pytest.mark.parametrize(
    "ids", [torch.ones(4, dtype=torch.int64), torch.ones(1, 4), torch.ones(1, 0, dtype=torch.int64)]
)
def test_ids_that_are_no_batch_are_named(model, ids):
    with pytest.raises(DataError, match=r"of shape \(.*\) is no batch: give integer ids"):
        model(ids)
    with pytest.raises(DataError, match="is no batch"):
        api.compute_batch_loss(ids, ids, model)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short_to_predict_anything_has_no_loss(model, text):
    ids = api.text_to_token_ids(text)
    with pytest.raises(DataError, match=r"shape \(1, 0\) is no batch"):
        api.compute_batch_loss(ids[:, :-1], ids[:, 1:], model)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_sizes_that_are_no_number_of_tokens_are_named(size):
    with pytest.raises(ConfigError, match=r"max_length=.* must be a whole number of at least 1"):
        api.create_pretraining_dataloader("one two three " * 50, max_length=size)


def test_a_batch_of_no_records_is_named():
    with pytest.raises(DataError, match="a batch without items"):
        api.create_instruction_collate_fn()([])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rmsnorm"},
        {"mlp": "x"},
        {"num_heads": 5},
        {"rope_base": -1.0, "positions": "rotary"},
        {"dropout": 2.0},
    ],
    ids=str,
)
def test_a_configuration_that_no_model_has_is_named(changes):
    config = replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match=f"the model's configuration: .*{next(iter(changes))}"):
        api.GPTModel(config)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "x", None])
def test_a_seed_that_is_none_is_named(seed):
    with pytest.raises(ConfigError, match=r"seed=.* must be a whole number from 0"):
        api.GPTModel(CONFIG, seed=seed)
    with pytest.raises(ConfigError, match=r"seed=.* must be a whole number from 0"):
        api.create_pretraining_dataloader("x" * 50, 2, 6, tokenizer=BYTES, seed=seed)


def test_numbers_that_are_no_ids_are_named(model):
    ids = torch.tensor([[1, 2, 3]])
    for targets in (ids.float(), ids.bool()):
        with pytest.raises(DataError, match="is no batch: give integer ids"):
            api.compute_batch_loss(ids, targets, model)
    for prompts in ([[1.5, 2.0]], [[float("nan")]], [[True]], [["a"]], [[2**70]]):
        with pytest.raises(DataError, match="the prompts are"):
            api.generate_text_autoregressive(model, prompts, 3)
    with pytest.raises(DataError, match=r"ids are integers, not torch\.float32"):
        api.token_ids_to_text(torch.tensor([1.5]))
    for end in (-5, 90, 1.5):
        with pytest.raises(ConfigError, match=r"eos_token_id=.* would end no text"):
            api.generate_text_autoregressive(model, ids, 3, eos_token_id=end)


def test_a_model_that_has_diverged_writes_nothing():
    diverged = api.GPTModel(CONFIG)
    torch.nn.init.constant_(diverged.embedding.weight, float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFiniteError, match="logits are not finite"):
            api.generate_text_autoregressive(diverged, [[1, 2]], 3, temperature)
