"""Training runs that others have measured, beside what the simulation says of them.

Sources:

- Megatron-LM's README, ``images/model_table.png`` (Megatron Core 0.8; H100 SXM, 4,096 tokens, a
  vocabulary of 131,072, 48 data-parallel ranks, 192 sequences a step). Micro-batches are not told,
  and taken to be one sequence.
- torchtitan's ``benchmarks/llama3_h100_202412_torchtitan.md`` and, at 2887250bb,
  ``benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md`` (H100 with HBM2e and 500 W), and its
  ``docs/performance.md`` at 157a12c56 (A100, not compiled). Its network is taken to be a DGX's.
- llm-foundry's ``scripts/train/benchmarking/README.md`` (MPT models in 2023's software, not
  compiled): of each size its largest run at 2,048 tokens. No constant was chosen by these, nor
  changed after they had been predicted.

Of the tables of the first two are left out: pipeline parallelism and float8, which this project has
not; context parallelism, which they measure under float8 alone; and recomputing every other block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megaegpt.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megaegpt.planning.hardware import Accelerator, find_accelerator
from megaegpt.planning.memory import MemoryEstimate
from megaegpt.planning.plan import Communication, Machines, Plan, StepTime
from megaegpt.planning.simulation import (
    Program,
    Simulation,
    TracedBlocks,
    reachable_rates,
    simulate,
    trace_blocks,
)
from megaegpt.planning.summary import ModelSize, measure_model

_PER_NODE = 8
_BF16, _FP32 = 2, 4

OVERLAPPED_TENSOR_PARALLEL = 2 / 3
"""Share of tensor-parallel communication that Megatron's ``--tp-comm-overlap`` and torchtitan's
asynchronous tensor parallelism hide: chosen by torchtitan's run of 70B."""


@dataclass(frozen=True)
class PublishedRun:
    """A measured run of another program, in bf16, on machines of 8 GPUs."""

    name: str
    sharding: Literal["optimizer", "all"]
    """Over data-parallel ranks: ``optimizer`` is Megatron's distributed optimizer, which scatters
    gradients and gathers weights once a step; ``all`` is FSDP, which gathers weights for every pass
    and scatters the gradients of every micro-step in fp32. Both hide it beside computation."""
    accelerator: Accelerator
    gpus: int
    model: ModelConfig
    micro_batch: int
    measured: float
    """Tokens a second and GPU."""
    tensor_parallel: int = 1
    """With sequence parallelism where it is more than 1."""
    global_batch: int | None = None
    """None: a micro-batch of each data-parallel rank."""
    recompute: Literal["none", "selective", "full"] = "none"
    """``selective`` is torchtitan's by operators, which repeats half of a block's products, too."""
    compiled: bool = False
    overlapped: bool = False
    """Tensor-parallel communication beside products."""
    chose: str = ""
    """The constant that this run was chosen to give; empty: it is predicted from the others."""

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // self.tensor_parallel

    def config(self) -> RunConfig:
        """Its run in this project's terms."""
        tp = self.tensor_parallel
        return RunConfig(
            model=self.model,
            parallel=ParallelConfig(tensor_parallel_size=tp, sequence_parallel=tp > 1),
            training=TrainingConfig(
                precision="bf16",
                micro_batch_size=self.micro_batch,
                global_batch_size=self.global_batch or self.micro_batch * self.dp_size,
                activation_checkpointing=self.recompute,
                compile=self.compiled,
            ),
        )

    def program(self) -> Program:
        """What it hides, and repeats."""
        return Program(
            hides_gradients=True,
            hides_weights=True,
            pieces=self.model.num_layers,
            hides_tensor_parallel=OVERLAPPED_TENSOR_PARALLEL if self.overlapped else 0.0,
            repeats_products=0.5 if self.recompute == "selective" else 0.0,
        )


def simulate_published(run: PublishedRun) -> Simulation:
    """Its step, with the operators that torch has for it rather than this project's own."""
    machines = Machines(run.accelerator, run.gpus, _PER_NODE)
    config = run.config()
    traced = trace_blocks(config, "bf16", reachable_rates(machines, "bf16"), own_operators=False)
    size = measure_model(config)
    time = _communication_time(run, machines, size, traced)
    nothing = Communication(0, 0, 0, 0, 0, 0)  # the program's own is in the time
    plan = Plan(config, machines, "bf16", size, MemoryEstimate(), nothing, time)
    return simulate(plan, program=run.program(), traced=traced)


