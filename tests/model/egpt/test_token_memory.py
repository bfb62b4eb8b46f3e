"""The mixture with a memory of tokens against its definition, written naively."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.labels import IGNORE
from megaegpt.model.build import build_model
from megaegpt.model.egpt import copy_attention, same_ids
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.held_tokens import HeldTokens, MemoryLimits
from megaegpt.parallel.grid import ProcessGrid

N, S, C, B, VOCAB, D, H = 4, 6, 16, 2, 40, 5, 2
RATE = 8  # times the parameters: what scales, distances and sureness are
CONFIG = ModelConfig(
    kind="egpt",
    vocab_size=VOCAB,
    hidden_size=C,
    num_layers=1,
    num_heads=2,
    egpt=EGPTConfig(num_chunks=N, chunk_size=S, token_memory=True, memory_dim=D, memory_pointers=H),
)


def changed(**egpt: object) -> ModelConfig:
    return replace(CONFIG, egpt=replace(CONFIG.egpt, **egpt))  # type: ignore[arg-type]


def _model(config: ModelConfig = CONFIG) -> EGPT:
    """Its weights are larger than initial ones: keys and shares differ from token to token."""
    model = build_model(config, ProcessGrid(), seed=3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name in ("distance", "bonus", "by_nearness", "by_peak", "by_agreement", "by_match"):
            getattr(model.token_memory, name).mul_(1 / RATE)
        model.token_memory.log_scale.fill_(1.5 / RATE)
    return model


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(B, N, S, C, generator=generator, dtype=torch.float64)
    text = torch.randint(4, (B, 1 + N * S), generator=generator)  # pairs come again
    text[1, 0] = -1  # nothing is before it
    targets = torch.randint(9, (B, N, S), generator=generator)
    targets[0, 1, 2] = IGNORE
    return {
        "token_states": states,
        "features": states[:, :-1, -1],
        "targets": targets,
        "text": text,
    }


@dataclass(frozen=True)
class Place:
    """Where a token is, and what is told of it."""

    chunk: int
    state: torch.Tensor
    before: int
    token: int
    behind: int


def _places(states: torch.Tensor, text: torch.Tensor, first_chunk: int = 0) -> list[Place]:
    """States (J, C), and ids (J + 2,) with those before and behind."""
    ids = text.tolist()
    return [Place(first_chunk + j // S, state, *ids[j : j + 3]) for j, state in enumerate(states)]


def _unit(model: EGPT, weight: torch.Tensor, h: int, state: torch.Tensor) -> torch.Tensor:
    norm, eps = model.token_memory.norm, model.config.layer_norm_eps
    projected = weight.view(H, D, C)[h] @ F.layer_norm(state, (C,), norm.weight, norm.bias, eps)
    return projected / projected.norm()


def _most_similar(
    model: EGPT, h: int, query: torch.Tensor, chunk: int, keys: list[Place]
) -> list[int]:
    """Earlier chunks that are seen by a scaled query in a chunk: of the highest mean score."""
    most = model.config.egpt.memory_chunks
    if most is None:
        return [place.chunk for place in keys]
    of_chunk: dict[int, list[torch.Tensor]] = {}
    for place in keys:
        unit = _unit(model, model.token_memory.key, h, place.state)
        of_chunk.setdefault(place.chunk, []).append(unit)
    bias = RATE * model.token_memory.distance[h]
    similar = {
        other: (query @ torch.stack(units).mean(0) + bias[min(chunk - other, N - 1)]).item()
        for other, units in of_chunk.items()
    }
    return sorted(similar, key=similar.__getitem__, reverse=True)[:most]


def _pointer(
    model: EGPT, h: int, place: Place, earlier: list[Place], own: list[Place]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What pointer h predicts (V,) and what its sureness adds to its gate; None: it sees nothing.
    ``own``: the tokens of the chunk before this one.
    """
    memory = model.token_memory
    scale = (RATE * memory.log_scale[h]).exp()
    query = _unit(model, memory.query, h, place.state)
    chunks = _most_similar(model, h, scale * query, place.chunk, earlier)
    seen = [key for key in earlier if key.chunk in chunks and key.behind >= 0] + own
    if not seen:
        return None
    scores, lengths = [], []
    for key in seen:
        length = 0
        if key.token == place.token:
            length = 2 if key.before == place.before >= 0 else 1
        score = scale * query @ _unit(model, memory.key, h, key.state)
        score = score + RATE * memory.distance[h, min(place.chunk - key.chunk, N - 1)]
        if length:
            score = score + RATE * memory.bonus[h, length - 1]
        scores.append(score)
        lengths.append(length)
    weights = F.softmax(torch.stack(scores), -1)
    pointed = torch.zeros(VOCAB, dtype=torch.float64)
    for weight, key in zip(weights, seen, strict=True):
        pointed = pointed + weight * F.one_hot(torch.tensor(key.behind), VOCAB)
    nearest = seen[int(weights.argmax())]
    gate = (
        RATE * memory.by_nearness[h] * 10 * (torch.stack(scores).max() / scale - 0.8).detach()
        + RATE * memory.by_peak[h] * weights.max().log().detach()
        + RATE * memory.by_agreement[h] * pointed[nearest.behind].log().detach()
        + RATE * memory.by_match[h, max(lengths)]
    )
    return pointed, gate


