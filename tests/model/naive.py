"""GPT and EGPT written a second time, as plainly as possible: attention query by query and head by
head, over the list of tokens that it sees.

They share nothing with the package but the names of the weights. Shapes: T tokens, H heads, D head
dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_logits(
    weights: dict[str, Tensor], config, tokens: Tensor, segments: Tensor | None = None
) -> Tensor:
    """(B, T) ids -> (B, T, vocab_size)"""
    rows = []
    for b in range(tokens.shape[0]):
        of_row = [0] * tokens.shape[1] if segments is None else segments[b].tolist()
        rows.append(_row(weights, config, tokens[b], of_row))
    head = weights.get("head.weight", weights["embedding.weight"])
    logits = torch.stack(rows) @ head[: config.vocab_size].T
    cap = config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _row(weights: dict[str, Tensor], config, tokens: Tensor, segments: list[int]) -> Tensor:
    """One row's (T,) ids -> (T, C)"""
    positions, texts = [], []
    for t, segment in enumerate(segments):
        earlier = [s for s in range(t) if segments[s] == segment and segment >= 0]
        positions.append(len(earlier))
        texts.append([*earlier, t])
    x = weights["embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["positions.table.weight"][torch.tensor(positions)]
    elif config.positions == "sinusoidal":
        x = x + torch.stack([_sinusoid(position, x.shape[1]) for position in positions])
    return naive_stack(weights, config, x, positions, texts)


def naive_egpt_hidden(weights: dict[str, Tensor], config, states: Tensor) -> Tensor:
    """Encoder states of a window (N, S, C) -> (N, S, C), by the original's way: every token is the
    last of a sequence of its own, [features of earlier chunks..., tokens of the chunk up to it].
    """
    egpt, rows = config.egpt, []
    last = egpt.chunk_size - 1
    for chunk in range(egpt.num_chunks):
        memory, places = [], []
        for earlier in range(chunk if egpt.history else 0):
            memory.append(_egpt_input(weights, config, states[earlier, last], earlier, last))
            places.append(earlier * egpt.chunk_size + last if egpt.local_attention else earlier)
        for offset in range(egpt.chunk_size):
            own = [
                _egpt_input(weights, config, states[chunk, t], chunk, t)
                for t in range(0 if egpt.local_attention else offset, offset + 1)
            ]
            texts = [list(range(t + 1)) for t in range(len(memory) + len(own))]
            x = torch.stack(memory + own)
            positions = places + [chunk] * len(own)
            if egpt.local_attention:
                positions[len(places) :] = [chunk * egpt.chunk_size + t for t in range(offset + 1)]
            rows.append(naive_stack(weights, config, x, positions, texts, len(memory))[-1])
    return torch.stack(rows).reshape(states.shape)


def _egpt_input(
    weights: dict[str, Tensor], config, state: Tensor, chunk: int, offset: int
) -> Tensor:
    """A state (C,) as the decoder takes it in."""
    x = _linear(weights, "input_mlp.up", state)
    x = _linear(weights, "input_mlp.down", _gelu(config, x))
    if config.egpt.adapter_residual:
        x = state + x
    if config.positions == "learned":
        x = x + weights["chunk_positions.table.weight"][chunk]
    elif config.positions == "sinusoidal":
        x = x + _sinusoid(chunk, len(x))
    return x + weights["lengths.weight"][offset]


def naive_stack(
    weights: dict[str, Tensor],
    config,
    x: Tensor,
    positions: list[int],
    texts: list[list[int]],
    memory: int = 0,
) -> Tensor:
    """(T, C) -> (T, C), after the final norm.

    Args:
        positions: rotary position of each token.
        texts: the tokens that each one would see without a window, by their place in ``x``.
        memory: how many tokens are features of earlier chunks, for a gate.
    """
    for layer in range(config.num_layers):
        prefix = f"stack.blocks.{layer}."
        of_layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        window = config.window
        if config.window_every and layer % config.window_every == config.window_every - 1:
            window = None
        seen = [
            [s for s in text if window is None or t - s < window] for t, text in enumerate(texts)
        ]
        heads_of = _latent if config.attention == "latent" else _grouped
        pre = config.norm_placement == "pre"
        normed = _norm(of_layer, config, "attention_norm", x) if pre else x
        q, k, v = heads_of(of_layer, config, normed, positions)
        gate = of_layer.get("attention.gate")
        read = _attend(q, k, v, seen) if gate is None else _gated(q, k, v, seen, gate, memory)
        y = _linear(of_layer, "attention.output", read)
        x = x + (y if pre else _norm(of_layer, config, "attention_norm", y))
        y = _mlp(of_layer, config, _norm(of_layer, config, "mlp_norm", x) if pre else x)
        x = x + (y if pre else _norm(of_layer, config, "mlp_norm", y))
    return _norm(weights, config, "stack.norm", x)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]]) -> Tensor:
    """(T, H, D) each, and what each query sees -> (T, H * D); 0 where that is nothing"""
    outputs = []
    for t, visible in enumerate(seen):
        for head in range(q.shape[1]):
            if not visible:
                outputs.append(torch.zeros_like(v[0, 0]))
                continue
            scores = k[visible, head] @ q[t, head] / math.sqrt(q.shape[2])
            shares = torch.exp(scores - scores.max())
            outputs.append((shares / shares.sum()) @ v[visible, head])
    return torch.stack(outputs).reshape(len(seen), -1)


