"""Attention kinds, windows and masks against a plain second implementation, and their limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megaegpt.config import ModelConfig, RopeScalingConfig
from megaegpt.config.model_rules import model_problems
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.attention.causal import (
    Segments,
    band_mask,
    banded_attention,
    causal_attention,
    scaled_dot_product,
)
from megaegpt.model.segments import document_segments, padding_segments, same_segment
from megaegpt.parallel.grid import ProcessGrid
from tests.model.naive import naive_logits
from tests.tiny.models import ATTENTION, BASE, VARIANTS, WINDOW, build, tokens_of, variant

T = 12


def _against_naive(config, tokens, segments=None) -> None:
    """Logits of real tokens, and gradients of a loss over them, to 1e-9."""
    model = build(config)
    weights = dict(model.named_parameters())
    real = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments >= 0
    targets = tokens_of(config, *tokens.shape, seed=1)
    logits = model.logits(tokens, segments=segments)[..., : config.vocab_size]
    expected = naive_logits(weights, config, tokens, segments)
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-9, atol=1e-9)

    loss = model(tokens, targets.masked_fill(~real, -100), segments=segments)
    expected_loss = torch.nn.functional.cross_entropy(
        expected[real], targets[real], reduction="sum"
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    grads = torch.autograd.grad(loss, list(weights.values()))
    naive_grads = torch.autograd.grad(expected_loss, list(weights.values()))
    largest = max(grad.abs().max() for grad in naive_grads)
    for name, grad, naive_grad in zip(weights, grads, naive_grads, strict=True):
        assert ((grad - naive_grad).abs().max() / largest).item() <= 1e-9, name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_what_its_definition_says(name):
    _against_naive(VARIANTS[name], tokens_of(BASE, 1, T))


SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
CHOICES: dict[str, tuple] = {
    "num_layers": (1, 2, 3),
    "hidden_size": (24, 32),
    "head_dim": (None, 6, 8, 12),
    "norm": ("layer_norm", "rms_norm"),
    "norm_placement": ("pre", "post"),
    "mlp": ("gelu", "swiglu", "geglu"),
    "activation": ("gelu", "gelu_tanh"),
    "ffn_hidden_size": (None, 44),
    "bias": (True, False),
    "tied_embeddings": (True, False),
    "logit_softcap": (None, 2.0),
    "positions": ("learned", "sinusoidal", "rotary", "rotary", "rotary", "none"),
}
OF_HEADS: dict[str, tuple] = {
    "num_kv_heads": (None, 1, 2),
    "qk_norm": ("none", "head", "projection"),
    "qkv_bias": (None, True, False),
    "window": (None, 1, 3, 5),
    "window_every": (None, 1, 2),
    "rope_fraction": (1.0, 0.5, 0.25),
}
OF_LATENTS: dict[str, tuple] = {
    "attention": ("latent",),
    "latent_dim": (None, 6),
    "query_latent_dim": (None, 10),
    "latent_norm": (True, False),
    "rope_head_dim": (2, 4, 6),
}
ROTARY: dict[str, tuple] = {
    "rope_pairs": ("halves", "interleaved"),
    "rope_base": (10000.0, 100.0, 500000.0),
}


def _drawn(seed: int) -> ModelConfig:
    """Any keys of the model that go together."""
    draw = random.Random(seed)
    while True:
        of_attention = OF_LATENTS if draw.random() < 0.3 else OF_HEADS
        choices = CHOICES | of_attention | ROTARY
        config = replace(BASE, **{name: draw.choice(kinds) for name, kinds in choices.items()})
        kind = SCALINGS[seed % len(SCALINGS)]
        if config.positions == "rotary" and kind != "none":
            length = draw.choice([None, 10, 40]) if kind in ("yarn", "llama3") else None
            config = replace(config, rope_scaling=RopeScalingConfig(kind, 4.0, length))
        if not list(model_problems(config, 1)):
            return config


DRAWN = [_drawn(seed) for seed in range(20)]


@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_keys_in_any_combination_compute_what_they_say(number):
    segments = padding_segments(torch.tensor([[False] * number + [True] * (T - number)]))
    _against_naive(DRAWN[number], tokens_of(BASE, 1, T), segments if number < T else None)


def test_the_combinations_have_every_scaling_and_both_kinds_of_gelu():
    assert {config.rope_scaling.kind for config in DRAWN} == set(SCALINGS)
    assert {config.activation for config in DRAWN if config.mlp != "swiglu"} == {
        "gelu",
        "gelu_tanh",
    }


PADDED = {
    "left": [[False] * 5 + [True] * 7, [True] * 12],
    "right": [[True] * 4 + [False] * 8, [True] * 11 + [False]],
    "both_and_all": [[False] * 2 + [True] * 6 + [False] * 4, [False] * 12],
}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ["grouped_window_every_2", "latent"])
@pytest.mark.parametrize("side", PADDED)
def test_padding_is_invisible_and_moves_no_position(attention, positions, side):
    segments = padding_segments(torch.tensor(PADDED[side]))
    _against_naive(variant(attention, positions), tokens_of(BASE, 2, T), segments)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", PADDED)
def test_a_padded_row_is_finite_and_its_real_tokens_are_those_of_the_row_alone(attention, side):
    config = variant(attention, "rotary")
    model = build(config)
    real = torch.tensor(PADDED[side])
    tokens = tokens_of(config, 2, T)
    hidden = model.hidden_states(tokens, segments=padding_segments(real))
    loss = model(tokens, tokens.masked_fill(~real, -100), segments=padding_segments(real))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert hidden.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    for row in range(2):
        if real[row].any():
            alone = model.hidden_states(tokens[row, real[row]].unsqueeze(0))[0]
            torch.testing.assert_close(hidden[row, real[row]], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_documents_are_computed_as_if_each_were_alone(attention, positions):
    config = replace(variant(attention, positions), document_end=60)
    model = build(config)
    documents = [tokens_of(replace(config, vocab_size=60), 1, n, seed=n)[0] for n in (3, 1, 9, 4)]
    ended = [torch.cat([d, torch.tensor([60])]) for d in documents]
    packed = model.hidden_states(torch.cat(ended).unsqueeze(0))[0]
    alone = [model.hidden_states(document.unsqueeze(0))[0] for document in ended]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_packed_documents_are_those_of_the_naive_model():
    config = replace(variant("grouped_window_every_2", "learned"), document_end=60)
    tokens = tokens_of(config, 2, T)
    tokens[0, 3] = tokens[0, 4] = tokens[1, 11] = 60
    _against_naive(config, tokens, document_segments(tokens, 60))


def test_documents_flow_into_each_other_unless_asked_otherwise():
    config = variant("multi_head", "rotary")
    tokens = tokens_of(config, 1, T)
    tokens[0, 4] = 60
    model = build(config)
    moved = model.hidden_states(tokens) != model.hidden_states(tokens.clone().fill_(60))
    assert moved[0, 5:].any(-1).all()


# Windows


def _qkv(length: int, total: int, kv_heads: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, length, 6), (2, kv_heads, total, 6), (2, kv_heads, total, 6)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    )


def _by_dense_mask(q, k, v, window, segments):
    total = k.shape[2]
    columns = torch.arange(total)
    rows = columns[total - q.shape[2] :]
    mask = band_mask(rows, columns, window)
    if segments is not None:
        mask = (mask & same_segment(*segments)) | (rows[:, None] == columns)
        mask = mask.unsqueeze(1)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("length", "total", "window", "block"),
    [
        (50, 50, 7, 4),  # several blocks back, a last block that is not full
        (48, 48, 8, 8),
        (50, 50, 1, 4),  # nothing but the token itself
        (37, 45, 7, 4),  # some keys before the first query (chunked prefill)
        (37, 80, 7, 4),  # more than it can see
        (37, 37, 20, 8),
        (5, 12, 9, 2),  # all queries lack a full reach
        (64, 64, 16, 64),  # a block wider than the window
    ],
)
def test_blocks_in_a_band_equal_a_dense_mask(length, total, window, block, kv_heads, segmented):
    q, k, v = _qkv(length, total, kv_heads)
    segments = None
    if segmented:
        of_keys = torch.arange(total) // 11 - torch.tensor([[1], [0]])
        segments = Segments(of_keys[:, total - length :], of_keys)
    y = banded_attention(q, k, v, segments, window=window, block=block)
    expected = _by_dense_mask(q, k, v, window, segments)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(y)
    grads = torch.autograd.grad((y * weights).sum(), [q, k, v])
    expected_grads = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


def _largest(length: int, window: int | None) -> int:
    q = torch.randn(1, 2, length, 4, requires_grad=True)
    with _LargestTensor() as largest:
        causal_attention(q, q[:, :1], q[:, 1:], window=window).sum().backward()
    return largest.elements


def test_memory_of_a_window_grows_with_the_length_and_not_with_its_square():
    """No tensor of a pass is larger than a few times the queries."""
    assert _largest(1024, 64) <= 4 * 1024 * 2 * 4
    assert _largest(4096, 64) <= 4 * _largest(1024, 64)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_long_window_layer_is_banded_inside_the_model(positions):
    """150 tokens are several blocks; the naive rule on all of them, with padding."""
    config = replace(variant("grouped_window_every_2", positions), max_seq_len=150)
    model = build(config)
    tokens = tokens_of(config, 1, 150)
    real = torch.ones(1, 150, dtype=torch.bool)
    real[0, :7] = False
    with torch.no_grad():
        expected = naive_logits(dict(model.named_parameters()), config, tokens[:, 7:])
        logits = model.logits(tokens, segments=padding_segments(real))[:, 7:, :61]
        whole = model.logits(tokens[:, 7:])[..., :61]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [T, T + 1, 1000])
def test_a_window_over_the_whole_length_is_full_attention_exactly(window):
    full = variant("grouped", "rotary")
    tokens = tokens_of(full, 2, T)
    windowed = build(replace(full, window=window)).hidden_states(tokens)
    assert torch.equal(windowed, build(full).hidden_states(tokens))


def test_a_window_is_the_token_and_those_before_it():
    """One layer: changing token 3 moves tokens 3 to 3 + window - 1."""
    config = replace(variant("window", "none"), num_layers=1)
    model = build(config)
    tokens = tokens_of(config, 1, T)
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % config.vocab_size
    moved = (model.hidden_states(tokens) != model.hidden_states(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(3, 3 + WINDOW))


# Grouped queries


def test_as_many_key_heads_as_query_heads_is_multi_head_exactly():
    tokens = tokens_of(BASE, 2, T)
    grouped = build(replace(BASE, num_kv_heads=BASE.num_heads)).hidden_states(tokens)
    assert torch.equal(grouped, build(BASE).hidden_states(tokens))


def test_grouped_queries_are_multi_head_with_repeated_key_heads():
    config = variant("grouped", "rotary")
    grouped, full = build(config), build(variant("multi_head", "rotary"))
    size, groups = config.head_size, config.num_heads // config.kv_heads
    state = grouped.state_dict()
    for name, weight in state.items():
        if ".attention.key." in name or ".attention.value." in name:
            heads = weight.unflatten(0, (-1, size))
            state[name] = heads.repeat_interleave(groups, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = tokens_of(config, 2, T)
    torch.testing.assert_close(
        grouped.hidden_states(tokens), full.hidden_states(tokens), rtol=1e-12, atol=1e-12
    )


class _KeyShapes(TorchDispatchMode):
    """Heads of the keys and queries that fused attention is given; whether keys are repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: set[int] = set()
        self.query_heads: set[int] = set()
        self.repeated = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.heads.add(args[1].shape[1])
            self.query_heads.add(args[0].shape[1])
        self.repeated |= "repeat" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["multi_query", "grouped_window_every_2"])
