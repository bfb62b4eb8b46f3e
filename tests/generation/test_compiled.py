"""The compiled step writes what the uncompiled one writes.

Here it is captured whole and run by torch's operators; code is generated from it, and a CUDA graph
recorded, in ``tests/gpu``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from megaegpt.generation import compiled
from megaegpt.generation.compiled import CompiledSteps, uncompilable
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.trained import choose_products, round_to_int8
from megaegpt.model.build import gpt_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.matmul import onednn_is_available
from tests.generation.test_generator import VARIANTS
from tests.tiny.models import GPT, SAMPLING, build_with_encoder, prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own

PROMPTS = [prompt(5), prompt(5, 1), prompt(19)]
LONG = replace(SAMPLING, max_new_tokens=40)  # GPT's context fills, chunks end


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fullgraph``: what would run uncompiled, after too many compilations too, is an error."""
    compile_eagerly = functools.partial(torch.compile, backend="eager", fullgraph=True)
    functools.update_wrapper(compile_eagerly, torch.compile)  # its signature is looked at
    monkeypatch.setattr(compiled.torch, "compile", compile_eagerly)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    [
        "gpt_rotary_window",
        "gpt_latent",
        "gpt_grouped_query",
        "gpt_qwen3",
        "egpt_olmo2",
        "deepgpt_rotary",
    ],
)
def test_the_text_is_that_of_the_uncompiled_step(name: str) -> None:
    model, encoder = build_with_encoder(VARIANTS[name])
    expected = TextGenerator(model, encoder).generate(PROMPTS, LONG)
    generator = TextGenerator(model, encoder, compiled=True)
    assert generator.generate(PROMPTS, LONG) == expected
    assert generator.generate(PROMPTS, LONG) == expected  # with caches that were used before


@pytest.mark.parametrize("name", ["gpt_rotary_window", "gpt_latent", "gpt_qwen3"])
def test_logits_are_those_of_the_whole_text(name: str) -> None:
    model = gpt_of(*build_with_encoder(VARIANTS[name]))
    tokens = torch.tensor([prompt(12), prompt(12, 1)])
    step = CompiledSteps(model, with_head=True).lend(tokens, 2, 12)
    with torch.inference_mode():
        expected = model.head.full_logits(model.hidden_states(tokens))
        logits = [step(column).clone() for column in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(
    not onednn_is_available(torch.bfloat16), reason="oneDNN needs AVX-512 for products in bf16"
)
def test_weights_packed_for_uncompiled_steps_are_no_hindrance() -> None:
    model, _ = build_with_encoder(GPT)
    choose_products(model.bfloat16())
    assert any(getattr(module, "packed", None) is not None for module in model.modules())
    (text,) = TextGenerator(model, compiled=True).generate(PROMPTS[:1], LONG)
    assert len(text) == LONG.max_new_tokens


def test_a_model_may_change_its_values_and_its_precision_between_texts() -> None:
    model, _ = build_with_encoder(GPT)
    generator = TextGenerator(model, compiled=True)
    for change in (torch.zero_, lambda p: p.normal_(), torch.Tensor.float):
        for parameter in model.parameters():
            parameter.data = change(parameter.data)
        expected = TextGenerator(model).generate(PROMPTS[:1], LONG)
        assert generator.generate(PROMPTS[:1], LONG) == expected


def test_texts_that_are_written_in_turns_have_caches_of_their_own() -> None:
    model, _ = build_with_encoder(GPT)
    alone = [list(TextGenerator(model).stream(p, LONG)) for p in (prompt(5), prompt(5, 1))]
    generator = TextGenerator(model, compiled=True)
    streams = [generator.stream(p, LONG) for p in (prompt(5), prompt(5, 1))]
    texts = list(zip(*streams, strict=True))
    assert [list(text) for text in zip(*texts, strict=True)] == alone


def test_steps_are_compiled_once_for_texts_of_like_sizes() -> None:
    model, _ = build_with_encoder(replace(GPT, max_seq_len=300))
    steps = CompiledSteps(model, with_head=True)  # type: ignore[arg-type]

    class Borrower:
        pass

    first, second = Borrower(), Borrower()
    step = steps.lend(first, 2, 100)
    assert steps.lend(second, 2, 100) is not step
    del first
    third = Borrower()
    assert steps.lend(third, 2, 128) is step
    assert steps.lend(Borrower(), 2, 129).cache.capacity == 256
    assert steps.lend(Borrower(), 2, 290).cache.capacity == 300


@pytest.mark.parametrize(
    ("layers", "windows", "graphs"),
    [
        (12, {}, 3),  # the embedding, four blocks that stand for all, the head
        (5, {}, 3),
        (8, {"window": 4, "window_every": 4}, 3),
        (6, {"window": 4, "window_every": 2}, 4),  # in threes the two kinds change places
    ],
)
def test_blocks_share_code(
    monkeypatch: pytest.MonkeyPatch, layers: int, windows: dict[str, int], graphs: int
) -> None:
    captured = []

    def count(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward

    counted = functools.partial(compiled.torch.compile, backend=count)
    functools.update_wrapper(counted, torch.compile)
    monkeypatch.setattr(compiled.torch, "compile", counted)
    config = replace(VARIANTS["gpt_qwen3"], num_layers=layers, **windows)  # type: ignore[arg-type]
    model, _ = build_with_encoder(config)
    expected = TextGenerator(model).generate(PROMPTS[:1], LONG)
    assert TextGenerator(model, compiled=True).generate(PROMPTS[:1], LONG) == expected
    assert len(captured) == graphs


def test_models_that_differ_in_a_constant_and_many_batch_sizes_have_steps_of_their_own() -> None:
    """A step does not look whether its model is the one that it was compiled for."""
    rotary = VARIANTS["gpt_rotary_window"]
    config = replace(SAMPLING, max_new_tokens=4)
    for base, sizes in ((10_000.0, range(1, 10)), (3.0, [1])):  # torch's own limit is 8 codes
        model, _ = build_with_encoder(replace(rotary, rope_base=base))
        generator = TextGenerator(model, compiled=True)
        for size in sizes:
            prompts = [prompt(5, row) for row in range(size)]
            expected = TextGenerator(model).generate(prompts, config)
            assert generator.generate(prompts, config) == expected


def test_what_cannot_be_compiled_is_named() -> None:
    model, _ = build_with_encoder(GPT)
    assert uncompilable(model) is None  # type: ignore[arg-type]
    rounded, _ = build_with_encoder(GPT)
    round_to_int8(rounded)
    assert "int8" in (uncompilable(rounded) or "")  # type: ignore[arg-type]
    model, _ = build_with_encoder(replace(GPT, document_end=2))
    assert "document_end" in (uncompilable(model) or "")  # type: ignore[arg-type]
    model.grid = ProcessGrid(tp_size=2)
    assert "tensor-parallel" in (uncompilable(model) or "")  # type: ignore[arg-type]
