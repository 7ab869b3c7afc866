"""Norm, rotary positions, SwiGLU and losses on every path of the kernels, against transformers' own modules, torch and autograd.

Tolerances: in fp32 sums are taken in another order and exp is up to 1.3 units off, so 1e-5 of the size of what is summed. In bf16 a
number is computed in fp32 and rounded, so it may be torch's neighbour (2^-7 of itself away), or the next where torch rounds on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from trimtab_runtime.xeon import kernels
from trimtab_runtime.xeon.loss import linear_cross_entropy

DTYPES = (torch.float32, torch.bfloat16)
NEIGHBOUR = 2.0**-7  # from one number of bf16 to the next, relative
WIDTHS = (1, 15, 16, 33, 64, 576, 1000)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=kernels.PATHS, autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path in turn; those that this machine cannot take are skipped and counted (support/kernel_paths.py)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: a second thread would only be waited for
    with kernels.forced(request.param):
        assert (kernels._op("rms_norm") is None) == (request.param == "off")
        yield request.param
    torch.set_num_threads(threads)


def everything(dtype: torch.dtype) -> list[Tensor]:
    """What each function gives for rows enough that threads share them."""
    n, width = 67, 1000
    x, d, gate_up = drawn(n, width, dtype=dtype), drawn(n, width, dtype=dtype, seed=1), drawn(n, 2 * width, dtype=dtype, seed=2)
    angles, weight, targets = drawn(n, width // 5, dtype=torch.float32, seed=3), drawn(width, dtype=dtype, seed=4), torch.arange(n)
    y, rstd = kernels.rms_norm(x, weight, 1e-5)
    turned = kernels.rotate_(x.view(n, 5, -1).clone(), angles.cos(), angles.sin())
    first, second, ids = gate_up.clone(), gate_up.clone(), torch.arange(3).repeat(n, 1)
    losses = [kernels.cross_entropy_(first, targets, 0.5), kernels.divergence_(second, ids, torch.full((n, 3), 0.2), 0.5)]
    swiglu = [kernels.swiglu(gate_up), *kernels.swiglu_backward(d, gate_up, keep=True)]
    return [y, rstd, kernels.rms_norm_backward(d, x, rstd, weight, d), turned, *swiglu, *losses, first, second]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_give_the_same_bits_as_one(dtype: torch.dtype, path: str) -> None:
    """A row is one thread's; torch itself, without kernels, splits some sums otherwise."""
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(everything(dtype))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        if path == "off":
            near(one, other)
        else:
            assert torch.equal(one, other)


def near(found: Tensor, expected: Tensor, *, roundings: float = 1, size: float | None = None) -> None:
    """Equal but for so many `roundings` of each number in bf16, or for 1e-5 in fp32; `size` is that of what was summed for it."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    step = NEIGHBOUR * roundings if found.dtype == torch.bfloat16 else 1e-5
    size = float(expected.float().abs().max()) if size is None and expected.numel() else size or 0.0
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=1e-5 * size, equal_nan=True)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def leaf_of(x: Tensor) -> Tensor:
    """The same numbers in fp32, in memory of their own, for autograd."""
    return x.float().clone().requires_grad_()


def apart(x: Tensor, *, extra: int = 7) -> Tensor:
    """The same numbers in rows that lie apart in memory, with NaN between them that nothing may read or write."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + extra), NAN, dtype=x.dtype)
    view = room[..., : x.shape[-1]]
    view.copy_(x)
    return view


def gap_is_whole(view: Tensor) -> bool:
    return bool(view._base is not None and view._base[..., view.shape[-1] :].isnan().all())


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that a result stands in."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


class TestNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_forward_and_backward_are_those_of_transformers(self, width: int, dtype: torch.dtype) -> None:
        x, dy, add = (drawn(37, width, dtype=dtype, seed=seed) for seed in range(3))
        norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
        norm.weight.data.copy_(drawn(width, dtype=dtype, seed=3) + 1)
        weight = norm.weight.detach()
        y, rstd = kernels.rms_norm(x, weight, 1e-5)
        expected = norm(x).detach()
        near(y, expected, roundings=2)  # the normed number is rounded, and its product
        near(rstd, torch.rsqrt(x.float().square().mean(-1) + 1e-5))

        wide = leaf_of(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        (gradient,) = torch.autograd.grad(normed * weight.float(), wide, dy.float())
        size = float((dy.float() * weight.float()).abs().max() * rstd.max())  # a number is a difference of two of this size
        near(kernels.rms_norm_backward(dy, x, rstd, weight), gradient.to(dtype), size=size)
        near(kernels.rms_norm_backward(dy, x, rstd, weight, add), (gradient + add.float()).to(dtype), size=size)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_heads_that_lie_apart_and_in_place(self, dtype: torch.dtype) -> None:
        """Norms of queries and keys inside one qkv (Qwen3)."""
        n, heads, width = 13, 3, 24
        qkv, d_qkv = drawn(n, heads + 2, width, dtype=dtype), drawn(n, heads + 2, width, dtype=dtype, seed=1)
        weight = drawn(width, dtype=dtype, seed=2)
        x, dy, others = qkv[:, :heads], d_qkv[:, :heads], (qkv[:, heads:].clone(), d_qkv[:, heads:].clone())
        y, rstd = kernels.rms_norm(x, weight, 1e-6)
        flat, of_flat = kernels.rms_norm(x.reshape(-1, width), weight, 1e-6)
        assert torch.equal(y.view(-1, width), flat)
        assert torch.equal(rstd.view(-1), of_flat)
        expected = kernels.rms_norm_backward(dy.reshape(-1, width), x.reshape(-1, width), of_flat, weight)
        dx = kernels.rms_norm_backward(dy, x, rstd, weight, out=dy)
        assert dx.data_ptr() == d_qkv.data_ptr()
        assert torch.equal(dx.reshape(-1, width), expected)
        assert kernels.rms_norm(x, weight, 1e-6, out=x)[0].data_ptr() == qkv.data_ptr()
        assert torch.equal(x.reshape(-1, width), flat)
        assert torch.equal(qkv[:, heads:], others[0])
        assert torch.equal(d_qkv[:, heads:], others[1])

    def test_a_weight_in_another_dtype(self) -> None:
        x, weight = drawn(5, 40, dtype=torch.bfloat16), drawn(40, dtype=torch.float32, seed=1)
        y, _rstd = kernels.rms_norm(x, weight, 1e-5)
        near(y, (weight * functional.rms_norm(x.float(), (40,), eps=1e-5).bfloat16()).bfloat16(), roundings=2)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_not_finite_stays_in_its_row(self, dtype: torch.dtype) -> None:
        x = drawn(6, 40, dtype=dtype)
        x[1, 3], x[2, 39], x[3], x[4] = INF, NAN, 0.0, 1e-30
        weight = torch.ones(40, dtype=dtype)
        expected = LlamaRMSNorm(40, eps=1e-5).to(dtype)(x).detach()
        y, rstd = kernels.rms_norm(x, weight, 1e-5)
        near(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]], roundings=2, size=0.01)  # infinity gives 0, and NaN in its own place
        assert y[2].isnan().all()
        dx = kernels.rms_norm_backward(torch.ones_like(x), x, rstd, weight)
        assert dx[[0, 3, 4, 5]].isfinite().all()
        assert dx[[1, 2]].isnan().all()