def naive_probabilities(
    model: EGPT,
    batch: dict[str, torch.Tensor],
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: list[list[int]] | None = None,
) -> torch.Tensor:
    """(B, N, S, V), token by token. ``past``: states (B, J, C) and ids (B, J + 2) of whole chunks
    before the window. ``first``: by row and chunk the first chunk that is seen.
    """
    hidden = model.hidden_states(batch["token_states"], batch["features"])
    earlier_states = batch.get("earlier_states", batch["token_states"][:, :-1]).flatten(1, 2)
    earlier_text = batch.get("earlier_text", batch["text"][:, : (N - 1) * S + 2])
    start = 0 if past is None else (past[1].shape[1] - 2) // S
    rows = []
    for b in range(B):
        text = F.pad(batch["text"][b], (0, 1), value=-1)
        window = _places(batch["token_states"][b].flatten(0, 1), text, start)
        held = _places(earlier_states[b], earlier_text[b], start)
        if past is not None:
            behind = torch.cat([past[1][b, :-1], batch["text"][b, 1:2]])
            held = _places(past[0][b], behind) + held
        for t, place in enumerate(window):
            n = place.chunk - start
            begin = 0 if first is None else first[b][n]
            sees, own = held[begin * S : (start + n) * S], window[n * S : t]
            h_t = hidden[b].flatten(0, 1)[t]
            gates = [torch.zeros((), dtype=torch.float64)]
            predictions = [F.softmax(model.head.weight[:VOCAB] @ h_t, -1)]
            for h in range(H):
                found = _pointer(model, h, place, sees, own)
                if found is None:
                    continue
                memory = model.token_memory
                gates.append(memory.gate[h] @ h_t + memory.gate_bias[h] + found[1])
                predictions.append(found[0])
            shares = F.softmax(torch.stack(gates), -1)
            rows.append(sum(s * p for s, p in zip(shares, predictions, strict=True)))
    return torch.stack(rows).view(B, N, S, VOCAB)


def _nats(p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    real = targets >= 0
    return -p[real].gather(1, targets[real].unsqueeze(1)).log().squeeze(1)


@pytest.mark.parametrize("same", ["listed", "listed where few", "masked"])
@pytest.mark.parametrize(("rows", "most"), [(1 << 22, None), (70, None), (1, 1)])
def test_loss_and_gradients_are_those_of_the_definition(rows, most, same, monkeypatch):
    monkeypatch.setitem(copy_attention.SCORES_AT_ONCE, "cpu", rows)
    monkeypatch.setattr(copy_attention, "SPAN", 4)
    if same == "masked":
        monkeypatch.setattr(same_ids, "AS_PLACES", set())
    else:  # about a quarter of all pairs are the same
        monkeypatch.setattr(same_ids, "MOST_LISTED", 1.0 if same == "listed" else 0.25)
    model, batch = _model(changed(memory_chunks=most)), _batch()
    loss = model(**batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    p = naive_probabilities(model, batch)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, N, S, dtype=torch.float64))
    nats = _nats(p, batch["targets"])
    expected = torch.autograd.grad(nats.sum(), list(model.parameters()))
    torch.testing.assert_close(loss, nats.sum(), rtol=1e-10, atol=0)
    for (name, _), grad, want in zip(model.named_parameters(), grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-11, msg=name)
        assert name == "chunk_positions.table.weight" or grad.abs().max() > 0, name
    each = model(**batch, reduction="none")
    torch.testing.assert_close(each[batch["targets"] >= 0], nats.detach())


