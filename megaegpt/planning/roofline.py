"""The least time of a training step on a GPU, from what its operators compute and move.

A micro-step is played through with tensors that have no memory. Each operator of it takes as long
as its operations at a reachable share of the GPU's peak, or its bytes at one of the memory's speed,
whichever is longer; the sum is what no implementation with these operators can be faster than. What
is assumed beside the data sheets stands below, and is not measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megaegpt.config import ModelConfig, RunConfig, TrainingConfig
from megaegpt.errors import ConfigError
from megaegpt.planning.memory_trace import trace_micro_step
from megaegpt.planning.muon_share import Matrix
from megaegpt.planning.plan import Plan
from megaegpt.planning.short_runs import short_runs
from megaegpt.precision import DTYPES
from megaegpt.text_tables import percentage

REACHED_FLOPS = 0.65
"""Share of the peak that matrix products reach, at widths of 768 to 1,600."""
REACHED_BANDWIDTH = 0.85
"""Share of the memory's speed that kernels reach which only read and write."""
ATTENTION_FLOPS = 0.22
"""Share of the peak that fused attention reaches, forward and backward, at 64 columns a head and
1,024 tokens, where the half that causality hides is not counted."""
COMPILED_GPT2 = 0.96
"""Share of the bytes of a block's norms and elementwise operators that is left in compiled code, by
inductor's own count of GPT-2's block on a CPU: uncompiled, torch has a kernel for a whole norm and
for GELU, so little is left to fuse but additions."""
COMPILED_LLAMA = 0.24
"""The same of Llama's block, whose rotation and gated MLP are many operators each."""
Blocks = Literal["eager", "compiled", "fused"]
"""How a block's norms and elementwise operators are computed: one by one, as inductor compiles
them, or by the operators of ``parallel.block_operators``, where it has nothing else."""
SHORTEST = 2e-6
"""Seconds of the smallest kernel."""

_NOTHING_COMPUTED = {
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "_unsafe_view",
}
_TOUCHES_FEW = {"embedding", "gather", "index", "scatter_add_"}
"""Operators that read or write a few rows or places of a tensor."""

BYTES_OF_ADAMW = 36
"""Of a parameter in a rank's share of the optimizer: weight and both moments read and written in
fp32 (24), gradient read for the norm and the update (8), and the weight rounded (4)."""

BYTES_OF_MUON = 52
"""Of a parameter in a rank's share, beside the iterations: weight decayed and stepped by an update
(20), moment read and written and read for the direction (12), gradient read for the norm, the
moment and the direction (12), direction written (4), and the weight rounded (4)."""

_BYTES_AN_ELEMENT = 26
"""Of a matrix that is iterated on, beside products: made bf16 (6), its norm (2), division by it
(4), made fp32 again (6), and scaled (8)."""


@dataclass
class Cost:
    """Operators of one kind, together."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    """At the reachable rates of a GPU."""

    def plus(self, other: Cost, times: int) -> Cost:
        """With other operators, so many times."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + times * b for a, b in pairs))

    def minus(self, other: Cost) -> Cost:
        """What is left without other operators."""
        return self.plus(other, -1)


@dataclass(frozen=True)
class Rates:
    """Reachable rates of a GPU, per second."""

    flops: float
    """Of products whose sums are long."""
    attention_flops: float
    bytes: float
    half_depth: int = 0
    """Terms of a product's sums with which it reaches half of ``flops``: a tile's pipeline fills
    and drains once, however long its sums are."""
    head_columns: int | None = None
    """Columns of a head at which attention reaches ``attention_flops``; at fewer, by proportion, as
    its exponentials are then more. None: at any."""

    @staticmethod
    def of(peak: float, bandwidth: float) -> Rates:
        """From the data sheet's peak and the speed of its memory."""
        return Rates(peak * REACHED_FLOPS, peak * ATTENTION_FLOPS, bandwidth * REACHED_BANDWIDTH)

    def product(self, depth: float) -> float:
        """Operations per second of a product whose sums have ``depth`` terms."""
        return self.flops * depth / (depth + self.half_depth)

    def attention(self, columns: int) -> float:
        """Operations per second of fused attention at ``columns`` a head."""
        full = self.head_columns or columns
        return self.attention_flops * min(1.0, columns / full)