class TestRotary:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [2, 6, 32, 64, 80, 128])
    def test_bit_equal_to_transformers_and_back_to_its_gradient(self, width: int, dtype: torch.dtype) -> None:
        n, heads = 29, 5
        x, d = drawn(n, heads, width, dtype=dtype), drawn(n, heads, width, dtype=dtype, seed=1)
        angles = drawn(n, width, dtype=torch.float32, seed=2) * 3
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        leaf = x.clone().requires_grad_()
        expected, _key = apply_rotary_pos_emb(leaf.transpose(0, 1)[None], leaf.transpose(0, 1)[None], cos[None], sin[None])
        (gradient,) = torch.autograd.grad(expected, leaf, d.transpose(0, 1)[None])
        given = x.clone()
        assert kernels.rotate_(given, cos, sin) is given
        assert torch.equal(given, expected[0].transpose(0, 1))
        assert torch.equal(kernels.rotate_(d.clone(), cos, sin, back=True), gradient)
        wide = kernels.rotate_(x.clone(), cos.float(), sin.float())
        assert torch.equal(wide, given), "angles may come in fp32"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_heads_inside_a_row_of_qkv_and_a_part_of_each_head(self, dtype: torch.dtype) -> None:
        qkv = drawn(11, 6, 48, dtype=dtype)
        before, angles = qkv.clone(), drawn(11, 32, dtype=torch.float32, seed=2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        kernels.rotate_(qkv[:, 1:4, :32], cos, sin)
        assert torch.equal(qkv[:, 1:4, :32], kernels.rotate_(before[:, 1:4, :32].contiguous(), cos, sin))
        qkv[:, 1:4, :32] = before[:, 1:4, :32]
        assert torch.equal(qkv, before)

    def test_there_and_back(self) -> None:
        x, angles = drawn(9, 2, 64, dtype=torch.float32), drawn(9, 32, dtype=torch.float32, seed=1).repeat(1, 2)
        there = kernels.rotate_(x.clone(), angles.cos(), angles.sin())
        near(kernels.rotate_(there, angles.cos(), angles.sin(), back=True), x)

    def test_what_is_not_finite_stays_in_its_pair(self) -> None:
        x, angles = drawn(3, 1, 32, dtype=torch.bfloat16), drawn(3, 32, dtype=torch.float32, seed=1)
        x[1, 0, 4], x[2, 0, 17] = NAN, INF
        found = kernels.rotate_(x, angles.cos(), angles.sin())
        assert (~found.isfinite()).nonzero().tolist() == [[1, 0, 4], [1, 0, 20], [2, 0, 1], [2, 0, 17]]


class TestSwiglu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_forward_and_backward(self, width: int, dtype: torch.dtype) -> None:
        gate_up, d = drawn(23, 2 * width, dtype=dtype, scale=4), drawn(23, width, dtype=dtype, seed=1)
        gate, up = gate_up.chunk(2, dim=-1)
        act = functional.silu(gate) * up
        near(kernels.swiglu(gate_up), act, roundings=2)  # silu is rounded, and its product
        wide = leaf_of(gate_up)
        first, second = wide.chunk(2, dim=-1)
        (gradient,) = torch.autograd.grad(functional.silu(first) * second, wide, d.float())
        kept = gate_up.clone()
        found, again = kernels.swiglu_backward(d, gate_up, keep=True)
        assert torch.equal(gate_up, kept)
        assert torch.equal(again, kernels.swiglu(gate_up))
        near(found, gradient.to(dtype))
        in_place, again_too = kernels.swiglu_backward(d, gate_up, keep=False)
        assert in_place.data_ptr() == gate_up.data_ptr()
        assert torch.equal(in_place, found)
        assert torch.equal(again_too, again)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_extremes(self, dtype: torch.dtype) -> None:
        gates = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, -87.0, -88.5, -100.0, -1e4, 100.0, 1e4, 3e38, -3e38, INF, -INF, NAN]
        gate = torch.tensor(gates, dtype=dtype)
        gate_up = torch.stack([gate, torch.full_like(gate, 2.0)], dim=1)
        near(kernels.swiglu(gate_up)[:, 0], functional.silu(gate) * 2, roundings=2, size=1e-20)
        leaf = leaf_of(gate)
        (gradient,) = torch.autograd.grad(functional.silu(leaf), leaf, torch.full_like(leaf, 2.0))
        found, act = kernels.swiglu_backward(torch.ones(len(gate), 1, dtype=dtype), gate_up, keep=True)
        near(found[:, 0], gradient.to(dtype), size=1e-20)
        near(found[:, 1], functional.silu(gate.float()).to(dtype), size=1e-20)
        near(act[:, 0], functional.silu(gate) * 2, roundings=2, size=1e-20)

    def test_rows_that_lie_apart(self) -> None:
        gate_up = apart(drawn(9, 80, dtype=torch.bfloat16))
        assert torch.equal(kernels.swiglu(gate_up), kernels.swiglu(gate_up.contiguous()))
        d = drawn(9, 40, dtype=torch.bfloat16, seed=1)
        expected, _act = kernels.swiglu_backward(d, gate_up.contiguous(), keep=True)
        found, _act = kernels.swiglu_backward(d, gate_up, keep=False)
        assert torch.equal(found, expected)
        assert gap_is_whole(gate_up)


