"""Our models against Hugging Face's implementations of the same mathematics, with the same weights.

Everything runs in fp64. Where rotary positions take part, theirs are computed in fp32 whatever the
model's type: that, and not our arithmetic, sets the tolerance there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.llama import modeling_llama as llama

from megaegpt.config import ModelConfig
from megaegpt.interop.families.gpt2 import GPT2 as GPT2_FAMILY
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.model.attention import build_attention
from megaegpt.model.attention.cache import CachedContext, KVCache
from megaegpt.model.attention.context import CausalContext
from megaegpt.model.rotary import rotary_table
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.models import build, tokens_of

GRID = ProcessGrid()
ROTARY_PRECISION = 2e-6
B, T = 2, 13


# GPT-2 as a whole

GPT2 = ModelConfig(vocab_size=61, max_seq_len=16, hidden_size=32, num_layers=3, num_heads=4)


def _their_gpt2(config: ModelConfig) -> nn.Module:
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_seq_len,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(theirs).double()


def test_multi_head_attention_and_learned_positions_are_gpt2():
    """Logits, loss and the gradient of every weight."""
    ours, theirs = build(GPT2), _their_gpt2(GPT2)
    weights = _in_their_form({n: p.detach() for n, p in ours.named_parameters()})
    missing = theirs.transformer.load_state_dict(weights, strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    tokens, targets = tokens_of(GPT2, B, T), tokens_of(GPT2, B, T, seed=1)

    logits = theirs(tokens).logits
    ours_logits = ours.logits(tokens)[..., : GPT2.vocab_size]
    torch.testing.assert_close(ours_logits, logits, rtol=1e-9, atol=1e-9)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ours_loss = ours(tokens, targets)
    torch.testing.assert_close(ours_loss, loss, rtol=1e-9, atol=0)

    loss.backward()
    ours_loss.backward()
    of_theirs = dict(theirs.transformer.named_parameters())
    gradients = _in_their_form({n: p.grad for n, p in ours.named_parameters()})
    assert gradients.keys() == of_theirs.keys()
    assert len(list(ours.parameters())) > len(
        gradients
    )  # theirs holds queries, keys and values as one
    largest = max(p.grad.abs().max() for p in of_theirs.values())
    for name, gradient in gradients.items():
        difference = ((gradient - of_theirs[name].grad).abs().max() / largest).item()
        assert difference <= 1e-9, (name, difference)


def _in_their_form(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = TensorLayout(GPT2, GPT2_FAMILY, gguf=False)
    return {name: layout.give(name, ours.get) for name in layout.shapes}


# One attention layer

Theirs = Callable[[Tensor], Tensor]


def _attention(config: ModelConfig) -> nn.Module:
    """Ours, with weights of a size at which softmax is far from uniform."""
    attention = build_attention(config, 0, GRID).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    return attention


def _inputs(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (B, T, config.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def _compare(config: ModelConfig, ours: nn.Module, theirs: Theirs, pairs) -> None:
    """Outputs, and gradients of the input and of ``pairs`` of (our, their) gradient."""
    x = _inputs(config)
    context = CausalContext(rotary_table(config, torch.arange(T), torch.float64))
    y, expected = ours(x, context), theirs(x)
    tolerance = {"rtol": 0, "atol": ROTARY_PRECISION}
    torch.testing.assert_close(y, expected, **tolerance)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (grad,) = torch.autograd.grad((y * along).sum(), x, retain_graph=True)
    (expected_grad,) = torch.autograd.grad((expected * along).sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, expected_grad, **tolerance)
    (y * along).sum().backward()
    (expected * along).sum().backward()
    for our_grad, their_grad in pairs():
        scale = their_grad.abs().max()
        torch.testing.assert_close(our_grad / scale, their_grad / scale, **tolerance)


def _cached(config: ModelConfig, ours: nn.Module, x: Tensor) -> Tensor:
    """Our layer's output with a cache, fed in pieces."""
    cache = KVCache(config, GRID, B, T, dtype=torch.float64)
    parts, start = [], 0
    for piece in x.split([5, 1, 4, 1, 1, 1], dim=1):
        length = piece.shape[1]
        rotary = rotary_table(config, torch.arange(start, start + length), torch.float64)
        parts.append(ours(piece, CachedContext(cache, length, rotary)))
        cache.length = start = start + length
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_grouped_queries_with_rotary_positions_are_llamas(kv_heads, base):
    config = ModelConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=kv_heads,
        positions="rotary",
        rope_base=base,
    )
    their_config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="sdpa",
    )
    ours = _attention(config)
    attention = llama.LlamaAttention(their_config, layer_idx=0).double()
    tables = llama.LlamaRotaryEmbedding(their_config)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    theirs_by_name = dict(attention.named_parameters())

    def weights():
        for our_name, parameter in ours.named_parameters():
            layer, kind = our_name.split(".")
            yield parameter, theirs_by_name[f"{names[layer]}.{kind}"]

    with torch.no_grad():
        for ours_weight, theirs_weight in weights():
            theirs_weight.copy_(ours_weight)
    assert len(list(weights())) == len(theirs_by_name)

    def theirs(x: Tensor) -> Tensor:
        return attention(x, tables(x, torch.arange(T).unsqueeze(0)), attention_mask=None)[0]

    _compare(config, ours, theirs, lambda: ((a.grad, b.grad) for a, b in weights()))
    with torch.no_grad():
        x = _inputs(config)
        torch.testing.assert_close(
            _cached(config, ours, x), theirs(x), rtol=0, atol=ROTARY_PRECISION
        )