def _gated(
    q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]], gate: Tensor, memory: int
) -> Tensor:
    """Tokens behind the memory read it apart from themselves, times tanh of their head's gate."""
    own = [[s for s in of if s >= memory or t < memory] for t, of in enumerate(seen)]
    remembered = [[s for s in of if s < memory <= t] for t, of in enumerate(seen)]
    opened = torch.tanh(gate).repeat_interleave(v.shape[2])  # (H * D,)
    return _attend(q, k, v, own) + opened * _attend(q, k, v, remembered)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _norm(weights: dict[str, Tensor], config, name: str, x: Tensor) -> Tensor:
    eps = config.layer_norm_eps
    if config.norm == "rms_norm":
        return _rms_norm(weights, name, x, eps)
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _rms_norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]


def _mlp(weights: dict[str, Tensor], config, x: Tensor) -> Tensor:
    h = _linear(weights, "mlp.up", x)
    if config.mlp == "gelu":
        return _linear(weights, "mlp.down", _gelu(config, h))
    gate = _linear(weights, "mlp.gate", x)
    act = gate / (1 + torch.exp(-gate)) if config.mlp == "swiglu" else _gelu(config, gate)
    return _linear(weights, "mlp.down", act * h)


def _gelu(config, h: Tensor) -> Tensor:
    if config.activation == "gelu":
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def _sinusoid(position: int, width: int) -> Tensor:
    values = []
    for i in range(width):
        angle = position / 10000 ** (2 * (i // 2) / width)
        values.append(math.cos(angle) if i % 2 else math.sin(angle))
    return torch.tensor(values, dtype=torch.float64)


def _frequency(config, pair: int, size: int) -> float:
    """Radians a token of a pair of ``size`` rotated columns, scaled as the papers define it."""
    scaling, base = config.rope_scaling, config.rope_base
    if scaling.kind == "ntk":
        base *= scaling.factor ** (size / (size - 2)) if size > 2 else 1
    frequency = base ** (-2 * pair / size)
    length = scaling.original_max_seq_len or config.max_seq_len / scaling.factor
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "yarn":
        first, last = (
            size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        kept = 1 - min(max((pair - first) / ((last - first) or 0.001), 0), 1)  # as published
    elif scaling.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if wavelength < length / high:
            kept = 1.0
        elif wavelength > length / low:
            kept = 0.0
        else:
            kept = (length / wavelength - low) / (high - low)
    else:
        return frequency
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def _rotate(x: Tensor, positions: list[int], config) -> Tensor:
    """(T, H, D): pairs of the first columns as complex numbers, turned by position * frequency."""
    fraction = 1 if config.attention == "latent" else config.rope_fraction
    size = round(x.shape[-1] * fraction)
    turning, rest = x[..., :size], x[..., size:]
    angles = torch.tensor(
        [[p * _frequency(config, i, size) for i in range(size // 2)] for p in positions],
        dtype=torch.float64,
    )
    long = config.rope_scaling.kind == "yarn"
    factor = 0.1 * math.log(config.rope_scaling.factor) + 1 if long else 1.0
    turn = factor * torch.complex(torch.cos(angles), torch.sin(angles)).unsqueeze(1)
    if config.rope_pairs == "interleaved":
        turned = torch.complex(turning[..., ::2], turning[..., 1::2]) * turn
        both = [part for pair in turned.unbind(-1) for part in (pair.real, pair.imag)]
        return torch.cat([torch.stack(both, dim=-1), rest], dim=-1)
    turned = torch.complex(turning[..., : size // 2], turning[..., size // 2 :]) * turn
    return torch.cat([turned.real, turned.imag, rest], dim=-1)


def _grouped(weights, config, x: Tensor, positions: list[int]) -> tuple[Tensor, ...]:
    """(T, C) -> queries, keys and values of every query head, (T, H, D)"""
    q, k, v = (_linear(weights, f"attention.{name}", x) for name in ("query", "key", "value"))
    eps = config.layer_norm_eps
    if config.qk_norm == "projection":
        q = _rms_norm(weights, "attention.query_norm", q, eps)
        k = _rms_norm(weights, "attention.key_norm", k, eps)
    q, k, v = (y.reshape(len(x), -1, config.head_size) for y in (q, k, v))
    if config.qk_norm == "head":
        q = _rms_norm(weights, "attention.query_norm", q, eps)
        k = _rms_norm(weights, "attention.key_norm", k, eps)
    if config.positions == "rotary":
        q, k = _rotate(q, positions, config), _rotate(k, positions, config)
    kv_head = [head * config.kv_heads // config.num_heads for head in range(config.num_heads)]
    return q, k[:, kv_head], v[:, kv_head]


def _down(weights, config, name: str, x: Tensor) -> Tensor:
    latent = _linear(weights, f"{name}.down", x)
    if not config.latent_norm:
        return latent
    return _rms_norm(weights, f"{name}.norm", latent, config.layer_norm_eps)


def _latent(weights, config, x: Tensor, positions: list[int]) -> tuple[Tensor, ...]:
    """(T, C) -> queries and keys (T, H, D + R), values (T, H, D)"""
    length, size, heads = len(x), config.head_size, config.num_heads
    latent = _down(weights, config, "attention.latent", x)
    source = _down(weights, config, "attention.query_latent", x) if config.query_latent_dim else x
    q = _linear(weights, "attention.query", source).reshape(length, heads, -1)
    k = _linear(weights, "attention.key", latent).reshape(length, heads, size)
    v = _linear(weights, "attention.value", latent).reshape(length, heads, size)
    if config.positions == "rotary":
        shared = _linear(weights, "attention.rope_key", x).unsqueeze(1)
        shared = _rotate(shared, positions, config)
        turned = _rotate(q[..., size:], positions, config)
        q = torch.cat([q[..., :size], turned], dim=-1)
        k = torch.cat([k, torch.cat([shared] * heads, dim=1)], dim=-1)
    return q, k, v
