"""What must hold on a GPU: fused kernels, bf16, compiled blocks, ZeRO-2, decoding.

All of it runs on the CPU as well, at the same size, so that it is known to work before a GPU is at
hand; only what is compiled needs one, as the CPU's compiler takes too long. ``pytest -m gpu`` runs
the part for GPUs.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaegpt.config import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megaegpt.generation.generator import TextGenerator
from megaegpt.model.attention.causal import Segments, causal_attention
from megaegpt.model.build import build_model
from megaegpt.parallel.devices import local_device
from megaegpt.parallel.grid import ProcessGrid

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
both = pytest.mark.parametrize("device", ["cpu", GPU])

MODEL = ModelConfig(
    vocab_size=200, max_seq_len=96, hidden_size=64, num_layers=2, num_heads=4, init_std=0.1
)
VARIANTS = {
    "multi_head": {},
    "grouped_rotary": {"num_kv_heads": 2, "positions": "rotary"},
    "window": {"window": 24, "num_kv_heads": 1},
    "latent_rotary": {"attention": "latent", "positions": "rotary", "rope_head_dim": 8},
}
variants = pytest.mark.parametrize("name", VARIANTS)


@both
def test_a_process_computes_on_the_gpu_where_there_is_one(device):
    assert local_device().type == device


def grid_on(device: str) -> ProcessGrid:
    return ProcessGrid(device=torch.device(device))


def model_on(device: str, name: str, **options):
    return build_model(replace(MODEL, **VARIANTS[name]), grid_on(device), **options)


def tokens_on(device: str, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(MODEL.vocab_size, (rows, 97), generator=generator).to(device)


def loss_and_gradients(model, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean nats and fp32 gradients by name."""
    targets = tokens[:, 1:].contiguous()
    loss = model(tokens[:, :-1], targets) / targets.numel()
    loss.backward()
    return loss.detach(), {n: p.grad.float() for n, p in model.named_parameters()}


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((a - b).norm() / b.norm()).item()