class OperatorCosts(TorchDispatchMode):
    """Adds up operators while it is active, by kind: ``products``, ``own products`` (those of
    ``parallel.block_operators``), ``attention``, ``head`` (between its products) and ``rest``.

    Args:
        vocabulary: columns of the logits, by which the head's operators are known.
        rates: of the GPU.
    """

    def __init__(self, vocabulary: int, rates: Rates) -> None:
        super().__init__()
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.names: Counter[str] = Counter()
        self._vocabulary = vocabulary
        self._rates = rates

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _NOTHING_COMPUTED or func.namespace in ("prim", "c10d")):
            self.names[name] += 1
            self._count(func, name, args, kwargs or {}, result)
        return result

    def _count(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        tensors += _overwritten(func, args)
        size = _bytes(name, tensors)
        rates = self._rates
        if "scaled_dot_product" in name:
            kind, flops = "attention", _attention_flops(name, args)
            rate = rates.attention(args[0].shape[-1])
        else:
            formula = _formula(func)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            of_products = "own products" if func.namespace == "megaegpt" else "products"
            kind = of_products if flops else self._kind(name, tensors)
            rate = rates.product(_depth(flops, args, result)) if flops else rates.flops
        cost = self.costs[kind]
        cost.kernels += 1
        cost.flops += flops
        cost.bytes += size
        cost.seconds += max(flops / rate, size / rates.bytes, SHORTEST)

    def _kind(self, name: str, tensors: list[Tensor]) -> str:
        """Whether an operator without products is the head's."""
        of_head = "embedding" not in name and any(self._vocabulary in x.shape for x in tensors)
        return "head" if of_head else "rest"


def _formula(func: Any) -> Any:
    """Of an operator's operations, which torch has not for its form in place; None: it has none."""
    packet = func.overloadpacket
    if func.namespace == "aten" and packet.__name__ == "addmm_":
        packet = torch.ops.aten.addmm
    return flop_registry.get(packet)


def _depth(flops: float, args: tuple[Any, ...], result: Any) -> float:
    """Terms of the sums of a product; one in place returns nothing, and its result is an argument.

    Args:
        flops: of the product: two for each term of each sum.
    """
    results = [x for x in tree_leaves(result) if isinstance(x, Tensor)] or [args[0]]
    return flops / (2 * results[0].numel())


def _overwritten(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Arguments that an operator changes, of which it returns nothing."""
    if func._schema.returns:
        return []
    changed = (a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info)
    return [x for x in changed if isinstance(x, Tensor)]


def _bytes(name: str, tensors: list[Tensor]) -> float:
    """What an operator reads and writes, each of its tensors once."""
    if name in _TOUCHES_FEW:
        indices = [x for x in tensors if x.dtype == torch.int64]
        others = [x for x in tensors if x.dtype != torch.int64] or tensors
        tensors = [*indices, *[min(others, key=lambda x: x.numel())] * 2]
    return sum(x.numel() * x.element_size() for x in tensors)


def _attention_flops(name: str, args: tuple[Any, ...]) -> float:
    """Of fused attention: two products forward, five backward; half of them where it is causal."""
    first = 1 if "backward" in name else 0
    q, k = args[first : first + 2]
    products = 5 if "backward" in name else 2
    causal = any(x is True for x in args)
    return 2 * products * math.prod(q.shape) * k.shape[2] * (0.5 if causal else 1.0)


@dataclass(frozen=True)
class FusedBlocks:
    """What the operators of ``parallel.block_operators`` leave of blocks."""

    products: Cost
    """cuBLAS's, the head's among them."""
    own_products: Cost
    """Those with GELU in their kernel."""
    rest: Cost
    """As of a roofline."""


@dataclass(frozen=True)
class Roofline:
    """A step of one rank."""

    plan: Plan
    micro_steps: int
    products: Cost
    attention: Cost
    head: Cost
    """Between its products, by the operators of ``parallel.head_operators``."""
    head_unfused: Cost
    """The same operator by operator."""
    rest: Cost
    """Norms, elementwise operators, copies and look-ups of the blocks, operator by operator."""
    fused: FusedBlocks | None
    """The same with the operators of ``parallel.block_operators``; None: the blocks cannot."""
    outside: Cost
    """The same outside of the blocks, where nothing is compiled."""
    optimizer: float | None
    """Seconds of the update, and of the gradients' way to it; None where a CPU computes it."""

    @property
    def tokens(self) -> int:
        """Of a rank in a micro-step."""
        config = self.plan.config
        whole = config.training.chosen_micro_batch_size * config.model.sample_len
        return whole // config.parallel.context_parallel_size

    @property
    def communication(self) -> float | None:
        """Seconds of a step at the data sheets' speed, none of it hidden; None where the plan has
        no time.
        """
        time = self.plan.time
        return None if time is None else time.total - time.compute

    @property
    def compiled(self) -> float:
        """Share of the bytes of ``rest`` that is left in compiled blocks."""
        return compiled_share(self.plan.config.model)

    def seconds(self, blocks: Blocks = "fused", *, fused_head: bool = True) -> float:
        """Of a micro-step, forward and backward.

        Args:
            blocks: how they are computed.
            fused_head: the head's operators are those that CUDA has compiled.
        """
        head = self.head if fused_head else self.head_unfused
        total = self.attention.seconds + head.seconds + self.outside.seconds
        if blocks == "fused" and self.fused is not None:
            fused = self.fused
            parts = (fused.products, fused.own_products, fused.rest)
            return total + sum(cost.seconds for cost in parts)
        share = 1.0 if blocks == "eager" else self.compiled
        return total + self.products.seconds + self.rest.seconds * share

    @property
    def slowness(self) -> float | None:
        """How much longer than cuBLAS's the blocks' own products may take, as a share, until what
        they and the other operators save is lost again; None: there are none.
        """
        if self.fused is None:
            return None
        saved = self.seconds("compiled") - self.seconds("fused")
        return saved / self.fused.own_products.seconds

    def mfu(self, blocks: Blocks = "fused", *, fused_head: bool = True) -> float | None:
        """The most that a micro-step can reach; None where parts are frozen, as operations are
        counted as if everything were trained. Arguments as for :meth:`seconds`.
        """
        if self.plan.size.frozen:
            return None
        tp = self.plan.config.parallel.tensor_parallel_size
        work = self.tokens * self.plan.size.flops_per_token / tp
        return work / peak_of(self.plan) / self.seconds(blocks, fused_head=fused_head)

    def bytes_a_logit(self, *, fused: bool = True) -> float:
        """What the head moves between its products."""
        columns = self.plan.config.model.padded_vocab_size
        columns //= self.plan.config.parallel.tensor_parallel_size
        return (self.head if fused else self.head_unfused).bytes / (self.tokens * columns)


def compiled_share(model: ModelConfig) -> float:
    """Share of the bytes of a block's norms and elementwise operators that compiled code moves."""
    is_gpt2s = model.norm == "layer_norm" and not model.has_gated_mlp
    return COMPILED_GPT2 if is_gpt2s and model.positions != "rotary" else COMPILED_LLAMA


def peak_of(plan: Plan) -> float:
    """Operations per second.

    Raises:
        ConfigError: the data sheet's peak, or the memory's speed, is not in the table.
    """
    peak = plan.machines.accelerator.peak_flops(plan.precision)
    if peak is None or plan.machines.accelerator.memory_bandwidth is None:
        name = plan.machines.accelerator.name
        raise ConfigError(
            f"--roofline needs a GPU and a precision of the table, not {name} in {plan.precision}"
        )
    return peak


def make_roofline(plan: Plan, encoder: ModelConfig | None = None) -> Roofline:
    """Count the operators of a plan's micro-step.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.

    Raises:
        ConfigError: a GPU whose peak is not known.
    """
    bandwidth = plan.machines.accelerator.memory_bandwidth
    rates = Rates.of(peak_of(plan), bandwidth or math.inf)
    costs = _trace(plan, plan.config, encoder, rates, fused_blocks=False)
    runs = short_runs(plan.config)
    unfused = _trace(plan, runs[-1].config, encoder, rates, fused_head=False, fused_blocks=False)
    outside = Cost()
    for run in runs:
        known = costs if run.config == plan.config else None
        traced = known or _trace(plan, run.config, encoder, rates, fused_blocks=False)
        outside = outside.plus(traced["rest"], run.outside)
    fused = _trace(plan, plan.config, encoder, rates)
    return Roofline(
        plan,
        plan.config.gradient_accumulation(plan.dp_size),
        costs["products"],
        costs["attention"],
        costs["head"],
        unfused["head"],
        costs["rest"].minus(outside),
        FusedBlocks(fused["products"], fused["own products"], fused["rest"].minus(outside))
        if "own products" in fused
        else None,
        outside,
        update_seconds(plan, rates) if plan.config.parallel.offload == "none" else None,
    )


def _trace(
    plan: Plan,
    config: RunConfig,
    encoder: ModelConfig | None,
    rates: Rates,
    fused_head: bool | None = None,
    fused_blocks: bool | None = None,
) -> defaultdict[str, Cost]:
    model = config.model
    columns = model.padded_vocab_size // config.parallel.tensor_parallel_size
    counter = OperatorCosts(columns, rates)
    trace_micro_step(
        config,
        plan.precision,
        encoder,
        "cuda",
        False,
        observed_by=counter,
        fused_head=fused_head,
        fused_blocks=fused_blocks,
    )
    return counter.costs


def update_seconds(plan: Plan, rates: Rates) -> float:
    """Of a step's update on a rank, and of the gradients' way to it."""
    matrices = plan.muon.matrices if plan.muon else ()
    iterations = sum(iteration_cost(matrix, rates).seconds for matrix in matrices)
    moved = sum(_BYTES_AN_ELEMENT * matrix.whole for matrix in matrices)
    return (update_bytes(plan) + moved) / rates.bytes + iterations


def iteration_cost(matrix: Matrix, rates: Rates) -> Cost:
    """Of the products of Muon's five iterations in bf16, as GPUs have it."""
    r, c = sorted((matrix.rows, matrix.columns))
    products = (  # operations, terms of a sum, elements read and written
        (2 * r * r * c, c, 2 * r * c + r * r),
        (2 * r**3, r, 4 * r * r),
        (2 * r * r * c, r, 3 * r * c + r * r),
    )
    cost = Cost()
    for flops, depth, elements in 5 * products:
        size = torch.bfloat16.itemsize * elements
        cost.kernels += 1
        cost.flops += flops
        cost.bytes += size
        cost.seconds += max(flops / rates.product(depth), size / rates.bytes, SHORTEST)
    return cost


def update_bytes(plan: Plan) -> float:
    """A rank's, in a step: AdamW or Muon over its share, beside Muon's iterations, and gradients
    copied and added up on the way.
    """
    tp = plan.config.parallel.tensor_parallel_size
    parameters = plan.size.parameters / tp
    item = DTYPES[plan.precision].itemsize
    copied = 2 * item + (item + 8) / plan.replicas  # to the bucket, and from there to the fp32 sum
    micro_steps = plan.config.gradient_accumulation(plan.dp_size)
    muons = plan.muon.parameters if plan.muon else 0
    updated = (parameters - muons) * BYTES_OF_ADAMW + muons * BYTES_OF_MUON
    return updated / plan.replicas + parameters * copied * micro_steps


def describe_roofline(roofline: Roofline) -> list[tuple[str, ...]]:
    """A table: parts of a step, their milliseconds, kernels and bytes."""
    steps = roofline.micro_steps
    rows: list[tuple[str, ...]] = [("part of a step", "ms", "kernels", "GB moved")]
    parts: dict[str, Cost] = {
        "products with weights": roofline.products,
        "attention": roofline.attention,
        "head between its products": roofline.head,
        "the same, operator by operator": roofline.head_unfused,
        "blocks' norms and elementwise, operator by operator": roofline.rest,
        "the same outside of blocks": roofline.outside,
    }
    for name, cost in parts.items():
        moved = f"{cost.bytes * steps / 1e9:.1f}"
        rows.append((name, _ms(cost.seconds * steps), str(cost.kernels * steps), moved))
    compiled = roofline.rest.seconds * steps * roofline.compiled
    rows.append(("blocks' norms and elementwise, compiled", _ms(compiled), "", ""))
    if (fused := roofline.fused) is not None:
        moved, kernels = f"{fused.rest.bytes * steps / 1e9:.1f}", str(fused.rest.kernels * steps)
        name = "blocks' norms and elementwise, their own operators"
        rows.append((name, _ms(fused.rest.seconds * steps), kernels, moved))
    name = "Muon" if roofline.plan.muon else "AdamW"
    rows.append((f"optimizer, {name}", _ms(roofline.optimizer), "", ""))
    rows.append(("communication, if nothing hides it", _ms(roofline.communication), "", ""))
    return rows


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1e3 * seconds:.1f}"


GPT2 = {
    "GPT-2 124M": (12, 12, 768, 64),
    "GPT-2 355M": (24, 16, 1024, 32),
    "GPT-2 774M": (36, 20, 1280, 16),
    "GPT-2 1558M": (48, 25, 1600, 8),
}
"""Layers, heads, width, and the micro-batch at 1,024 tokens that fits on 80 GB."""


def gpt2_runs() -> dict[str, RunConfig]:
    """The sizes of GPT-2, each as a run on one GPU."""
    runs = {}
    for name, (layers, heads, width, batch) in GPT2.items():
        model = ModelConfig(num_layers=layers, num_heads=heads, hidden_size=width)
        training = TrainingConfig(micro_batch_size=batch, global_batch_size=batch)
        runs[name] = RunConfig(model=model, training=training)
    return runs


def compare_rooflines(rooflines: Mapping[str, Roofline]) -> list[tuple[str, ...]]:
    """A table: the most that each run can reach as the pieces are compiled, and where time goes."""
    columns = ("nothing compiled", "head", "blocks and head", "blocks' own operators and head")
    rows: list[tuple[str, ...]] = [("", "tokens", *columns, *_BOUND_BY)]
    for name, roofline in rooflines.items():
        ceilings = [
            roofline.mfu("eager", fused_head=False),
            roofline.mfu("eager"),
            roofline.mfu("compiled"),
            roofline.mfu(),
        ]
        products = [roofline.products]
        if roofline.fused is not None:
            products = [roofline.fused.products, roofline.fused.own_products]
        parts = [sum(cost.seconds for cost in products), roofline.attention.seconds]
        parts.append(roofline.head.seconds)
        parts.append(roofline.seconds() - sum(parts))
        shares = [f"{1e3 * x:.0f} ms" for x in parts]
        rows.append((name, f"{roofline.tokens:,}", *map(percentage, ceilings), *shares))
    return rows


_BOUND_BY = ("products", "attention", "head", "rest")


def assumptions() -> str:
    """What a roofline rests on beside data sheets, as a sentence."""
    return (
        f"assumed, not measured: products reach {REACHED_FLOPS:.0%} of the peak, attention "
        f"{ATTENTION_FLOPS:.0%}, memory {REACHED_BANDWIDTH:.0%} of its speed; no kernel is shorter "
        f"than {1e6 * SHORTEST:.0f} us; the host is never waited for. Compiled blocks move "
        f"{COMPILED_GPT2:.0%} of the bytes of their norms and elementwise operators, Llama's "
        f"{COMPILED_LLAMA:.0%}, by inductor's count. Products with GELU in their own kernel reach "
        "what cuBLAS's do"
    )