def test_log_probabilities_are_those_of_the_definition():
    model, batch = _model(), _batch()
    targets = batch.pop("targets")
    with torch.no_grad():
        expected = naive_probabilities(model, batch)
        chosen = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) < 0.4
        chosen[:, 0, 0] = True  # sees nothing
        found = torch.cat(list(model.predictions(**batch).logits(chosen)))
    torch.testing.assert_close(found.exp(), expected[chosen])


def test_only_the_chunks_of_the_highest_mean_score_are_seen():
    model, batch = _model(changed(memory_chunks=1)), _batch()
    with torch.no_grad():
        nats = model(**batch, reduction="none")
        expected = _nats(naive_probabilities(model, batch), batch["targets"])
        everything = _model()(**batch, reduction="none")
    torch.testing.assert_close(nats[batch["targets"] >= 0], expected)
    assert not torch.allclose(nats[:, 2:], everything[:, 2:])


@pytest.mark.parametrize("first", [None, [[0, 2, 1, 4], [3, 4, 5, 6]]])
def test_what_is_held_of_chunks_before_the_window_is_seen(first):
    model, batch = _model(), _batch()
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(B, 3 * S, C, generator=generator, dtype=torch.float64)
    text = torch.randint(4, (B, 3 * S + 2), generator=generator)
    batch["text"][:, 0] = text[:, -2]
    past = {"past_text": text}
    if first is not None:
        past["from_chunk"] = torch.tensor(first)
    with torch.no_grad():
        past["past_keys"] = model.token_memory.keys(states)
        nats = model(**batch, **past, reduction="none")
        p = naive_probabilities(model, batch, (states, text), first)
    torch.testing.assert_close(nats[batch["targets"] >= 0], _nats(p, batch["targets"]))


def test_another_texts_states_can_be_the_earlier_chunks():
    model, batch = _model(), _batch()
    generator = torch.Generator().manual_seed(6)
    batch["earlier_states"] = torch.randn(B, N - 1, S, C, generator=generator).double()
    batch["earlier_text"] = torch.randint(4, (B, (N - 1) * S + 2), generator=generator)
    with torch.no_grad():
        nats = model(**batch, reduction="none")
        expected = _nats(naive_probabilities(model, batch), batch["targets"])
    torch.testing.assert_close(nats[batch["targets"] >= 0], expected)


def test_without_earlier_text_a_token_sees_its_own_chunk_alone():
    model, batch = _model(), _batch()
    unknown = torch.full((B, (N - 1) * S + 2), -1)
    with torch.no_grad():
        nats = model(**batch, earlier_text=unknown, reduction="none")
        expected = naive_probabilities(model, batch | {"earlier_text": unknown})
        hidden = model.hidden_states(batch["token_states"], batch["features"])
        alone = model.head.loss(hidden, batch["targets"], "none")
    torch.testing.assert_close(nats[batch["targets"] >= 0], _nats(expected, batch["targets"]))
    torch.testing.assert_close(nats[:, :, 0], alone[:, :, 0])
    assert not torch.isclose(nats[:, :, 2:], alone[:, :, 2:]).any(-1).all()


def test_a_token_changes_nothing_that_is_predicted_up_to_it():
    model, batch = _model(), _batch()
    place = S + 3
    found = []
    for change in (0, 1):
        other = {name: value.clone() for name, value in batch.items()}
        other["text"][:, 1 + place] += change
        other["token_states"].flatten(1, 2)[:, place] += change  # the encoder has read it
        with torch.no_grad():
            found.append(model(**other, reduction="none").flatten(1))
    before, after = found
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place], after[:, place]).any()


