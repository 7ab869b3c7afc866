"""The loss without full logits is the loss with them, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trimtab_runtime.xeon.loss import linear_cross_entropy, linear_distillation


@pytest.mark.parametrize("tokens", [1, 511, 513, 1100])
def test_cross_entropy_and_gradient(tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    head, targets = torch.randn(77, 32), torch.randint(0, 77, (tokens,))
    loss = linear_cross_entropy(hidden, head, targets, scale=0.25)
    expected = functional.cross_entropy(hidden @ head.t(), targets, reduction="sum") * 0.25
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(loss * 3, hidden)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected * 3, hidden)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 512, 1100])
def test_a_head_that_is_trained_gets_its_gradient(tokens: int) -> None:
    """Beside that of the states, of both losses together, as the full logits give it; tied or not is autograd's to add up."""
    torch.manual_seed(0)
    hidden, head = (torch.randn(tokens, 32) * 0.3).requires_grad_(), torch.randn(77, 32, requires_grad=True)
    targets, teacher = torch.randint(0, 77, (tokens,)), torch.softmax(torch.randn(tokens, 77), -1)
    chances, ids = teacher.topk(8)
    ours = linear_cross_entropy(hidden, head, targets, scale=0.25) + linear_distillation(hidden, head, ids, chances, scale=0.5)

    student = torch.softmax(hidden @ head.t(), -1)
    known = student.gather(1, ids)
    p, q = (torch.cat([some, 1 - some.sum(-1, keepdim=True)], -1) for some in (known, chances))
    whole = functional.cross_entropy(hidden @ head.t(), targets, reduction="sum") * 0.25 + (q * (q.log() - p.log())).sum() * 0.5
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-3)
    for found, expected in zip(torch.autograd.grad(ours * 3, (hidden, head)), torch.autograd.grad(whole * 3, (hidden, head)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), head, targets, scale=1.0), head)
    assert alone.abs().sum() > 0, "a head may be trained above states that are not"


def test_in_bf16_the_heads_gradient_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(4000, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (4000,))
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, scale=1.0), head)
    exact = head.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(functional.cross_entropy(hidden.float() @ exact.t(), targets, reduction="sum"), exact)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_no_label_at_all_is_no_loss() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    head = torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64), scale=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert not head.grad.any()


@pytest.mark.parametrize("tokens", [3, 600])
def test_divergence_and_gradient_with_the_rest_as_one_event(tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    head = torch.randn(50, 16)
    teacher = torch.softmax(torch.randn(tokens, 50), -1)
    chances, ids = teacher.topk(8)
    loss = linear_distillation(hidden, head, ids, chances, scale=0.5)

    student = torch.softmax(hidden @ head.t(), -1)
    known = student.gather(1, ids)
    p = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)
    q = torch.cat([chances, 1 - chances.sum(-1, keepdim=True)], -1)
    expected = (q * (q.log() - p.log())).sum() * 0.5
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(expected, hidden)[0], rtol=1e-3, atol=1e-5)


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 16, requires_grad=True), torch.randn(50, 16)
    chances, ids = torch.softmax(hidden.detach() @ head.t(), -1).topk(8)
    loss = linear_distillation(hidden, head, ids, chances, scale=1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert float(hidden.grad.abs().max()) < 1e-4