HEADS, NOPE, ROPE, LATENT = 4, 8, 6, 12


def _interleaved(weight: Tensor) -> Tensor:
    """Rows of a rotary part: our pairs (i, i + R/2) to the pairs (2 i, 2 i + 1) of DeepSeek."""
    return weight.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def _to_deepseek(ours: dict[str, Tensor], *, interleaved: bool) -> dict[str, Tensor]:
    """DeepSeek's tensors by name: projections of one input are one matrix there, head by head."""
    turn = _interleaved if interleaved else lambda weight: weight
    query = ours["query.weight"].unflatten(0, (HEADS, NOPE + ROPE))
    query = torch.cat([query[:, :NOPE], turn(query[:, NOPE:])], dim=1)
    up = [ours[f"{kind}.weight"].unflatten(0, (HEADS, -1)) for kind in ("key", "value")]
    rope_weight, rope_bias = ours["rope_key.weight"], ours["rope_key.bias"].unsqueeze(1)
    theirs = {
        "kv_a_proj_with_mqa.weight": torch.cat([ours["latent.down.weight"], turn(rope_weight)]),
        "kv_a_proj_with_mqa.bias": torch.cat(
            [ours["latent.down.bias"], turn(rope_bias).squeeze(1)]
        ),
        "kv_a_layernorm.weight": ours["latent.norm.weight"],
        "kv_b_proj.weight": torch.cat(up, dim=1).flatten(0, 1),
        "o_proj.weight": ours["output.weight"],
        "o_proj.bias": ours["output.bias"],
    }
    if "query_latent.down.weight" not in ours:
        return theirs | {"q_proj.weight": query.flatten(0, 1)}
    return theirs | {
        "q_a_proj.weight": ours["query_latent.down.weight"],
        "q_a_proj.bias": ours["query_latent.down.bias"],
        "q_a_layernorm.weight": ours["query_latent.norm.weight"],
        "q_b_proj.weight": query.flatten(0, 1),
    }


def _their_sizes(query_latent: int | None) -> dict:
    return {
        "hidden_size": 32,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": query_latent,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": NOPE,
        "attention_bias": True,
        "attn_implementation": "sdpa",
    }


def _v2(query_latent: int | None) -> tuple[nn.Module, Theirs]:
    config = transformers.DeepseekV2Config(**_their_sizes(query_latent))
    attention = deepseek_v2.DeepseekV2Attention(config, layer_idx=0).double()
    tables = deepseek_v2.DeepseekV2RotaryEmbedding(config)

    def theirs(x: Tensor) -> Tensor:
        turns = tables(x, torch.arange(T).unsqueeze(0))
        return attention(x, attention_mask=None, position_embeddings=turns)[0]

    return attention, theirs


def _v3(query_latent: int | None, *, interleaved: bool) -> tuple[nn.Module, Theirs]:
    sizes = _their_sizes(query_latent)
    config = transformers.DeepseekV3Config(**sizes, rope_interleave=interleaved)
    attention = deepseek_v3.DeepseekV3Attention(config, layer_idx=0).double()
    tables = deepseek_v3.DeepseekV3RotaryEmbedding(config)

    def theirs(x: Tensor) -> Tensor:
        turns = tables(x, torch.arange(T).unsqueeze(0))
        return attention(x, turns, attention_mask=None)[0]

    return attention, theirs


@pytest.mark.parametrize("query_latent", [None, 10])
@pytest.mark.parametrize("version", ["v2", "v3", "v3_not_interleaved"])
def test_latent_attention_with_rotary_positions_is_deepseeks(version, query_latent):
    config = ModelConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=HEADS,
        attention="latent",
        positions="rotary",
        latent_dim=LATENT,
        query_latent_dim=query_latent,
        rope_head_dim=ROPE,
        layer_norm_eps=1e-6,
    )
    interleaved = version != "v3_not_interleaved"
    if version == "v2":
        attention, theirs = _v2(query_latent)
    else:
        attention, theirs = _v3(query_latent, interleaved=interleaved)
    ours = _attention(config)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    attention.load_state_dict(_to_deepseek(weights, interleaved=interleaved))

    def gradients():
        of_ours = {name: p.grad for name, p in ours.named_parameters()}
        for name, gradient in _to_deepseek(of_ours, interleaved=interleaved).items():
            yield gradient, attention.get_parameter(name).grad

    _compare(config, ours, theirs, gradients)
    with torch.no_grad():  # absorbed, from the cached latents
        x = _inputs(config)
        torch.testing.assert_close(
            _cached(config, ours, x), theirs(x), rtol=0, atol=ROTARY_PRECISION
        )