def _communication_time(
    run: PublishedRun, machines: Machines, size: ModelSize, traced: TracedBlocks
) -> StepTime:
    """At the data sheets' speed, nothing hidden."""
    tp, dp = run.tensor_parallel, run.dp_size
    micro_steps = run.config().gradient_accumulation(dp)
    parameters = size.parameters / tp * (dp - 1) / dp
    sums, gatherings = (1, 1) if run.sharding == "optimizer" else (micro_steps, 2 * micro_steps)
    within = (2 * traced.summed + traced.cut) * micro_steps * (tp - 1) / tp
    across = machines.bandwidth(dp, stride=tp)
    return StepTime(
        compute=0.0,  # by operators
        tensor_parallel=within / machines.bandwidth(tp),
        context_parallel=0.0,
        gradients=_FP32 * parameters * sums / across,
        weights=_BF16 * parameters * gatherings / across,
    )


def published_runs() -> list[PublishedRun]:
    """All of them, by source."""
    return [*_megatron(), *_torchtitan_h100(), *_torchtitan_a100(), *_llm_foundry()]


def _megatron() -> list[PublishedRun]:
    accelerator = find_accelerator("h100", _PER_NODE)
    rows = [  # name, layers, width, heads, tensor-parallel size, measured teraFLOP/s of a GPU
        ("1.7B", 24, 2048, 16, 1, 408.8),
        ("7.1B", 30, 4096, 32, 2, 465.9),
        ("16B", 32, 6144, 48, 4, 489.1),
        ("32B", 48, 7168, 56, 8, 459.6),
    ]
    return [
        PublishedRun(
            f"Megatron {name}",
            "optimizer",
            accelerator,
            48 * tp,
            ModelConfig(
                vocab_size=131072,
                max_seq_len=4096,
                hidden_size=width,
                num_layers=layers,
                num_heads=heads,
            ),
            1,
            1e12 * teraflops / _megatron_flops(layers, width),
            tp,
            192,
            compiled=True,
            overlapped=True,
            chose="H100's products" if name == "7.1B" else "",
        )
        for name, layers, width, heads, tp, teraflops in rows
    ]


def _megatron_flops(layers: int, width: int) -> float:
    """Operations of a token as Megatron counts them (arXiv 2104.04473, equation 3), without the
    recomputation that these runs do not have.
    """
    return 72 * layers * width**2 * (1 + 4096 / (6 * width) + 131072 / (12 * layers * width))


def _torchtitan_h100() -> list[PublishedRun]:
    h100 = dataclasses.replace(
        find_accelerator("h100", _PER_NODE),
        name="NVIDIA H100 96GB HBM2e",
        memory=96 * 2**30,
        memory_bandwidth=2.4e12,
        reached_products=0.5,
    )
    small, large = _llama("3 8B", 8192), _llama("3 70B", 8192)
    fsdp = [
        PublishedRun(
            "Llama 3.1 8B",
            "all",
            h100,
            gpus,
            small,
            2,
            measured,
            recompute="selective",
            compiled=compiled,
            chose="that H100's products" if compiled and gpus == 8 else "",
        )
        for gpus, compiled, measured in (
            (8, False, 5762.0),
            (8, True, 6667.0),
            (128, False, 5605.0),
            (128, True, 6514.0),
        )
    ]
    tensor_parallel = [
        PublishedRun(
            name,
            "all",
            h100,
            gpus,
            model,
            micro_batch,
            measured,
            8,
            recompute="selective" if model is small else "full",
            compiled=True,
            overlapped=overlapped,
            chose="hidden tensor-parallel" if overlapped and model is large else "",
        )
        for name, gpus, model, micro_batch, overlapped, measured in (
            ("Llama 3.1 8B", 64, small, 12, False, 4378.0),
            ("Llama 3.1 8B", 64, small, 12, True, 4809.4),
            ("Llama 3.1 70B", 256, large, 16, False, 597.3),
            ("Llama 3.1 70B", 256, large, 16, True, 652.4),
        )
    ]
    return [*fsdp, *tensor_parallel]


