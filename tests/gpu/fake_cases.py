"""What runs on the fake GPU of ``fake_device``: a case is a name and a function that raises."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import megaegpt.model.encoder
from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig
from megaegpt.generation import compiled as compiled_steps
from megaegpt.generation.compiled import CompiledSteps
from megaegpt.model.build import Model, build_inputs, empty_model, gpt_of, new_decoder
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from megaegpt.model.initialization import initialize_sink, initialize_token_memory
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.loss import own_abilities
from megaegpt.parallel.params import ParamSpec, unshard
from megaegpt.parallel.together import all_gather_object, all_reduce_max, broadcast_object
from tests.gpu.fake_device import DEVICE, Transfers, enable, fake_gpu

SMALL = ModelConfig(vocab_size=500, max_seq_len=256, hidden_size=64, num_layers=2, num_heads=4)
CHUNKS = EGPTConfig(num_chunks=4, chunk_size=32)
LLAMA: dict[str, Any] = {
    "norm": "rms_norm",
    "mlp": "swiglu",
    "bias": False,
    "positions": "rotary",
    "num_kv_heads": 2,
}
GPTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen3": LLAMA | {"qk_norm": "head", "head_dim": 24},
    "olmo2": LLAMA | {"qk_norm": "projection", "norm_placement": "post", "logit_softcap": 30.0},
    "dropout": {"dropout": 0.1, "z_loss": 1e-4},
    "window_multi_query": {"window": 48, "num_kv_heads": 1, "positions": "sinusoidal"},
    "latent_rotary": {"attention": "latent", "positions": "rotary", "rope_head_dim": 8},
    "documents": {"document_end": 7, "num_kv_heads": 2},
}
EGPTS: dict[str, dict[str, Any]] = {
    "original": {},
    "improved": {
        "local_attention": True,
        "token_memory": True,
        "memory_dim": 16,
        "adapter_residual": True,
    },
    "gate": {"memory_gate": True},
    "no_history": {"history": False},
    "token_memory": {
        "local_attention": True,
        "token_memory": True,
        "memory_dim": 16,
        "memory_pointers": 2,
    },
    "token_memory_chunks": {"token_memory": True, "memory_dim": 16, "memory_chunks": 1},
}

Case = Callable[[], object]


def _model(config: ModelConfig, grid: ProcessGrid, recompute: Any = "none") -> Model:
    with DEVICE:
        model = empty_model(config, grid)
    model.stack.recompute = recompute
    return model


def _encoder(config: ModelConfig, grid: ProcessGrid) -> FrozenEncoder:
    """One as wide as the model that reads it."""
    wide = replace(SMALL, hidden_size=config.hidden_size, num_heads=config.num_heads)
    gpt = _model(wide, grid)
    assert isinstance(gpt, GPT)
    return FrozenEncoder(gpt)


def _tokens(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device=DEVICE)


def train(
    config: ModelConfig,
    recompute: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    grid: ProcessGrid | None = None,
    sequence: bool = False,
) -> None:
    """A micro-step with everything that is on the device, and an evaluation."""
    grid = grid or ProcessGrid(device=DEVICE)
    with fake_gpu(dtype) as attention:
        model = _model(config, grid, recompute)
        encode = _encoder(config, grid) if config.needs_encoder else None
        for part in (model, *([] if encode is None else [encode.gpt])):
            part.stack.sequence_parallel = sequence
        if grid.tp_group is not None:  # else ranks agree on it, by values, which fakes have not
            fused, memory = own_abilities(DEVICE)
            options = replace(model.head.loss_options, fused=fused, memory=memory)
            model.head.loss_options = options
        batch = {name: _tokens(2, config.sample_len) for name in ("tokens", "targets")}
        inputs = build_inputs(config, encode, dtype)
        batch = dict(inputs.prepare(batch))
        scale = torch.ones((), device=DEVICE, dtype=torch.float32)
        model.head.expect_backward_scale(scale)
        with Transfers():
            (inputs.loss(model, batch) * scale).backward()
            trained_with = set(attention.chosen)
            with torch.no_grad():
                inputs.loss(model.eval(), batch, "none")
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, f"{name} has no gradient"
            assert (gradient.device, gradient.dtype) == (DEVICE, parameter.dtype), name
        if isinstance(model, GPT) and dtype == torch.bfloat16 and not config.window:
            assert trained_with == {"efficient" if config.document_end else "cudnn"}


def decode(config: ModelConfig, compiled: bool = False) -> None:
    """A prompt and enough tokens behind it to begin a chunk, or to forget half of the context."""
    with fake_gpu(), torch.inference_mode():
        grid = ProcessGrid(device=DEVICE)
        model = _model(config, grid).eval()
        encoder = _encoder(config, grid) if config.needs_encoder else None
        steps = None
        if compiled:
            steps = CompiledSteps(gpt_of(model, encoder), with_head=encoder is None)
        decoder = new_decoder(model, encoder, 2, 300, steps)
        with Transfers():
            decoder.advance(_tokens(2, 254))
            for _ in range(3):
                decoder.advance(_tokens(2, 1))


def encode(**options: Any) -> None:
    """Chunks with and without the tokens before them."""
    with fake_gpu():
        gpt = _model(replace(SMALL, **options), ProcessGrid(device=DEVICE))
        assert isinstance(gpt, GPT)
        encoder, tokens = FrozenEncoder(gpt), _tokens(2, 4, 32)
        with Transfers():
            assert encoder(tokens).shape == (2, 4, 32, 64)
            assert encoder(tokens, _tokens(2, 4, 8)).shape == (2, 4, 32, 64)


def begin_on_the_host() -> None:
    """What begins as states of an encoder, in a model that waits to be cut over the ranks."""
    config = _of_kind("egpt", EGPTS["token_memory"] | {"attention_sink": True})
    cov = mock.patch.object(Tensor, "cov", lambda matrix: matrix @ matrix.T)  # torch's reads values
    with fake_gpu(), cov:
        grid, tokens = ProcessGrid(device=DEVICE), torch.zeros(4, 32, dtype=torch.int64)
        model, encoder = empty_model(config, grid), _encoder(config, grid)
        assert isinstance(model, EGPT)
        initialize_token_memory(model, encoder, "", tokens)
        initialize_sink(model, encoder, tokens)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def training_waits() -> None:
    """A control: reading a value of the device."""
    with fake_gpu():
        _tokens(1).sum().item()


def devices_are_mixed() -> None:
    """A control."""
    with fake_gpu():
        torch.zeros(3, device=DEVICE) + torch.arange(3)


def results_are_fetched() -> None:
    """A control."""
    with fake_gpu(), Transfers():
        _tokens(3).cpu()


CONTROLS: dict[str, Case] = {
    "control: a value is read": training_waits,
    "control: devices are mixed": devices_are_mixed,
    "control: a tensor is fetched": results_are_fetched,
}
"""What must fail."""


def _of_kind(kind: str, chunks: Mapping[str, Any], **options: Any) -> ModelConfig:
    egpt = replace(CHUNKS, **chunks)
    return replace(SMALL, kind=kind, egpt=egpt, tied_embeddings=False, **options)


def short_cases() -> dict[str, Case]:
    """Every kind of model, and each way to attend and to decode once."""
    cases: dict[str, Case] = {}
    recomputing = {"gpt2": "selective", "llama": "full", "window_multi_query": "none"}
    for name, recompute in (recomputing | {"documents": "none"}).items():
        config = replace(SMALL, **GPTS[name])
        case = functools.partial(train, config, recompute)
        cases[f"{name} trains, recomputing {recompute}"] = case
    for name in ("improved", "gate"):
        config = _of_kind("egpt", EGPTS[name])
        cases[f"egpt {name} trains"] = functools.partial(train, config)
    for name in ("improved", "token_memory"):
        config = _of_kind("egpt", EGPTS[name])
        cases[f"egpt {name} decodes"] = functools.partial(decode, config)
    config = _of_kind("egpt", EGPTS["token_memory"])
    cases["egpt token_memory decodes, compiled"] = functools.partial(decode, config, True)
    cases["deepgpt trains"] = functools.partial(train, _of_kind("deepgpt", {}))
    cases["encoder"] = encode
    cases["a memory and a sink begin in the host's memory"] = begin_on_the_host
    config = replace(SMALL, **GPTS["latent_rotary"])
    cases["latent_rotary decodes"] = functools.partial(decode, config)
    cases["llama decodes, compiled"] = functools.partial(decode, replace(SMALL, **LLAMA), True)
    return cases


def long_cases() -> dict[str, Case]:
    """Every kind in every way."""
    cases: dict[str, Case] = {"encoder, llama": functools.partial(encode, **LLAMA)}
    for name, options in GPTS.items():
        config = replace(SMALL, **options)
        for recompute in ("none", "selective", "full"):
            for dtype in (torch.bfloat16, torch.float32):
                case = functools.partial(train, config, recompute, dtype)
                cases[f"{name} trains in {dtype}, recomputing {recompute}"] = case
        cases[f"{name} decodes"] = functools.partial(decode, config)
        if config.document_end is None:
            cases[f"{name} decodes, compiled"] = functools.partial(decode, config, True)
    grouped = {"num_kv_heads": 2, "positions": "rotary", "window": 20}
    overlapping = {"encoder": EncoderConfig(overlap=8)}
    for kind, variants in (("egpt", EGPTS), ("deepgpt", {"": {}})):
        for name, chunks in variants.items():
            for more in ({}, grouped, overlapping):
                title, config = f"{kind} {name} {list(more)}", _of_kind(kind, chunks, **more)
                for recompute in ("none", "selective"):
                    case = functools.partial(train, config, recompute)
                    cases[f"{title} trains, recomputing {recompute}"] = case
                for compiled in (False, True):
                    case = functools.partial(decode, config, compiled)
                    cases[f"{title} decodes{', compiled' * compiled}"] = case
    return cases


def rank_cases() -> dict[str, Case]:
    """As rank 9 of 64, tensor-parallel over 8; what is sent goes nowhere."""
    wide = replace(SMALL, num_heads=8, hidden_size=128)

    def of(config: ModelConfig, recompute: str = "none", sequence: bool = False) -> None:
        grid = ProcessGrid.create(8, DEVICE)
        assert (grid.tp_rank, grid.dp_rank, grid.dp_size) == (1, 1, 8)
        assert dist.get_process_group_ranks(grid.tp_group) == list(range(8, 16))
        assert dist.get_process_group_ranks(grid.dp_group) == list(range(1, 64, 8))
        train(config, recompute, grid=grid, sequence=sequence)

    def sharing_samples(config: ModelConfig, sequence: bool = False) -> None:
        grid = ProcessGrid.create(4, DEVICE, cp_size=2)
        assert (grid.tp_rank, grid.cp_rank, grid.dp_rank, grid.dp_size) == (1, 0, 1, 8)
        assert dist.get_process_group_ranks(grid.cp_group) == [9, 13]
        assert dist.get_process_group_ranks(grid.replica_group) == list(range(1, 64, 4))
        train(config, "full", grid=grid, sequence=sequence)

    egpt = replace(wide, kind="egpt", egpt=CHUNKS, tied_embeddings=False)
    memory = replace(egpt, egpt=replace(CHUNKS, **EGPTS["improved"]))
    return {
        "llama with 2 key heads on 8 x 8 ranks": functools.partial(
            of, replace(wide, **LLAMA), "full"
        ),
        "egpt on 8 x 8 ranks": functools.partial(of, egpt),
        "gpt2 on 8 x 8 ranks, cut by tokens": functools.partial(of, wide, "none", True),
        "egpt on 8 x 8 ranks, cut by tokens": functools.partial(of, memory, "selective", True),
        "gpt2 on 4 x 2 x 8 ranks": functools.partial(sharing_samples, wide),
        "latent attention on 4 x 2 x 8 ranks, cut by tokens": functools.partial(
            sharing_samples, replace(wide, attention="latent", latent_dim=16), True
        ),
    }


def join_two_backends(rank: int, port: int) -> None:
    """As one of two ranks in groups as on GPUs, gloo beside what stands for NCCL."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the back-end)

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("cpu:gloo,cuda:fake", init_method=address, rank=rank, world_size=2)
    for tp_size in (1, 2):
        grid = ProcessGrid.create(tp_size, DEVICE)
        group = grid.tp_group or grid.dp_group
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total, group=group)
        assert total.item() == 3.0
        spec = ParamSpec((4,), tp_dim=0)
        full = unshard(torch.full((4 // tp_size,), float(grid.tp_rank)), spec, grid)
        assert full.tolist() == ([0.0] * 4 if tp_size == 1 else [0.0, 0.0, 1.0, 1.0])
        assert all_gather_object(rank, grid) == [0, 1]
        assert all_reduce_max([rank], grid) == [1]
        assert broadcast_object(lambda: "first", grid) == "first"
    dist.destroy_process_group()


def _prepare() -> None:
    """Replace what needs values or a compiler: nothing here is compiled, or recorded as a graph."""
    enable()
    torch.set_num_threads(1)
    megaegpt.model.encoder.weights_fingerprint = lambda model: ""  # it reads the weights
    properties = SimpleNamespace(total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda device: properties  # type: ignore[assignment]
    as_it_is = functools.wraps(torch.compile)(lambda function, **_: function)
    torch.compile = as_it_is  # type: ignore[assignment]
    compiled_steps.record = lambda run: run
    compiled_steps.places_in_memory = lambda gpt: []


def run_rank(rank: int, port: int, results: Connection) -> None:
    """In a process of its own: :func:`join_two_backends`."""
    try:
        join_two_backends(rank, port)
        results.send("")
    except Exception:
        results.send(traceback.format_exc())


def run_cases(which: str, results: Connection) -> None:
    """In a process of its own: send what went wrong by case, an empty text where nothing did."""
    _prepare()
    if which == "ranks":
        import torch.distributed._tools.fake_collectives  # noqa: F401 (collectives of fake tensors)
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=9, world_size=64, store=FakeStore())
        new_group = dist.new_group
        dist.new_group = lambda backend, **more: new_group(backend="fake", **more)
    found = {"short": short_cases, "long": long_cases, "ranks": rank_cases}[which]()
    if which == "short":
        found |= CONTROLS
    outcome = {}
    for name, case in found.items():
        try:
            case()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    results.send(outcome)
