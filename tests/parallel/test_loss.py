"""The chunked loss against torch's cross-entropy on the full logits."""

import pytest
import torch
import torch.nn.functional as F

from megaegpt.errors import DataError
from megaegpt.labels import IGNORE
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.loss import LossOptions, linear_cross_entropy, power_of_two

VOCAB, PADDED, HIDDEN, ROWS = 300, 384, 16, 37


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


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_sum_and_gradients_equal_torchs_on_full_logits(rows):
    hidden, weight, targets = _problem()
    loss = linear_cross_entropy(
        hidden, weight, targets, ProcessGrid(), VOCAB, options=LossOptions(rows)
    )
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
def test_soft_caps_and_z_loss_are_their_definitions(options, mixed):
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
        options=LossOptions(8, **options),
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


def test_padding_rows_of_the_head_get_no_gradient():
    hidden, weight, targets = _problem()
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad[VOCAB:].abs().max() == 0


def test_each_positions_nats_are_zero_where_nothing_is_predicted():
    hidden, weight, targets = _problem()
    nats = linear_cross_entropy(
        hidden, weight, targets, ProcessGrid(), VOCAB, "none", LossOptions(8)
    )
    torch.testing.assert_close(nats, _reference(hidden, weight, targets, "none").detach())
    assert not nats.requires_grad
    assert (nats[::5] == 0).all()


def test_a_batch_without_a_valid_target_costs_nothing_and_is_not_nan():
    hidden, weight, targets = _problem()
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, IGNORE), ProcessGrid(), VOCAB
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0
    assert (grad == 0).all()


def test_bf16_inputs_are_summed_in_fp32():
    hidden, weight, targets = (
        t.detach().to(torch.bfloat16) if t.is_floating_point() else t for t in _problem()
    )
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB)
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


@pytest.mark.parametrize("rows", [8, 64])
def test_a_mixture_is_that_of_the_probabilities(rows):
    hidden, weight, targets = _problem()
    log_keep, added = _mixture()
    inputs = (hidden, weight, log_keep, added)
    arguments = (hidden, weight, targets, ProcessGrid(), VOCAB)
    loss = linear_cross_entropy(*arguments, options=LossOptions(rows), mixed_with=(log_keep, added))
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
    each = linear_cross_entropy(*arguments, "none", LossOptions(8), mixed_with=(log_keep, added))
    torch.testing.assert_close(each[real], nats.detach())
    assert (each[~real] == 0).all()


def test_a_target_that_the_head_rules_out_is_finite_where_something_is_added():
    hidden, weight, targets = _problem()
    log_keep, added = _mixture()
    with torch.no_grad():
        hidden *= 1e4
    mixed = (log_keep, added)
    loss = linear_cross_entropy(hidden, weight, targets, ProcessGrid(), VOCAB, mixed_with=mixed)
    grads = torch.autograd.grad(loss, (hidden, weight, log_keep, added))
    assert all(torch.isfinite(x).all() for x in (loss, *grads))


def _narrow(dtype):
    return (t.detach().to(dtype) if t.is_floating_point() else t for t in _problem())


def _gradients(hidden, weight, targets, factor, known=None):
    """Of the loss times ``factor``, which the forward pass is told as ``known``."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    scale = None if known is None else power_of_two(torch.tensor(known))
    loss = linear_cross_entropy(
        *leaves, targets, ProcessGrid(), VOCAB, options=LossOptions(backward_scale=scale)
    )
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


def test_small_fp16_gradients_survive_under_an_expected_loss_scale():
    """All tokens are predicted but for 1e-8: less than the smallest number of fp16."""
    hidden = torch.eye(HIDDEN, dtype=torch.float16) * 4
    weight = torch.zeros(PADDED, HIDDEN, dtype=torch.float16)
    weight[:HIDDEN] = torch.eye(HIDDEN) * 6  # 24 above the others: each has e^-24 = 4e-11
    targets, factor = torch.arange(HIDDEN), 2.0**16
    wide = _gradients(hidden.float(), weight.float(), targets, factor)
    for grad, expected in zip(
        _gradients(hidden, weight, targets, factor, factor), wide, strict=True
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