def test_keys_of_a_group_are_never_repeated(attention):
    config = variant(attention, "rotary")
    model = build(config)
    with _KeyShapes() as seen:
        model(tokens_of(config, 2, T), tokens_of(config, 2, T)).backward()
    assert seen.heads == {config.kv_heads}
    assert not seen.repeated


@torch.no_grad()
@pytest.mark.parametrize("attention", ["grouped_window_every_2", "latent"])
def test_a_new_token_reads_the_keys_of_a_group_once(attention):
    """As many query heads as key heads go into fused attention: those of a group are its rows."""
    config = variant(attention, "rotary")
    model, tokens = build(config), tokens_of(config, 2, T)
    cache = KVCache(config, ProcessGrid(), 2, T, dtype=torch.float64)
    model.hidden_states(tokens[:, :-1], cache)
    with _KeyShapes() as seen:
        model.hidden_states(tokens[:, -1:], cache)
    assert seen.heads == seen.query_heads == {1 if attention == "latent" else config.kv_heads}
    assert not seen.repeated


class _OnGpu(torch.Tensor):
    """A tensor on the CPU that is computed with as one on a GPU would be."""

    is_cuda = True


@pytest.mark.parametrize("masked", ["not", "alike", "by_row"])
@pytest.mark.parametrize("length", [1, 5])
def test_groups_as_rows_equal_groups(length, masked):
    q, k, v = _qkv(length, 9, 2)
    mask = None if masked == "not" else band_mask(torch.arange(9 - length, 9), torch.arange(9), 3)
    if mask is not None and masked == "by_row":
        mask = mask.expand(2, 1, -1, -1).clone()
        mask[1, :, :, -1] ^= True
    expected = scaled_dot_product(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)
    for queries in (q, q.as_subclass(_OnGpu)):
        found = scaled_dot_product(queries, k, v, mask).as_subclass(torch.Tensor)
        torch.testing.assert_close(found, expected)