@pytest.mark.parametrize(("most_listed", "looked_up"), [(1.0, 0), (1.0, 99), (0.0, 0)])
@pytest.mark.parametrize(("dtype", "most"), [(None, None), ("int8", None), (None, 2)])
@torch.no_grad()
def test_token_by_token_the_memory_says_what_it_does_to_a_window(
    dtype, most, most_listed, looked_up, monkeypatch
):
    monkeypatch.setattr(same_ids, "MOST_LISTED", most_listed)
    monkeypatch.setattr(copy_attention, "FEWEST_LOOKED_UP", looked_up)
    model, batch = _model(changed(memory_chunks=most)), _batch()
    batch["text"][:, 0] = torch.tensor([3, 1])  # the window is not the start of its text
    expected = naive_probabilities(model, batch)
    hidden = model.hidden_states(batch["token_states"], batch["features"])
    held = HeldTokens(model.token_memory, B, model.head.weight, MemoryLimits(dtype=dtype))
    held.begin_behind(batch["text"][:, 0])
    worst = 0.0
    for n in range(N):
        for t in range(S):
            states, h_t = batch["token_states"][:, n, t : t + 1], hidden[:, n, t : t + 1]
            held.append(states, batch["text"][:, 1 + n * S + t, None])
            found = held.mix(states, h_t, model.head.full_logits(h_t))[:, 0, :VOCAB].exp()
            worst = max(worst, (found - expected[:, n, t]).abs().max().item())
        held.finish_chunk()
    assert worst < 1e-12 if dtype is None else 1e-6 < worst < 0.02
    assert held.num_tokens == (N - 1) * S
    assert torch.equal(held.earlier.text[:, :-1], batch["text"][:, S:].int())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@torch.no_grad()
def test_keys_that_are_converted_by_parts_say_what_they_do_as_numbers(dtype, monkeypatch):
    monkeypatch.setattr(copy_attention, "CONVERTED_AT_ONCE", 5)  # of 12 keys
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-127, 128, (B, H, 2 * S, D), generator=generator).double()
    text = torch.randint(4, (B, 2 * S + 2), generator=generator)
    queries, numbers = torch.randn(B, H, 1, D, dtype=torch.float64), keys / 127
    if dtype != torch.int8:
        numbers = numbers.to(dtype).double()
    held = keys.to(dtype) if dtype == torch.int8 else numbers.to(dtype)
    own = copy_attention.Keys(numbers[:, :, :S], text[:, : S + 2])
    scoring = copy_attention.Scoring(torch.randn(H, 3), torch.randn(H, 2), S)
    offsets = torch.tensor([S - 1])
    found, expected = (
        copy_attention.pointed_at(queries, offsets, copy_attention.Keys(k, text), own, scoring)[0]
        for k in (held, numbers)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_token_reads_no_key_of_a_chunk_that_it_does_not_choose():
    model, batch = _model(changed(memory_chunks=1)), _batch()
    held = HeldTokens(model.token_memory, 1, model.head.weight)
    for n in range(N - 1):
        held.append(batch["token_states"][:1, n], batch["text"][:1, 1 + n * S : 1 + (n + 1) * S])
        held.finish_chunk()
    held.append(batch["token_states"][:1, N - 1, :1], batch["text"][:1, -1:])
    newest, hidden = torch.randn(2, 1, 1, C, dtype=torch.float64)
    logits = model.head.full_logits(hidden)
    before = held.mix(newest, hidden, logits)
    same = []
    for chunk in range(N - 1):
        keys = held.earlier.keys[:, :, chunk * S : (chunk + 1) * S]
        kept = keys.clone()
        keys.fill_(torch.nan)
        same.append(torch.equal(held.mix(newest, hidden, logits), before))
        keys.copy_(kept)
    assert same.count(False) in (1, 2)  # each of two pointers chooses one


def test_the_windows_tokens_are_needed():
    batch = _batch()
    del batch["text"]
    with pytest.raises(ValueError, match="needs the tokens of the window"):
        _model()(**batch)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_a_frozen_decoder_predicts_can_be_known_before(softcap: float | None) -> None:
    egpt = replace(CONFIG.egpt, local_attention=True, attention_sink=True, memory_gate=True)
    config = replace(CONFIG, egpt=egpt, positions="rotary", logit_softcap=softcap)
    model, batch = _model(config), _batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("token_memory."))
        if name.endswith("attention.gate"):
            torch.nn.init.zeros_(parameter)
    states, targets = batch["token_states"], batch["targets"]
    of_chunks = model.predict_alone(states.flatten(0, 1), targets.flatten(0, 1))
    predicted = tuple(x.unflatten(0, (B, N)) for x in of_chunks)
    results = []
    for known in (None, predicted):
        model.zero_grad()
        loss = model(**batch, predicted=known)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        each = model(**batch, predicted=known, reduction="none")
        results.append((loss, each, *grads))
    for online, stored in zip(*results, strict=True):
        torch.testing.assert_close(stored, online, rtol=1e-12, atol=1e-12)
    assert results[0][1][targets == IGNORE].eq(0).all()


