"""Text with caches is the text without, for every model, across every border."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaegpt.config import EncoderConfig, GenerationConfig, ModelConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import NotFiniteError
from megaegpt.generation.generator import Prompt, TextAssembler, TextGenerator, sample_text
from megaegpt.model.decoding import context_start
from megaegpt.model.egpt.egpt_decoder import EGPTDecoder
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.models import (
    CHUNK,
    CHUNKS,
    DEEPGPT,
    EGPT,
    GPT,
    MAX_LEN,
    SAMPLING,
    VOCAB,
    build_with_encoder,
    egpt,
    prompt,
    variant,
)

OVERLAP = EncoderConfig(overlap=3)
EGPT_VARIANTS = {
    "original": EGPT,
    "local": egpt(local_attention=True),
    "gate": egpt(memory_gate=True),
    "local_gate": egpt(local_attention=True, memory_gate=True),
    "memory": egpt(token_memory=True, memory_dim=8, memory_pointers=2),
    "memory_local": replace(
        egpt(local_attention=True, token_memory=True, memory_dim=8, memory_chunks=1),
        encoder=OVERLAP,
    ),
    "one_chunk": egpt(num_chunks=1, local_attention=True),
    "window_rotary": replace(egpt(local_attention=True), window=3, positions="rotary"),
    "grouped_query": replace(EGPT, num_kv_heads=2),
    "latent_local": replace(egpt(local_attention=True), attention="latent", latent_dim=8),
    "overlap": replace(egpt(local_attention=True), encoder=OVERLAP),
    "olmo2": variant("olmo2", "rotary", egpt(local_attention=True)),
    "sink": replace(egpt(local_attention=True, attention_sink=True), encoder=OVERLAP),
    "sink_latent_memory": replace(
        egpt(local_attention=True, attention_sink=True, memory_gate=True, token_memory=True),
        attention="latent",
        latent_dim=8,
    ),
}
VARIANTS = {
    "gpt": GPT,
    "gpt_rotary_window": replace(GPT, positions="rotary", window=5),
    "gpt_latent": replace(
        GPT, attention="latent", latent_dim=8, positions="rotary", rope_head_dim=4
    ),
    "gpt_documents": replace(GPT, document_end=2),
    "gpt_grouped_query": replace(GPT, num_kv_heads=1, positions="sinusoidal"),
    "gpt_qwen3": variant("qwen3", "rotary_extended", GPT),
    **{f"egpt_{name}": config for name, config in EGPT_VARIANTS.items()},
    "deepgpt": DEEPGPT,
    "deepgpt_rotary": replace(DEEPGPT, positions="rotary"),
    "deepgpt_overlap": replace(DEEPGPT, encoder=OVERLAP),
}


def _generate(config: ModelConfig, prompts: list[list[int]], new: int, **options) -> list:
    generator = TextGenerator(*build_with_encoder(config))
    return generator.generate(prompts, replace(SAMPLING, max_new_tokens=new), **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_text_is_the_uncached_text_past_every_border(name: str) -> None:
    """From 5 tokens past the ends of five chunks, which is past num_chunks and max_seq_len."""
    new = 5 * CHUNK
    cached = _generate(VARIANTS[name], [prompt(5)], new)
    uncached = _generate(VARIANTS[name], [prompt(5)], new, use_cache=False)
    assert cached == uncached
    assert len(set(cached[0])) > new // 4  # a text, not one token again and again


@pytest.mark.parametrize("name", ["gpt", "egpt_original", "egpt_local_gate", "deepgpt"])
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 6 * CHUNK + 3])
def test_a_prompt_may_have_any_length(name: str, length: int) -> None:
    config, new = VARIANTS[name], CHUNK + 2
    cached = _generate(config, [prompt(length)], new)
    assert cached == _generate(config, [prompt(length)], new, use_cache=False)


@pytest.mark.parametrize("config", [GPT, EGPT, DEEPGPT], ids=["gpt", "egpt", "deepgpt"])
def test_prompts_of_a_batch_are_continued_as_if_alone(config: ModelConfig) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 9, 3, 20))]
    batch = _generate(config, prompts, 12)
    generator = TextGenerator(*build_with_encoder(config))
    for row, (one, text) in enumerate(zip(prompts, batch, strict=True)):
        alone = replace(SAMPLING, max_new_tokens=12, seed=SAMPLING.seed + row)
        assert list(generator.stream(one, alone)) == text


def test_a_second_text_knows_nothing_of_the_first() -> None:
    generator = TextGenerator(*build_with_encoder(egpt(local_attention=True)))
    config = replace(SAMPLING, max_new_tokens=20)
    first = generator.generate([prompt(12)], config)
    generator.generate([prompt(30, seed=1)], config)
    assert generator.generate([prompt(12)], config) == first


def test_egpt_reads_the_chunks_it_holds_and_no_older_ones() -> None:
    text = prompt(CHUNKS * CHUNK + 3)
    original = _generate(EGPT, [text], 6)
    for position, matters in ((2, False), (CHUNK - 1, False), (2 * CHUNK - 1, True)):
        changed = text.copy()
        changed[position] = (changed[position] + 1) % VOCAB
        assert (_generate(EGPT, [changed], 6) != original) == matters


def test_deepgpt_starts_every_chunk_from_nothing() -> None:
    other = prompt(CHUNK, seed=1) + prompt(CHUNK)[:2]
    same = prompt(CHUNK, seed=2) + prompt(CHUNK)[:2]
    assert _generate(DEEPGPT, [other], 6) == _generate(DEEPGPT, [same], 6)


def test_egpt_does_the_same_work_for_each_token_however_long_the_text() -> None:
    """The positions that the encoder and the decoder compute, counted over each whole chunk."""
    model, encoder = build_with_encoder(EGPT)
    assert encoder is not None
    positions = [0]

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        positions[0] += args[0].shape[1]

    for stack in (model.stack, encoder.gpt.stack):
        stack.register_forward_pre_hook(count)
    decoder = EGPTDecoder(model, encoder, 1, 10 * CHUNK)
    work = []
    for _ in range(10):
        positions[0] = 0
        for token in prompt(CHUNK):
            decoder.advance(torch.tensor([[token]]))
        work.append(positions[0])
    assert work[CHUNKS:] == [2 * CHUNK + CHUNKS - 1] * (10 - CHUNKS)


def test_a_long_prompt_is_encoded_only_where_it_is_seen() -> None:
    model, encoder = build_with_encoder(EGPT)
    assert encoder is not None
    encoded = []
    encoder.gpt.stack.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[1]))
    EGPTDecoder(model, encoder, 1, 100 * CHUNK).advance(torch.tensor([prompt(99 * CHUNK + 3)]))
    assert encoded == [CHUNK] * (CHUNKS - 1) + [3]


def test_a_gpt_forgets_the_older_half_when_its_context_is_full() -> None:
    starts = [context_start(length, 16) for length in (1, 16, 17, 24, 25, 32, 33)]
    assert starts == [0, 0, 8, 8, 16, 16, 24]
    assert [context_start(length, 1) for length in (1, 2, 3)] == [0, 1, 2]


def test_a_full_context_is_read_again_once_in_half_of_it() -> None:
    model, _ = build_with_encoder(GPT)
    fed = []
    model.stack.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    new = 4 * MAX_LEN
    TextGenerator(model).generate([prompt(1)], replace(SAMPLING, max_new_tokens=new))
    assert sum(length > 1 for length in fed) == (new - MAX_LEN) // (MAX_LEN // 2)


def test_each_of_several_ends_of_text_ends_a_row_and_not_the_others() -> None:
    prompts = [prompt(4), prompt(4, seed=1)]
    free = _generate(GPT, prompts, 20)
    stop = {free[0][6], free[1][9]}
    ends = [next((n for n, token in enumerate(text) if token in stop), 20) for text in free]
    assert max(ends) < 20
    expected = [text[:end] for text, end in zip(free, ends, strict=True)]
    assert _generate(GPT, prompts, 20, stop=stop) == expected


def test_nothing_is_generated_where_nothing_is_asked_for() -> None:
    assert _generate(GPT, [prompt(4)], 0) == [[]]


def test_tokens_beyond_the_tokenizer_are_never_drawn() -> None:
    generator = TextGenerator(*build_with_encoder(GPT), vocab_size=5)
    (text,) = generator.generate([[1]], replace(SAMPLING, temperature=5.0, max_new_tokens=60))
    assert set(text) == set(range(5))


def test_a_model_in_training_mode_and_an_empty_prompt_are_refused() -> None:
    model, _ = build_with_encoder(GPT)
    with pytest.raises(ValueError, match="no tokens"):
        TextGenerator(model).generate([[1], []], SAMPLING)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        TextGenerator(model.train()).generate([[1]], SAMPLING)


def test_an_encoder_is_asked_for() -> None:
    model, _ = build_with_encoder(EGPT)
    with pytest.raises(ValueError, match="encoder"):
        TextGenerator(model).generate([[1]], replace(SAMPLING, max_new_tokens=1))


def _tokens_at(tp_size: int, config: ModelConfig) -> list[list[int]]:
    generator = TextGenerator(*build_with_encoder(config, grid_for(tp_size)))
    return generator.generate([prompt(5), prompt(5, 1)], replace(SAMPLING, max_new_tokens=30))


@pytest.mark.parametrize(
    "config",
    [
        GPT,
        egpt(local_attention=True, memory_gate=True),
        EGPT_VARIANTS["memory"],
        EGPT_VARIANTS["memory_local"],
        DEEPGPT,
    ],
    ids=["gpt", "egpt", "egpt_memory", "egpt_memory_local", "deepgpt"],
)
def test_tensor_parallel_ranks_write_the_text_of_one(
    distributed: Distributed, config: ModelConfig
) -> None:
    alone = TextGenerator(*build_with_encoder(config)).generate(
        [prompt(5), prompt(5, 1)], replace(SAMPLING, max_new_tokens=30)
    )
    assert distributed(2, _tokens_at, 2, config) == [alone, alone]


# -- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


def test_characters_of_several_tokens_come_out_whole(tokenizer: Tokenizer) -> None:
    text = "naïve — Пьер 🙂 戦争と平和 e\u0301"
    tokens = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([token]) for token in tokens)
    assembler = TextAssembler(tokenizer)
    pieces = [assembler.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert assembler.end() == ""


def test_a_character_cut_off_at_the_end_is_marked(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("🙂")
    assembler = TextAssembler(tokenizer)
    assert assembler.add(first) + assembler.end() == "\ufffd"


def test_a_prompt_without_text_begins_a_document(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_prompt("") == [tokenizer.eot_token]


def test_sample_text_puts_the_mode_back_and_draws_no_global_numbers(tokenizer: Tokenizer) -> None:
    model, _ = build_with_encoder(replace(GPT, vocab_size=tokenizer.vocab_size, dropout=0.5))
    config = GenerationConfig(prompt="Prince", max_new_tokens=8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    prompt = Prompt("Prince", tokenizer.encode_prompt("Prince"), tokenizer.end_tokens)
    text = sample_text(model.train(), None, tokenizer, config, prompt)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert text.startswith("Prince")
    assert text == sample_text(model.eval(), None, tokenizer, config, prompt)
    assert not model.training


def test_logits_that_are_no_numbers_end_a_text_and_not_a_run(tokenizer: Tokenizer) -> None:
    """In fp16 the largest numbers of a healthy model may become infinite."""
    model, _ = build_with_encoder(replace(GPT, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        model.stack.norm.weight[0] = float("inf")
    for temperature in (0.0, 1.0):
        config = GenerationConfig(prompt="a", max_new_tokens=3, temperature=temperature)
        with pytest.raises(NotFiniteError, match="the model's logits are not finite"):
            TextGenerator(model.eval()).generate([[1, 2]], config)
        prompt = Prompt("a", tokenizer.encode_prompt("a"), tokenizer.end_tokens)
        assert sample_text(model, None, tokenizer, config, prompt).startswith("a[no text: ")
        text = sample_text(model.train(), None, tokenizer, config, prompt)
        assert text.startswith("a[no text: ")
        assert model.training


def test_a_generator_left_half_way_does_not_leave_inference_mode_on() -> None:
    stream = TextGenerator(*build_with_encoder(GPT)).stream(
        prompt(3), replace(SAMPLING, max_new_tokens=5)
    )
    next(stream)
    assert not torch.is_inference_mode_enabled()