# Latent


@torch.no_grad()
def test_with_a_cache_the_past_is_not_projected_up_again():
    """The up-projections are absorbed into queries and outputs: their layers never run."""
    config = variant("latent_with_query_latent", "rotary")
    model, tokens = build(config), tokens_of(config, 2, T)
    calls = []
    for block in model.stack.blocks:
        for up in (block.attention.key, block.attention.value):
            up.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    cache = KVCache(config, ProcessGrid(), 2, T, dtype=torch.float64)
    for piece in tokens.split([7, 4, 1], dim=1):
        model.hidden_states(piece, cache)
    assert not calls
    model.hidden_states(tokens)
    assert calls == [T] * 2 * config.num_layers


def test_operations_of_latent_attention_are_counted_by_hand():
    config = replace(variant("latent", "rotary"), num_layers=1)
    hidden, heads, size, rope, latent = 32, 4, 8, 4, 12
    weights = hidden * (latent + rope) + hidden * heads * (size + rope)
    weights += 2 * latent * heads * size + heads * size * hidden + 8 * hidden * hidden
    attention = 2 * config.max_seq_len * heads * ((size + rope) + size)
    expected = 3 * (2 * weights + attention + 2 * 61 * hidden)
    assert build(config).flops_per_token() == expected


def test_dropout_acts_on_attention_weights_in_training_only():
    for attention in ATTENTION:
        config = replace(variant(attention, "none"), dropout=0.5)
        model = build(config)
        context_tokens = tokens_of(config, 1, T)
        torch.manual_seed(0)
        first = model.hidden_states(context_tokens)
        assert not torch.equal(first, model.hidden_states(context_tokens)), attention
        model.eval()
        assert torch.equal(
            model.hidden_states(context_tokens), model.hidden_states(context_tokens)
        ), attention