def _torchtitan_a100() -> list[PublishedRun]:
    accelerator = find_accelerator("a100", _PER_NODE)
    rows: list[tuple[str, int, int, Literal["none", "selective", "full"], float]] = [
        ("3 8B", 8192, 1, "selective", 2973),
        ("3 70B", 8192, 1, "full", 331),
        ("2 13B", 4096, 2, "none", 2162),
        ("2 13B", 4096, 2, "selective", 1904),
        ("2 70B", 4096, 1, "selective", 355),
        ("2 70B", 4096, 2, "full", 353),
    ]
    return [
        PublishedRun(
            f"Llama {kind}",
            "all",
            accelerator,
            64,
            _llama(kind, context),
            micro_batch,
            measured,
            recompute=recompute,
            chose="A100's products" if recompute == "none" else "",
        )
        for kind, context, micro_batch, recompute, measured in rows
    ]


def _llm_foundry() -> list[PublishedRun]:
    sizes = {  # layers, width, heads
        "3B": (32, 2560, 20),
        "7B": (32, 4096, 32),
        "13B": (40, 5120, 40),
        "30B": (48, 7168, 56),
        "70B": (80, 8192, 64),
    }
    rows: list[tuple[str, str, int, int, int, Literal["none", "full"], float]] = [
        # GPU, size, GPUs, micro-batch, micro-steps, recomputation, measured tokens
        ("h100", "3B", 64, 6, 3, "none", 22525),
        ("h100", "7B", 8, 6, 1, "none", 10643),
        ("h100", "13B", 64, 2, 1, "none", 4800),
        ("h100", "30B", 32, 14, 3, "full", 2308),
        ("h100", "70B", 64, 8, 4, "full", 1039),
        ("a100", "3B", 8, 10, 2, "none", 10811),
        ("a100", "7B", 8, 6, 2, "none", 4641),
        ("a100", "13B", 8, 2, 3, "none", 2262),
        ("a100", "30B", 8, 3, 21, "full", 916),
        ("a100", "70B", 64, 8, 4, "full", 410),
    ]
    return [
        PublishedRun(
            f"MPT {size}",
            "all",
            find_accelerator(gpu, _PER_NODE),
            gpus,
            ModelConfig(
                vocab_size=50368,
                max_seq_len=2048,
                hidden_size=sizes[size][1],
                num_layers=sizes[size][0],
                num_heads=sizes[size][2],
                bias=False,
            ),
            micro_batch,
            measured,
            global_batch=micro_batch * micro_steps * gpus,
            recompute=recompute,
        )
        for gpu, size, gpus, micro_batch, micro_steps, recompute, measured in rows
    ]


def _llama(kind: str, context: int) -> ModelConfig:
    layers, width, heads, kv_heads, ffn, vocabulary = {
        "3 8B": (32, 4096, 32, 8, 14336, 128256),
        "3 70B": (80, 8192, 64, 8, 28672, 128256),
        "2 13B": (40, 5120, 40, 40, 13824, 32000),
        "2 70B": (80, 8192, 64, 8, 28672, 32000),
    }[kind]
    return ModelConfig(
        vocab_size=vocabulary,
        max_seq_len=context,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=ffn,
        positions="rotary",
        norm="rms_norm",
        mlp="swiglu",
        bias=False,
        tied_embeddings=False,
    )


def error_of(run: PublishedRun, simulation: Simulation) -> float:
    """Predicted tokens a second over measured ones, less 1."""
    return simulation.tokens_per_gpu / run.measured - 1


def compare_published(runs: Sequence[PublishedRun]) -> list[tuple[str, ...]]:
    """A table: each run, what was measured, what is predicted, and the error."""
    columns = ("tokens/s a GPU", "predicted", "MFU", "predicted", "error", "chosen by it")
    rows: list[tuple[str, ...]] = [
        ("run", "GPUs", "TP", "recomputed", "compiled", "overlapped TP", *columns)
    ]
    for run in runs:
        simulation = simulate_published(run)
        error, mfu = error_of(run, simulation), simulation.mfu
        assert mfu is not None  # nothing is frozen
        rows.append(
            (
                f"{run.name}, {run.accelerator.name.removeprefix('NVIDIA ')}",
                str(run.gpus),
                str(run.tensor_parallel),
                run.recompute,
                "yes" if run.compiled else "no",
                "yes" if run.overlapped else "no",
                f"{run.measured:,.0f}",
                f"{simulation.tokens_per_gpu:,.0f}",
                f"{mfu / (1 + error):.1%}",
                f"{mfu:.1%}",
                f"{error:+.1%}",
                run.chose,
            )
        )
    return rows