WINDOW = 70
DOCUMENT = 50
"""Tokens of a document in packed texts."""


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    """Repeated heads, an explicit mask and softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    places = torch.arange(q.shape[2])
    distance = places[:, None] - places
    hidden = distance < 0
    if mask == "window":
        hidden |= distance >= WINDOW
    if mask == "documents":
        hidden |= places[:, None] // DOCUMENT != places // DOCUMENT
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[3] ** 0.5
    return scores.masked_fill(hidden.to(q.device), -torch.inf).softmax(-1) @ v


def our_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    segments = None
    if mask == "documents":
        numbers = torch.arange(q.shape[2], device=q.device).div(DOCUMENT, rounding_mode="floor")
        segments = Segments(*[numbers.expand(q.shape[0], -1)] * 2)
    return causal_attention(q, k, v, window=WINDOW if mask == "window" else None, segments=segments)


KERNELS = [
    pytest.param(None, "causal", id="causal-as_torch_chooses"),
    pytest.param(SDPBackend.FLASH_ATTENTION, "causal", id="causal-flash"),
    pytest.param(SDPBackend.CUDNN_ATTENTION, "causal", id="causal-cudnn"),
    pytest.param(None, "window", id="window-as_torch_chooses"),
    pytest.param(None, "documents", id="documents-as_torch_chooses"),
]


@both
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("length", [192, 704])
@pytest.mark.parametrize(("kernel", "mask"), KERNELS)
def test_fused_attention_is_the_naive_one(device, kv_heads, length, kernel, mask):
    """In bf16 on the GPU, where the unmasked case is served by each kernel and as torch chooses.

    At these lengths, 64 more than multiples of 128, cuDNN's gradients with masks were NaN.
    """
    if device == "cpu" and (kernel is not None or length > 192):
        pytest.skip("the CPU has one kernel")
    on_gpu = device == "cuda"
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, heads, length, 64, generator=generator).to(device)
        for heads in (8, kv_heads, kv_heads)
    ]
    inputs = [x.bfloat16() if on_gpu else x for x in inputs]
    upstream = torch.randn(2, 8, length, 64, generator=generator).to(device)

    def run(attention, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        y = attention(*leaves, mask)
        y.backward(upstream.to(y.dtype))
        return [y, *(x.grad for x in leaves)]

    with sdpa_kernel(kernel) if on_gpu and kernel is not None else nullcontext():
        fused = run(our_attention, inputs)
    naive = run(naive_attention, [x.float() for x in inputs])
    for ours, expected in zip(fused, naive, strict=True):
        assert difference(ours.float(), expected) < (1e-2 if on_gpu else 1e-5)


@both
@variants
def test_bf16_follows_fp32(device, name):
    model = model_on(device, name)
    half = copy.deepcopy(model).bfloat16()
    tokens = tokens_on(device)
    loss, gradients = loss_and_gradients(model, tokens)
    half_loss, half_gradients = loss_and_gradients(half, tokens)
    assert abs(half_loss / loss - 1) < 2e-3
    for key, gradient in gradients.items():
        if gradient.norm() > 1e-6:  # keys' biases have none but rounding
            assert difference(half_gradients[key], gradient) < 0.05, key


@pytest.mark.parametrize("device", [GPU])
@variants
def test_compiled_blocks_compute_what_eager_ones_do(device, name):
    tokens = tokens_on(device)
    loss, gradients = loss_and_gradients(model_on(device, name), tokens)
    compiled_loss, compiled = loss_and_gradients(
        model_on(device, name, compile_blocks=True), tokens
    )
    assert abs(compiled_loss / loss - 1) < 1e-5
    for key, gradient in gradients.items():
        if gradient.norm() > 1e-6:
            assert difference(compiled[key], gradient) < 1e-3, key


@both
@variants
def test_cached_decoding_is_uncached_decoding(device, name):
    model = model_on(device, name).eval()
    generator = TextGenerator(model)
    prompts = tokens_on(device)[:, :30].tolist()
    greedy = GenerationConfig(max_new_tokens=6, temperature=0.0)
    cached = generator.generate(prompts, greedy)
    assert cached == generator.generate(prompts, greedy, use_cache=False)
    assert len({tuple(row) for row in cached}) == len(prompts)


@pytest.mark.parametrize("device", [GPU])
def test_the_compiled_step_writes_the_text_of_the_uncompiled_one(device):
    """By a CUDA graph; ``tests/generation/test_compiled.py`` has the step itself on the CPU."""
    model = model_on(device, "window").eval()
    prompts = tokens_on(device)[:, :30].tolist()
    greedy = GenerationConfig(max_new_tokens=12, temperature=0.0)
    generator = TextGenerator(model, compiled=True)
    for _ in range(2):
        assert generator.generate(prompts, greedy) == TextGenerator(model).generate(prompts, greedy)
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)  # at another place of memory


def zero_2_losses(device: str) -> tuple[list[float], list[float]]:
    """Losses of 6 bf16 steps under ZeRO-2, and of plain fp32 torch. In a process of its own."""
    import torch.distributed as dist

    from megaegpt.parallel.launch import init_distributed
    from megaegpt.training.engine.engine import Engine
    from megaegpt.training.engine.optimizer import build_optimizer
    from megaegpt.training.engine.schedule import learning_rate

    alone = not dist.is_initialized()
    if alone:
        init_distributed()
    config = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(zero_stage=2),
        training=TrainingConfig(steps=6, global_batch_size=4, micro_batch_size=2, precision="bf16"),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
    )
    tokens = tokens_on(device, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    grid = ProcessGrid.create(1, torch.device(device))
    engine = Engine(build_model(MODEL, grid), grid, config)
    halves = [{"tokens": inputs[i::2], "targets": targets[i::2]} for i in range(2)]
    ours = [engine.train_step(step, halves).loss.item() for step in range(6)]
    engine.close()
    model = build_model(MODEL, grid)
    optimizer = build_optimizer(model, config.optimizer, ProcessGrid())
    plain = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimizer, 6)
        loss = model(inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    if alone:
        dist.destroy_process_group()
    return ours, plain


@both
def test_steps_under_zero_2_are_those_of_plain_torch(device, request):
    if device == "cpu":
        ((ours, plain),) = request.getfixturevalue("distributed")(1, zero_2_losses, device)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            ours, plain = pool.submit(zero_2_losses, device).result()
    assert plain[0] - plain[-1] > 1
    for mine, theirs in zip(ours, plain, strict=True):
        assert abs(mine / theirs - 1) < 0.01, list(itertools.zip_longest(ours, plain))