@pytest.mark.parametrize(
    ("length", "masked", "trains", "cudnn"),
    [
        (32, False, True, True),
        (32, False, False, False),
        (32, True, True, False),
        (1, False, True, False),
    ],
)
def test_cudnn_serves_training_without_masks_alone(monkeypatch, length, masked, trains, cudnn):
    """On CUDA tensors without memory: which kernels torch may choose from when it is called."""
    allowed = []

    def fake(q, *_, **__):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fake)
    with FakeTensorMode(), torch.set_grad_enabled(trains):
        q = torch.empty(1, 4, length, 16, device="cuda")
        k = torch.empty(1, 4, 32, 16, device="cuda")
        mask = torch.empty(length, 32, dtype=torch.bool, device="cuda") if masked else None
        scaled_dot_product(q, k, k, mask, is_causal=not masked and length > 1)
    assert allowed == [cudnn]


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "grouped"), [(torch.float32, 4, False), (torch.bfloat16, 2, True)]
)
def test_grouped_heads_in_fp32_reach_a_kernel_for_cuda_as_heads_of_their_own(
    monkeypatch, dtype, kv_heads, grouped
):
    """In fp32 no fused kernel of CUDA's knows groups: torch would hold all weights in memory."""
    called = []

    def fake(q, k, *_, enable_gqa):
        called.append((k.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fake)
    with FakeTensorMode():
        q = torch.empty(1, 4, 32, 16, device="cuda", dtype=dtype)
        k = torch.empty(1, 2, 32, 16, device="cuda", dtype=dtype)
        scaled_dot_product(q, k, k, is_causal=True)
    assert called == [(kv_heads, grouped)]


class _NotingKernels(torch.fx.Interpreter):
    """Runs a graph and notes at its attention whether torch may choose cuDNN's kernel."""

    allowed: list[bool]

    def call_function(self, target, args, kwargs):
        if target.__name__ == "scaled_dot_product_attention":
            self.allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return super().call_function(target, args, kwargs)


def test_a_compiled_step_of_decoding_on_cuda_is_one_graph_without_cudnn():
    allowed = []

    def backend(graph, inputs):
        interpreter = _NotingKernels(graph)
        interpreter.allowed = allowed
        return interpreter.run

    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(1, 4, 1, 16, device="cuda")
        k = torch.empty(1, 4, 32, 16, device="cuda")
        mask = torch.empty(1, 32, dtype=torch.bool, device="cuda")
        step = torch.compile(scaled_dot_product, backend=backend, fullgraph=True)
        assert step(q, k, k, mask).shape == q.shape
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


class Places(TorchDispatchMode):
    """Counts what masks are made of, places in a row, and comparisons."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("arange", "ge", "lt", "eq")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{"window": 5}, {"window": 5, "document_end": 7}])
def test_a_pass_makes_a_mask_once_for_all_layers(options, cached):
    counts = []
    for layers in (1, 4):
        model = build(replace(BASE, num_layers=layers, **options))
        cache = KVCache(model.config, ProcessGrid(), 2, 48, dtype=torch.float64) if cached else None
        with Places() as places, torch.no_grad():
            model.hidden_states(tokens_of(model.config, 2, 30), cache)
        counts.append(places.count)
    ring = 2 * 3 * cached  # where a layer's own store has its places
    assert counts[1] - counts[0] <= 3 * ring
    assert counts[0] > 0
