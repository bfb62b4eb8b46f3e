"""The compiled step writes what the uncompiled one writes.

Here it is captured whole and run by torch's operators; code is generated from it, and a CUDA graph
recorded, in ``tests/gpu``.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megaegpt.generation import compiled
from megaegpt.generation.compiled import CompiledSteps, uncompilable
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.loading import pack_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.generation.test_generator import VARIANTS
from tests.generation.tiny_models import GPT, SAMPLING, build, prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own

PROMPTS = [prompt(5), prompt(5, 1), prompt(19)]
LONG = replace(SAMPLING, max_new_tokens=40)  # GPT's context fills, chunks end


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_eagerly = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(
        compiled.torch, "compile", lambda f, mode, dynamic: compile_eagerly(f, dynamic=dynamic)
    )
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    ["gpt_rotary_window", "gpt_latent", "gpt_grouped_query", "egpt_local", "deepgpt_rotary"],
)
def test_the_text_is_that_of_the_uncompiled_step(name: str) -> None:
    model, encoder = build(VARIANTS[name])
    expected = TextGenerator(model, encoder).generate(PROMPTS, LONG)
    generator = TextGenerator(model, encoder, compiled=True)
    assert generator.generate(PROMPTS, LONG) == expected
    assert generator.generate(PROMPTS, LONG) == expected  # with caches that were used before


def test_weights_packed_for_uncompiled_steps_are_no_hindrance() -> None:
    model, _ = build(GPT)
    pack_weights(model.bfloat16())
    assert any(getattr(module, "packed", None) is not None for module in model.modules())
    (text,) = TextGenerator(model, compiled=True).generate(PROMPTS[:1], LONG)
    assert len(text) == LONG.max_new_tokens


def test_texts_that_are_written_in_turns_have_caches_of_their_own() -> None:
    model, _ = build(GPT)
    alone = [list(TextGenerator(model).stream(p, LONG)) for p in (prompt(5), prompt(5, 1))]
    generator = TextGenerator(model, compiled=True)
    streams = [generator.stream(p, LONG) for p in (prompt(5), prompt(5, 1))]
    texts = list(zip(*streams, strict=True))
    assert [list(text) for text in zip(*texts, strict=True)] == alone


def test_steps_are_compiled_once_for_texts_of_like_sizes() -> None:
    model, _ = build(replace(GPT, max_seq_len=300))
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


def test_what_cannot_be_compiled_is_named() -> None:
    model, _ = build(GPT)
    assert uncompilable(model) is None  # type: ignore[arg-type]
    model, _ = build(replace(GPT, document_end=2))
    assert "document_end" in (uncompilable(model) or "")  # type: ignore[arg-type]
    model.grid = ProcessGrid(tp_size=2)
    assert "tensor-parallel" in (uncompilable(model) or "")  # type: ignore[arg-type]
