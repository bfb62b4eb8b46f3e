"""A training window of EGPT: ours with online and with stored features, and the original program's.

With --memory the form over a pretrained model: nothing but a token memory learns.

The original (github trtuananh/egpt) walks the window chunk by chunk and decodes one short sequence
per token. With its weights copied into ours, loss and gradients are compared before anything is
timed.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig
from megaegpt.data.features.store import PREDICTIONS
from megaegpt.errors import ConfigError, MegaEGPTError
from megaegpt.model.build import build_inputs, build_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from tools.benchmarks.common import (
    add_profile,
    add_repetitions,
    add_sizes,
    add_threads,
    parse_peers,
    print_results,
    single_grid,
)
from tools.benchmarks.peers import load_module
from tools.benchmarks.processes import Candidate, Workload, compare

VOCAB = 50257
_FROZEN = ("norm", "head", "input_mlp", "embeddings", "sink")
_TOLERANCE = {"loss": 1e-5, "gradient": 1e-4}  # fp32, relative


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py egpt``."""
    add_sizes(
        parser,
        {
            "hidden": (768, "width of encoder and decoder"),
            "layers": (3, "decoder blocks"),
            "encoder-layers": (12, "encoder blocks"),
            "heads": (12, "heads of both"),
            "chunks": (16, "chunks in a window"),
            "chunk-size": (1024, "tokens in a chunk"),
            "windows": (1, "windows in a step"),
        },
    )
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="a token memory over frozen blocks and head, which alone learns; an overlap of a "
        "quarter of a chunk",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="egpt=DIR")
    add_profile(parser)
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    names = ("hidden", "layers", "encoder_layers", "heads", "chunks", "chunk_size", "windows")
    shape = {name: getattr(arguments, name) for name in names}
    threads = arguments.threads
    options = {"zero": 0, "precision": "auto", "recompute": "none", "compile": arguments.compile}
    kinds = ["online features", "stored history", "stored states"]
    if arguments.memory:
        if arguments.peer:
            raise ConfigError("--memory is ours alone: leave --peer out")
        options["freeze"] = (f"layers:0-{shape['layers'] - 1}", *_FROZEN)
        kinds = ["online features", "stored states", "stored predictions"]
    candidates = [
        Candidate(f"megaegpt, {kind}", ours, (shape, kind, options), threads=threads)
        for kind in kinds
    ]
    record: dict[str, Any] = {"shape": shape}
    for folder in parse_peers(arguments.peer, ("egpt",)).values():
        record["parity"] = _check_parity(folder or Path(), shape)
        candidates.append(Candidate("original", original, (folder, shape), threads=threads))
    results = compare(candidates, arguments.repetitions, profile=arguments.profile)
    print_results(f"EGPT training window, {shape}", "tokens", results)
    return record | {"results": [result.as_dict() for result in results]}


def _configs(shape: dict[str, int], memory: bool = False) -> tuple[ModelConfig, ModelConfig]:
    overlap = shape["chunk_size"] // 4 if memory else 0
    common = {
        "hidden_size": shape["hidden"],
        "num_heads": shape["heads"],
        "activation": "gelu",
        "max_seq_len": shape["chunk_size"] + overlap,
        "positions": "rotary" if memory else "learned",
    }
    encoder = ModelConfig(num_layers=shape["encoder_layers"], **common)  # type: ignore[arg-type]
    chunks = EGPTConfig(
        num_chunks=shape["chunks"],
        chunk_size=shape["chunk_size"],
        local_attention=memory,
        attention_sink=memory,
        memory_gate=memory,
        adapter_residual=memory,
        token_memory=memory,
    )
    decoder = ModelConfig(
        kind="egpt",
        num_layers=shape["layers"],
        bias=False,
        egpt=chunks,
        encoder=EncoderConfig(overlap=overlap),
        **common,  # type: ignore[arg-type]
    )
    return encoder, decoder