class TestCrossEntropy:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [*WIDTHS, 32_003])
    def test_loss_and_gradient_are_torchs(self, width: int, dtype: torch.dtype) -> None:
        logits, targets = drawn(19, width, dtype=dtype, scale=5), torch.randint(0, width, (19,), generator=torch.Generator().manual_seed(1))
        wide = leaf_of(logits)
        expected = functional.cross_entropy(wide, targets, reduction="sum") * 0.25
        (gradient,) = torch.autograd.grad(expected, wide)
        loss = kernels.cross_entropy_(logits, targets, 0.25)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
        near(logits, gradient.to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_exp_over_its_whole_range(self, dtype: torch.dtype) -> None:
        """A row [0, x] has exp(x) / (1 + exp(x)) as its second chance: 4 units in the last place, subnormal numbers among them."""
        x = torch.linspace(-104, 0, 5001).to(dtype)
        logits = torch.stack([torch.zeros_like(x), x], dim=1)
        kernels.cross_entropy_(logits, torch.zeros(len(x), dtype=torch.int64), 1.0)
        expected = torch.sigmoid(x.double())
        step = NEIGHBOUR if dtype == torch.bfloat16 else 4 * 2.0**-23
        torch.testing.assert_close(logits[:, 1].double(), expected, rtol=step, atol=3e-45 if dtype == torch.float32 else 1e-40)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_extremes(self, dtype: torch.dtype) -> None:
        logits = drawn(8, 50, dtype=dtype)
        logits[1, 7], logits[2, 49], logits[3, 5], logits[4, 6], logits[5] = NAN, INF, -INF, 1e4, -INF
        logits[6], logits[7] = 3e38, -3e38
        wide, targets = logits.float(), torch.full((8,), 6)
        found = logits.clone()
        losses = torch.stack([kernels.cross_entropy_(found[row : row + 1], targets[:1], 1.0) for row in range(8)])
        expected = functional.cross_entropy(wide, targets, reduction="none")
        fine = [0, 3, 4, 6, 7]
        torch.testing.assert_close(losses[fine], expected[fine], rtol=1e-5, atol=1e-6)
        assert not losses[[1, 2, 5]].isfinite().any()
        assert found[1].isnan().all()
        assert found[5].isnan().all()
        assert found[fine].isfinite().all()
        assert found[3, 5] == 0.0
        hidden = logits[3:4].clone()  # a target of no chance
        assert kernels.cross_entropy_(hidden, torch.tensor([5]), 1.0) == INF
        assert hidden[0, 5] == -1.0

    def test_rows_that_lie_apart_and_no_rows(self) -> None:
        logits = apart(drawn(9, 77, dtype=torch.bfloat16))
        together, targets = logits.contiguous(), torch.arange(9)
        assert torch.equal(kernels.cross_entropy_(logits, targets, 0.5), kernels.cross_entropy_(together, targets, 0.5))
        assert torch.equal(logits, together)
        assert gap_is_whole(logits)
        assert kernels.cross_entropy_(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 1.0) == 0.0

    @pytest.mark.parametrize("target", [-1, 5, -100])
    def test_a_target_outside_the_vocabulary_is_refused(self, target: int) -> None:
        with pytest.raises(RuntimeError):
            kernels.cross_entropy_(torch.zeros(2, 5), torch.tensor([0, target]), 1.0)


class TestDivergence:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("width", "k"), [(9, 1), (50, 8), (1000, 32), (32_003, 16)])
    def test_loss_and_gradient_are_autograds(self, width: int, k: int, dtype: torch.dtype) -> None:
        logits = drawn(11, width, dtype=dtype, scale=2)
        chances, ids = torch.softmax(drawn(11, width, dtype=torch.float32, seed=1, scale=2), -1).topk(k)
        chances = chances.half()  # as a ledger keeps them
        wide = leaf_of(logits)
        student = torch.softmax(wide, -1).gather(1, ids)
        p, q = (torch.cat([some, 1 - some.sum(-1, keepdim=True)], -1) for some in (student, chances.float()))
        expected = (q * (q.log() - p.log())).sum() * 0.5
        (gradient,) = torch.autograd.grad(expected, wide)
        loss = kernels.divergence_(logits, ids, chances, 0.5)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
        near(logits, gradient.to(dtype), size=1.0)  # differences of chances, which are at most 1

    def test_a_teacher_that_is_sure_and_a_student_that_is(self) -> None:
        """Chances of 0 and of 1 in sum, and a student who leaves the others less than 1e-6: finite, as without kernels."""
        logits = torch.zeros(3, 40)
        logits[1, 4], logits[2, 9] = 60.0, 60.0
        ids, chances = torch.tensor([[4, 5]] * 3), torch.tensor([[1.0, 0.0]] * 3)
        chances[1] = torch.tensor([0.7, 0.1])
        with kernels.forced("off"):
            plain = logits.clone()
            expected = kernels.divergence_(plain, ids, chances, 1.0)
        found = kernels.divergence_(logits, ids, chances, 1.0)
        assert found.isfinite()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)

    def test_what_is_not_finite_stays_in_its_row(self) -> None:
        logits = drawn(3, 40, dtype=torch.bfloat16)
        logits[1, 3] = NAN
        ids, chances = torch.tensor([[4, 5]] * 3), torch.full((3, 2), 0.4)
        assert kernels.divergence_(logits, ids, chances, 1.0).isnan()
        assert logits.isnan().all(1).tolist() == [False, True, False]
        assert logits[[0, 2]].isfinite().all()


