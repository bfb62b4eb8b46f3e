"""The chunked loss against torch's cross-entropy on the full logits."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import metrics

from megaegpt.config import ModelConfig
from megaegpt.errors import DataError
from megaegpt.labels import IGNORE
from megaegpt.model.head import OutputHead
from megaegpt.parallel import loss as loss_module
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.head_operators import compute_gradient, compute_softmax_sums
from megaegpt.parallel.loss import LossOptions, fused_rows, linear_cross_entropy, power_of_two
from megaegpt.parallel.params import ParamSpec, unshard
from megaegpt.planning.rank_check import CollectiveRecorder
from tests.distributed.harness import grid_for

VOCAB, PADDED, HIDDEN, ROWS = 300, 384, 16, 37

both = pytest.mark.parametrize("fused", [False, True])
"""Operator by operator, and by the two operators that are compiled on CUDA."""


def _problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[::5] = IGNORE
    return hidden, weight, targets


def _reference(hidden, weight, targets, reduction="sum"):
    logits = hidden @ weight[:VOCAB].t()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


@both
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_sum_and_gradients_equal_torchs_on_full_logits(rows, fused):
    hidden, weight, targets = _problem()
    options = LossOptions(rows, fused)
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, options=options)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    expected = _reference(hidden, weight, targets)
    expected_grads = torch.autograd.grad(3.0 * expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"softcap": 1.5}, {"z_loss": 0.3}, {"softcap": 2.0, "z_loss": 1.0}]
)
@pytest.mark.parametrize("mixed", [False, True])
@both
def test_soft_caps_and_z_loss_are_their_definitions(options, mixed, fused):
    """The z-loss is in the gradients and not in the number."""
    hidden, weight, targets = _problem()
    generator = torch.Generator().manual_seed(1)
    log_keep, added = torch.rand(2, ROWS, generator=generator, dtype=torch.float64) * 0.2
    log_keep = -log_keep
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        ProcessGrid(),
        VOCAB,
        options=LossOptions(8, fused, **options),
        mixed_with=(log_keep, added) if mixed else None,
    )
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))

    logits = hidden @ weight[:VOCAB].t()
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    real = targets != IGNORE
    if mixed:
        nats = -(log_keep.exp() * (-nats).exp() + added).log() * real
    z_loss = options.get("z_loss", 0.0) * (logits.logsumexp(-1).square() * real).sum()
    torch.testing.assert_close(loss, nats.sum(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(3.0 * (nats.sum() + z_loss), (hidden, weight))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@both
def test_padding_rows_of_the_head_get_no_gradient(fused):
    hidden, weight, targets = _problem()
    options = LossOptions(fused=fused)
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, options=options)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad[VOCAB:].abs().max() == 0


@both
def test_each_positions_nats_are_zero_where_nothing_is_predicted(fused):
    hidden, weight, targets = _problem()
    options = LossOptions(8, fused)
    nats = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, "none", options)
    torch.testing.assert_close(nats, _reference(hidden, weight, targets, "none").detach())
    assert not nats.requires_grad
    assert (nats[::5] == 0).all()


@both
def test_a_batch_without_a_valid_target_costs_nothing_and_is_not_nan(fused):
    hidden, weight, targets = _problem()
    targets, options = torch.full_like(targets, IGNORE), LossOptions(fused=fused)
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, options=options)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0
    assert (grad == 0).all()


@both
def test_bf16_inputs_are_summed_in_fp32(fused):
    hidden, weight, targets = (
        t.detach().to(torch.bfloat16) if t.is_floating_point() else t for t in _problem()
    )
    options = LossOptions(fused=fused)
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, options=options)
    logits = (hidden @ weight[:VOCAB].t()).float()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def _mixture():
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    added = (1 - keep) * torch.rand(ROWS, generator=generator, dtype=torch.float64)
    added[1::4] = 0.0
    return keep.log().requires_grad_(), added.requires_grad_()


@both
@pytest.mark.parametrize("rows", [8, 64])
def test_a_mixture_is_that_of_the_probabilities(rows, fused):
    hidden, weight, targets = _problem()
    log_keep, added = _mixture()
    inputs = (hidden, weight, log_keep, added)
    arguments = (hidden, weight, targets, ProcessGrid(), VOCAB)
    options, mixed = LossOptions(rows, fused), (log_keep, added)
    loss = linear_cross_entropy(*arguments, options=options, mixed_with=mixed)
    grads = torch.autograd.grad(3.0 * loss, inputs)
    probabilities = (hidden @ weight[:VOCAB].t()).softmax(-1)
    real = targets != IGNORE
    at_target = probabilities[real, targets[real]]
    nats = -(log_keep.exp()[real] * at_target + added[real]).log()
    expected_grads = torch.autograd.grad(3.0 * nats.sum(), inputs)
    torch.testing.assert_close(loss, nats.sum(), rtol=1e-12, atol=0)
    for grad, expected_grad in zip(grads[:3], expected_grads[:3], strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    added_to = (added > 0) & real  # elsewhere the factor is left out, as it may overflow
    torch.testing.assert_close(grads[3][added_to], expected_grads[3][added_to])
    assert (grads[3][~added_to] == 0).all()
    each = linear_cross_entropy(*arguments, "none", LossOptions(8, fused), mixed_with=mixed)
    torch.testing.assert_close(each[real], nats.detach())
    assert (each[~real] == 0).all()


@both
def test_a_target_that_the_head_rules_out_is_finite_where_something_is_added(fused):
    hidden, weight, targets = _problem()
    log_keep, added = _mixture()
    with torch.no_grad():
        hidden *= 1e4
    arguments = (hidden, weight, targets, ProcessGrid(), VOCAB)
    options, mixed = LossOptions(fused=fused), (log_keep, added)
    loss = linear_cross_entropy(*arguments, options=options, mixed_with=mixed)
    grads = torch.autograd.grad(loss, (hidden, weight, log_keep, added))
    assert all(torch.isfinite(x).all() for x in (loss, *grads))


def _narrow(dtype):
    return (t.detach().to(dtype) if t.is_floating_point() else t for t in _problem())


def _gradients(hidden, weight, targets, factor, known=None, fused=False):
    """Of the loss times ``factor``, which the forward pass is told as ``known``."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    scale = None if known is None else power_of_two(torch.tensor(known))
    options = LossOptions(fused=fused, backward_scale=scale)
    loss = linear_cross_entropy(*leaves, targets, ProcessGrid(), VOCAB, options=options)
    return torch.autograd.grad(loss * factor, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 1000, 261_987])