@pytest.mark.parametrize("count", [5, 8, 19, 64])
def test_the_largest_score_is_found_where_it_is(count, monkeypatch):
    monkeypatch.setattr(copy_attention, "SPAN", 4)
    scores = torch.randn(2, 1, 30, count, generator=torch.Generator().manual_seed(count))
    scores[0, 0, 0] = -torch.inf
    scores[0, 0, 1, -1] = 9.0
    for found, expected in zip(copy_attention.largest(scores), scores.max(-1), strict=True):
        assert found[:, :, 1:].equal(expected[:, :, 1:])
    assert copy_attention.largest(scores)[0][0, 0, 0] == -torch.inf


def test_in_bf16_the_memory_costs_what_it_does_in_fp32():
    model, batch = _model(), _batch()
    with torch.no_grad():
        losses = []
        for dtype in (torch.float32, torch.bfloat16):
            given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
            losses.append(model.to(dtype)(**given).item())
    exact, rounded = losses
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("looked_up", [0, 300, 512])  # of 512; others are compared
@pytest.mark.parametrize("over", [0, 1])
def test_ids_that_come_again_too_often_are_not_listed(looked_up, over):
    keys, pointers, queries = 512, 2, 16
    repeated = int(keys * same_ids.MOST_LISTED) + over
    ids = torch.arange(1, 1 + keys)
    ids[torch.randperm(keys, generator=torch.Generator().manual_seed(0))[:repeated]] = 0
    text = torch.cat([ids[-1:], ids]).unsqueeze(0)  # what is before the first key is none
    rows = same_ids.SortedIds.of(text)
    known = same_ids.SortedKeys(rows, 1, looked_up) if looked_up else None
    key_ids = same_ids.KeyIds(ids.view(1, 1, -1), known)
    wanted = torch.zeros(1, 1, queries, dtype=torch.long)
    found = key_ids.having(wanted, (1, pointers, queries, keys))
    assert isinstance(found, same_ids.FoundMask if over else same_ids.FoundPlaces)
    values = torch.rand(1, pointers, queries, keys, dtype=torch.float64)
    torch.testing.assert_close(found.sums(values), values[..., ids == 0].sum(-1))


@pytest.mark.parametrize(("dtype", "bytes_each"), [("fp16", 132.25), ("int8", 68.25)])
def test_a_held_token_is_a_key_an_id_and_a_share_of_its_chunks_mean(dtype, bytes_each):
    egpt = replace(CONFIG.egpt, chunk_size=1024, memory_dim=64, memory_pointers=1)
    memory = build_model(replace(CONFIG, egpt=egpt), ProcessGrid()).token_memory
    held = HeldTokens(memory, 1, torch.zeros(1), MemoryLimits(dtype=dtype))
    assert held.size(2**20) == f"1,048,576 tokens in {bytes_each:.1f} MiB"
    held.append(torch.randn(1, 1024, C), torch.randint(VOCAB, (1, 1024)))
    held.finish_chunk()
    assert held.earlier.keys.itemsize * 64 + held.earlier.text.itemsize == int(bytes_each)


def test_the_share_of_tokens_since_it_was_asked_for_and_the_scale_are_told():
    model, batch = _model(), _batch()
    model(**batch)
    model(**batch)
    found = model.metrics()
    again = {name: value for name, value in batch.items() if name != "targets"}
    log_keep, _ = model.predictions(**again).mixture.of(batch["targets"].flatten(1))
    share = 1 - log_keep[batch["targets"].flatten(1) != IGNORE].exp().mean().item()
    assert found == pytest.approx(
        {"token_memory/share": share, "token_memory/scale": math.exp(1.5)}
    )
    model.metrics()
    assert list(model.metrics()) == ["token_memory/scale"]  # nothing was predicted since


def test_padding_has_no_part_in_the_share():
    model, batch = _model(), _batch()
    model(**batch)
    alone = model.metrics()["token_memory/share"]
    nothing = torch.full_like(batch["targets"], IGNORE)
    padded = {**batch, "targets": torch.cat([batch["targets"][:1], nothing[:1]])}
    model(**{**batch, "targets": nothing})
    assert list(model.metrics()) == ["token_memory/scale"]
    model(**padded)
    first = model.metrics()["token_memory/share"]
    for targets in (nothing, padded["targets"], nothing):
        model(**{**batch, "targets": targets})
    assert model.metrics()["token_memory/share"] == pytest.approx(first, rel=1e-12)
    assert first != pytest.approx(alone, rel=1e-3)  # rows differ