def _window(shape: dict[str, int], device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    size = (shape["windows"], shape["chunks"] * shape["chunk_size"] + 1)
    tokens = torch.randint(VOCAB, size, device=device)
    chunks = (shape["chunks"], shape["chunk_size"])
    return tokens[:, :-1].unflatten(1, chunks), tokens[:, 1:].unflatten(1, chunks)


def ours(shape: dict[str, int], features: str, options: dict[str, Any]) -> Workload:
    """One step through the engine: encode what is not stored, one pass over the window."""
    from megaegpt.precision import DTYPES, resolve_precision
    from tools.benchmarks.engines import build_engine, facts

    encoder_config, config = _configs(shape, memory="freeze" in options)
    gpt = build_model(encoder_config, single_grid(), compile_blocks=options["compile"])
    encoder = FrozenEncoder(gpt)  # type: ignore[arg-type]
    precision = resolve_precision(options["precision"], gpt.grid.device)
    dtype = DTYPES[precision]
    inputs = build_inputs(config, encoder.to(dtype), dtype)
    engine = build_engine(config, shape["windows"], options, inputs.loss)
    tokens, targets = _window(shape, engine.grid.device)
    batch = {"tokens": tokens, "targets": targets.contiguous()}
    if features != "online features":  # as a store has them
        arguments = inputs.arguments(batch)
        batch["features"] = arguments["features"]
        if features != "stored history":
            batch["token_states"] = arguments["token_states"]
        if features == "stored predictions":
            batch |= _predicted(engine.model, batch)
    step = itertools.count()

    def one() -> None:
        engine.train_step(next(step), [batch])

    return Workload(one, targets.numel(), facts(engine, config))


def _predicted(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What blocks and head predict of a batch's chunks, as a store has it."""
    assert isinstance(model, EGPT)
    of_chunks = (batch[name].flatten(0, 1) for name in ("token_states", "targets"))
    found = zip(PREDICTIONS, model.predict_alone(*of_chunks), strict=True)
    return {name: x.unflatten(0, batch["tokens"].shape[:2]) for name, x in found}


def _original_model(folder: Path, shape: dict[str, int]) -> Any:
    module = load_module(folder, "model.py")
    sizes = {"n_head": shape["heads"], "n_embd": shape["hidden"], "vocab_size": VOCAB}
    encoder = module.GPTConfig(
        n_layer=shape["encoder_layers"], block_size=shape["chunk_size"], bias=True, **sizes
    )
    config = module.EGPTConfig(
        encoder_config=encoder,
        n_layer=shape["layers"],
        block_size=shape["chunks"],
        bias=False,
        **sizes,
    )
    return module.EGPT(config).to(single_grid().device)


def _original_window(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Its training procedure: chunk after chunk, each differentiated at once."""
    chunks = tokens.shape[1]
    total = torch.zeros((), device=tokens.device)
    for chunk in range(chunks):
        _, loss = model(tokens[:, chunk], targets[:, chunk], is_init=chunk == 0)
        (loss / chunks).backward()
        total += loss.detach() / chunks
    return total


def original(folder: Path, shape: dict[str, int]) -> Workload:
    """The original's model class and window, with the same optimizer."""
    model = _original_model(folder, shape)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    tokens, targets = _window(shape, single_grid().device)

    def one() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            _original_window(model, tokens, targets)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Workload(one, targets.numel())


# -- parity ---------------------------------------------------------------------------------------


def _block_pairs(theirs: Any, name: str) -> list[tuple[str, Any]]:
    """Our parameter names under ``name`` and the original's tensors of one block."""
    q, k, v = theirs.attn.c_attn.weight.chunk(3, dim=0)
    pairs = [
        ("attention_norm.weight", theirs.ln_1.weight),
        ("attention.query.weight", q),
        ("attention.key.weight", k),
        ("attention.value.weight", v),
        ("attention.output.weight", theirs.attn.c_proj.weight),
        ("mlp_norm.weight", theirs.ln_2.weight),
        ("mlp.up.weight", theirs.mlp.c_fc.weight),
        ("mlp.down.weight", theirs.mlp.c_proj.weight),
    ]
    if theirs.attn.c_attn.bias is not None:
        q, k, v = theirs.attn.c_attn.bias.chunk(3, dim=0)
        pairs += [
            ("attention_norm.bias", theirs.ln_1.bias),
            ("attention.query.bias", q),
            ("attention.key.bias", k),
            ("attention.value.bias", v),
            ("attention.output.bias", theirs.attn.c_proj.bias),
            ("mlp_norm.bias", theirs.ln_2.bias),
            ("mlp.up.bias", theirs.mlp.c_fc.bias),
            ("mlp.down.bias", theirs.mlp.c_proj.bias),
        ]
    return [(f"{name}.{key}", tensor) for key, tensor in pairs]


def _stack_pairs(blocks: Any, norm: Any) -> list[tuple[str, Any]]:
    pairs = [p for i, b in enumerate(blocks) for p in _block_pairs(b, f"stack.blocks.{i}")]
    pairs.append(("stack.norm.weight", norm.weight))
    if norm.bias is not None:
        pairs.append(("stack.norm.bias", norm.bias))
    return pairs


def _decoder_pairs(theirs: Any) -> list[tuple[str, Any]]:
    return [
        ("input_mlp.up.weight", theirs.ffwd.c_fc.weight),
        ("input_mlp.down.weight", theirs.ffwd.c_proj.weight),
        ("chunk_positions.table.weight", theirs.position_embedding_table.weight),
        ("lengths.weight", theirs.length_embedding_table.weight),
        *_stack_pairs(theirs.blocks, theirs.ln_f),
        ("head.weight", theirs.lm_head.weight),
    ]


def _copy(model: GPT | EGPT, pairs: list[tuple[str, Any]]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in pairs:
            parameters.pop(name)[: tensor.shape[0]] = tensor
    if parameters:
        raise AssertionError(f"not copied: {sorted(parameters)}")


def _check_parity(folder: Path, shape: dict[str, int]) -> dict[str, float]:
    """Relative differences of loss and gradients on a small window with the same weights.

    Raises:
        MegaEGPTError: they are larger than rounding explains.
    """
    small = dict(shape, chunks=min(shape["chunks"], 3), chunk_size=min(shape["chunk_size"], 64))
    theirs, grid = _original_model(folder, small), single_grid()
    device = grid.device
    encoder_config, config = _configs(small)
    gpt, model = build_model(encoder_config, grid), build_model(config, grid)
    transformer = theirs.encoder.transformer
    _copy(
        gpt,  # type: ignore[arg-type]
        [
            ("embedding.weight", transformer.wte.weight),
            ("positions.table.weight", transformer.wpe.weight),
            *_stack_pairs(transformer.h, transformer.ln_f),
        ],
    )
    _copy(model, _decoder_pairs(theirs))  # type: ignore[arg-type]
    tokens, targets = _window(small, device)
    their_loss = _original_window(theirs, tokens, targets)
    states = FrozenEncoder(gpt)(tokens)  # type: ignore[arg-type]
    loss = model(states, states[:, :-1, -1], targets) / targets.numel()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    worst = 0.0
    for name, tensor in _decoder_pairs(_Gradients(theirs)):
        ours_grad = grads[name]
        assert ours_grad is not None
        difference = (ours_grad[: tensor.shape[0]] - tensor).abs().max() / tensor.abs().max()
        worst = max(worst, difference.item())
    parity = {"loss": abs(loss.item() / their_loss.item() - 1), "gradient": worst}
    for what, difference in parity.items():
        if difference > _TOLERANCE[what]:
            raise MegaEGPTError(f"{what} differs from the original's by {difference:.1e}")
    print(f"parity with the original: loss {parity['loss']:.1e}, gradients {worst:.1e} (relative)")
    return parity


class _Gradients:
    """A module seen through its gradients: ``.weight`` is the weight's gradient, and so on."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, torch.nn.Parameter):
            return value.grad
        return value if value is None else _Gradients(value)

    def __iter__(self) -> Any:
        return map(_Gradients, self._module)