def test_narrow_gradients_are_scaled_in_fp32(dtype, tokens):
    """1/1000 as a bf16 number is too small by 8.8e-4, and so would be all gradients."""
    problem = list(_narrow(dtype))
    factor = torch.tensor(1.0 / tokens)
    for grad, whole in zip(
        _gradients(*problem, factor), _gradients(*problem, torch.tensor(1.0)), strict=True
    ):
        assert grad.dtype == dtype
        assert torch.equal(grad, (whole.float() * factor).to(dtype))


def test_an_expected_scale_rounds_nothing():
    problem = list(_narrow(torch.bfloat16))
    for known in (2.0, 0.37, 655.36):
        for factor in (1.0, 0.37):
            told, untold = (_gradients(*problem, factor, k) for k in (known, None))
            assert all(map(torch.equal, told, untold)), (known, factor)


@both
def test_small_fp16_gradients_survive_under_an_expected_loss_scale(fused):
    """All tokens are predicted but for 1e-8: less than the smallest number of fp16."""
    hidden = torch.eye(HIDDEN, dtype=torch.float16) * 4
    weight = torch.zeros(PADDED, HIDDEN, dtype=torch.float16)
    weight[:HIDDEN] = torch.eye(HIDDEN) * 6  # 24 above the others: each has e^-24 = 4e-11
    targets, factor = torch.arange(HIDDEN), 2.0**16
    wide = _gradients(hidden.float(), weight.float(), targets, factor)
    for grad, expected in zip(
        _gradients(hidden, weight, targets, factor, factor, fused), wide, strict=True
    ):
        error = (grad[:HIDDEN].float() - expected[:HIDDEN]).norm() / expected[:HIDDEN].norm()
        assert error < 0.01
    assert all((grad == 0).all() for grad in _gradients(hidden, weight, targets, factor))


def test_an_expected_scale_changes_no_gradient_in_fp32():
    hidden, weight, targets = _narrow(torch.float32)
    told, untold = (_gradients(hidden, weight, targets, 0.37, known) for known in (0.37, None))
    assert all(map(torch.equal, told, untold))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("wrong", [-1, -101, VOCAB, PADDED - 1, 60_000])
def test_a_target_that_is_no_token_is_refused(wrong, reduction):
    hidden, weight, targets = _problem()
    targets[7] = wrong
    with pytest.raises(DataError, match=rf"target {wrong} is neither one of the model's {VOCAB}"):
        linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, reduction)


@pytest.mark.parametrize("shape", [(1,), (ROWS, 1), (ROWS - 1,)])
def test_targets_of_another_shape_are_refused(shape):
    hidden, weight, _ = _problem()
    targets = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(DataError, match=rf"targets of shape \({shape[0]}.*of shape \({ROWS},\)"):
        linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB)


def _on_a_rank(fused, softcap, vocab):
    """Loss, and gradients by the hidden states and by the whole weight."""
    grid = grid_for(2)
    hidden, weight, targets = _problem()
    targets = targets.masked_fill(targets >= vocab, IGNORE)
    own = weight.detach().chunk(2)[grid.tp_rank].clone().requires_grad_()
    mixed = _mixture()
    options = LossOptions(8, fused, softcap=softcap, z_loss=0.1)
    loss = linear_cross_entropy(
        hidden, own, targets, grid, vocab, options=options, mixed_with=mixed
    )
    by_hidden, by_own, *by_mixture = torch.autograd.grad(loss, (hidden, own, *mixed))
    spec = ParamSpec((PADDED, HIDDEN), tp_dim=0)
    return [loss.detach(), by_hidden, unshard(by_own, spec, grid), *by_mixture]