class TestChunkedLoss:
    @pytest.mark.parametrize("tokens", [40, 1030])
    def test_in_bf16_it_is_the_loss_of_full_fp32_logits(self, tokens: int) -> None:
        """As transformers computes it: bf16 products, logits made fp32. The gradient of the logits is rounded to bf16 in both."""
        hidden, head = drawn(tokens, 48, dtype=torch.bfloat16), drawn(333, 48, dtype=torch.bfloat16, seed=1, scale=0.3)
        targets = torch.randint(0, 333, (tokens,), generator=torch.Generator().manual_seed(2))
        both = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        expected = functional.cross_entropy((both[0] @ both[1].t()).float(), targets, reduction="sum") * 0.01
        of_hidden, of_head = torch.autograd.grad(expected, both)
        mine = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = linear_cross_entropy(mine[0], mine[1], targets, scale=0.01)
        found_hidden, found_head = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        off = [
            float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            for ours, theirs in ((found_hidden, of_hidden), (found_head, of_head))
        ]
        assert off[0] < 1e-3  # a few numbers of bf16 are neighbours
        assert off[1] < 2.0**-8  # the head's is a sum over chunks, each rounded to bf16

    def test_no_tensor_is_larger_than_a_chunks_logits(self) -> None:
        """Those of 512 tokens, in bf16 with the kernels, whatever the number of tokens."""
        hidden, head = drawn(4 * 512, 8, dtype=torch.bfloat16).requires_grad_(), drawn(5000, 8, dtype=torch.bfloat16, seed=1)
        with Largest() as seen:
            linear_cross_entropy(hidden, head, torch.zeros(len(hidden), dtype=torch.int64), scale=1.0).backward()
        assert seen.bytes == 512 * 5000 * (4 if kernels.path().value == "off" else 2)