@both
@pytest.mark.parametrize(("softcap", "vocab"), [(None, VOCAB), (2.0, 180)])
def test_ranks_that_share_the_vocabulary_compute_what_one_does(distributed, fused, softcap, vocab):
    """Of 192 columns a rank, the last one's are partly padding, or nothing else."""
    hidden, weight, targets = _problem()
    targets = targets.masked_fill(targets >= vocab, IGNORE)
    mixed = _mixture()
    options = LossOptions(softcap=softcap, z_loss=0.1)
    arguments = (hidden, weight, targets, ProcessGrid(), vocab)
    loss = linear_cross_entropy(*arguments, options=options, mixed_with=mixed)
    expected = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, *mixed))]
    for found in distributed(2, _on_a_rank, fused, softcap, vocab):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _with_abilities(of_ranks):
    """Loss and gradient by the hidden states of a head whose ranks could compute it so, and how
    many messages its first two losses take.
    """
    grid = grid_for(2)
    head = OutputHead(ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN), grid).double()
    hidden, weight, targets = _problem()
    head.weight.data = weight.detach().chunk(2)[grid.tp_rank].clone()
    with mock.patch.object(loss_module, "own_abilities", return_value=of_ranks[grid.tp_rank]):
        messages = []
        for _ in range(2):
            with CollectiveRecorder() as recorder:
                loss = head.loss(hidden, targets)
            messages.append(len(recorder.calls))
    (by_hidden,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), by_hidden, head.loss_options.fused, messages


_ENOUGH_FOR_8 = 8 * 16 * PADDED // 2 * 8  # bytes of memory of which rows in fp64 may take a 16th


@pytest.mark.parametrize(
    ("of_ranks", "fused", "portions"),
    [
        ([(True, _ENOUGH_FOR_8), (False, _ENOUGH_FOR_8)], False, 1),
        ([(True, 4 * _ENOUGH_FOR_8), (True, _ENOUGH_FOR_8)], True, 5),
        ([(False, 0), (False, 0)], False, 1),
    ],
)
def test_ranks_agree_on_how_their_head_is_computed(distributed, of_ranks, fused, portions):
    """One cannot compile, or has less memory: by itself it would send other messages."""
    hidden, weight, targets = _problem()
    expected = _reference(hidden, weight, targets)
    (by_hidden,) = torch.autograd.grad(expected, hidden)
    for found in distributed(2, _with_abilities, of_ranks):
        torch.testing.assert_close(found[0], expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], by_hidden, rtol=1e-10, atol=1e-12)
        assert found[2] is fused
        assert found[3] == [2 * portions + 2, 2 * portions + 1]  # and the sum by hidden states


@pytest.mark.parametrize(
    ("columns", "memory", "rows"),
    [
        (50304, 80 << 30, 32768),  # 32 x 1,024 tokens of GPT-2's vocabulary, 3.1 GiB
        (50304 // 8, 80 << 30, 262144),
        (151936, 80 << 30, 8192),
        (50304, 24 << 30, 8192),  # a smaller GPU, of which they take a sixteenth at most
        (50304, 1 << 20, 1),
    ],
)
def test_a_gpu_computes_as_many_rows_of_logits_at_once_as_fit(columns, memory, rows):
    assert fused_rows(columns, torch.bfloat16, memory) == rows


@pytest.mark.long
@pytest.mark.parametrize(("softcap", "most"), [(None, 6.1), (30.0, 10.1)])
def test_the_compiler_reads_logits_once_for_each_of_the_two_operators(softcap, most):
    """Bytes a bf16 logit that go between inductor's kernels and memory, by its own count."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    rows, columns, real = 64, 4096, 4000
    logits = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    column = torch.randint(-1, real, (rows, 1), generator=generator)
    by_nats = torch.rand(rows, 1, generator=generator)
    torch._logging.set_logs(inductor_metrics=True)  # or it does not count
    try:
        metrics.reset()
        sums = torch.compile(compute_softmax_sums)(logits, column, real, softcap)
        plain = compute_softmax_sums(logits, column, real, softcap)
        torch.testing.assert_close(sums, plain)
        gradient, expected = logits.clone(), logits.clone()
        more = (column, *plain[:2], by_nats, by_nats, real, softcap)
        torch.compile(compute_gradient)(gradient, *more)
        compute_gradient(expected, *more)
        torch.testing.assert_close(gradient, expected)
        assert 6 <= metrics.num_bytes_accessed / logits.numel() <= most
    finally:
        torch._logging.set_logs()
        torch.compiler.reset()
