"""Attention of packed rows on each path: compiled, plain torch beside portable kernels, plain torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trimtab_runtime.choices import cpu_flags
from trimtab_runtime.xeon import kernels
from trimtab_runtime.xeon.attention import attend, attend_backward, plan_groups

MIXES = [[1], [7, 3, 130, 12], [65, 64, 63, 129, 128, 127], [300, 1, 2, 258]]
SHAPES = [(8, 1, 64), (6, 2, 16), (3, 3, 80), (4, 4, 34)]  # heads of queries, of keys, width
CASES = [(shape, MIXES[(i + j) % 4]) for i, shape in enumerate(SHAPES) for j in (0, 2)]
# of torch's distance to fp32 in bf16. The kernels round what it rounds. Without them, or AVX512-BF16, weights are rounded as shares of 1,
# where torch's of the largest one begin with an exact 1; each product's sum is rounded once, torch's are fp32 up to the last
ALLOWED = {"amx": 1.1, "avx512": 1.1 if "avx512_bf16" in cpu_flags() else 1.5, "portable": 1.5, "off": 1.5}


@pytest.fixture(params=kernels.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param):
        yield request.param


class Row:
    """query, key and value as views of one tensor, and the gradient of the output."""

    def __init__(
        self, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype, *, window: int | None = None, size: float = 1.0
    ):
        self.lengths, self.shape, self.window, self.groups = lengths, shape, window, plan_groups(lengths)
        heads, kv_heads, width = shape
        self.scale = width**-0.5
        torch.manual_seed(0)
        self.qkv = (torch.randn(sum(lengths), (heads + 2 * kv_heads) * width) * size).to(dtype)
        self.d_out = torch.randn(sum(lengths), heads, width).to(dtype)

    @property
    def parts(self) -> list[Tensor]:
        heads, kv_heads, width = self.shape
        split = self.qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
        return [part.view(len(part), -1, width) for part in split]

    def ours(self) -> list[Tensor]:
        out, lse = attend(*self.parts, self.groups, self.scale, self.window)
        return [out, *attend_backward(self.d_out, *self.parts, out, lse, self.groups, self.scale, self.window)]

    def alone(self, dtype: torch.dtype) -> list[Tensor]:
        """Each sample by itself through torch's own attention, computed in `dtype`."""
        parts = [part.detach().to(dtype).requires_grad_() for part in self.parts]
        pieces = []
        for sample in torch.arange(sum(self.lengths)).split(self.lengths):
            query, key, value = (part[sample].transpose(0, 1)[None] for part in parts)
            seen = torch.ones(len(sample), len(sample), dtype=torch.bool).tril()
            given = {"is_causal": True} if self.window is None else {"attn_mask": seen.triu(1 - self.window)}
            out = functional.scaled_dot_product_attention(query, key, value, scale=self.scale, enable_gqa=True, **given)
            pieces.append(out[0].transpose(0, 1))
        whole = torch.cat(pieces)
        return [whole.detach(), *torch.autograd.grad(whole, parts, self.d_out.to(dtype))]


def apart(one: list[Tensor], other: list[Tensor], least: float) -> list[float]:
    """How far each tensor is from its other, relative to that one's norm, or to `least` a number where that is more: what is 0 but for
    rounding, as the gradient of a lone place's query, has nothing to be relative to."""
    return [
        float((a.float() - b.float()).norm() / max(float(b.float().norm()), least * b.numel() ** 0.5))
        for a, b in zip(one, other, strict=True)
    ]


@pytest.mark.parametrize(("shape", "lengths"), CASES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 64, 65, 4096])
def test_fp32_equals_each_sample_alone(path: str, lengths: list[int], shape: tuple[int, int, int], window: int | None) -> None:
    """To 1e-5: sums of at most 300 fp32 products in another order; the compiled exponential is right to 2e-7."""
    row = Row(lengths, shape, torch.float32, window=window)
    assert max(apart(row.ours(), row.alone(torch.float32), 1.0)) < 1e-5


@pytest.mark.parametrize(("shape", "lengths"), [*CASES[::2], ((4, 4, 128), MIXES[3])], ids=str)
@pytest.mark.parametrize("window", [None, 65])
def test_bf16_is_as_near_to_fp32_as_torch_in_bf16(path: str, lengths: list[int], shape: tuple[int, int, int], window: int | None) -> None:
    row = Row(lengths, shape, torch.bfloat16, window=window)
    exact = row.alone(torch.float32)
    for mine, torchs in zip(apart(row.ours(), exact, 1e-1), apart(row.alone(torch.bfloat16), exact, 1e-1), strict=True):
        assert mine < ALLOWED[path] * torchs + 1e-4


def test_large_scores_keep_their_precision(path: str) -> None:
    """Scores of up to 150: in bf16 they would be off by half, and weights by as much as that doubles or halves them."""
    row = Row([200, 90], (8, 2, 64), torch.bfloat16, size=5.0)
    scores = torch.einsum("ihd,jhd->hij", row.parts[0][:, :2].float(), row.parts[1].float()) * row.scale
    assert float(scores.max()) > 80
    exact = row.alone(torch.float32)
    for mine, torchs in zip(apart(row.ours(), exact, 1e-1), apart(row.alone(torch.bfloat16), exact, 1e-1), strict=True):
        assert mine < ALLOWED[path] * torchs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "width"), [(None, 32), (40, 32), (None, 34)])
def test_what_stands_in_a_neighbour_never_matters(path: str, dtype: torch.dtype, window: int | None, width: int) -> None:
    """Bit for bit: other numbers, and NaN, in one sample leave output and gradients of all others as they were."""
    lengths = [33, 64, 1, 150, 31, 64]
    row = Row(lengths, (6, 2, width), dtype, window=window)
    before = row.ours()
    for changed in range(len(lengths)):
        places = slice(sum(lengths[:changed]), sum(lengths[: changed + 1]))
        for other in (0.25, float("nan")):
            kept = row.qkv[places].clone(), row.d_out[places].clone()
            row.qkv[places], row.d_out[places] = other, other
            after = row.ours()
            row.qkv[places], row.d_out[places] = kept
            for one, two in zip(before, after, strict=True):
                assert torch.equal(
                    torch.cat([one[: places.start], one[places.stop :]]), torch.cat([two[: places.start], two[places.stop :]])
                )
            assert after[0][places].isnan().all() if other != other else not torch.equal(before[0][places], after[0][places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_tensors_lie_in_memory_changes_nothing(path: str, dtype: torch.dtype) -> None:
    """One tensor for all three, three of their own, and gradients into a tensor that is there already: the same bits."""
    row = Row([70, 9, 140], (6, 2, 32), dtype)
    together = row.ours()
    query, key, value = (part.contiguous() for part in row.parts)
    out, lse = attend(query, key, value, row.groups, row.scale)
    into = torch.full_like(row.qkv, float("nan"))
    stretched = row.d_out.transpose(1, 2).contiguous().transpose(1, 2)  # a head's numbers lie apart
    apart = attend_backward(stretched, query, key, value, out, lse, row.groups, row.scale, None, into)
    assert all(torch.equal(one, other) for one, other in zip(together, [out, *apart], strict=True))
    assert torch.equal(into, torch.cat([part.flatten(1) for part in apart], dim=1))
    assert apart[0].untyped_storage().data_ptr() == into.untyped_storage().data_ptr()


@pytest.mark.parametrize("window", [None, 200])
def test_a_sample_split_among_threads_is_summed_to_the_same(path: str, window: int | None) -> None:
    """To 1e-5, as above: one key head and one long sample are less than there are threads, so that its columns are split."""
    row, threads = Row([700, 30], (8, 1, 32), torch.float32, window=window), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = row.ours()
        torch.set_num_threads(4)
        four, again = row.ours(), row.ours()
    finally:
        torch.set_num_threads(threads)
    assert max(apart(four, one, 1.0)) < 1e-5
    assert max(apart(four, row.alone(torch.float32), 1.0)) < 1e-5
    if path in ("amx", "avx512"):  # whoever computes a part, parts are summed in their order
        assert all(torch.equal(a, b) for a, b in zip(four, again, strict=True))


def test_in_bf16_a_sample_is_split_among_threads_too(path: str) -> None:
    """As near to fp32 as by one thread; each thread has registers of its own."""
    row, threads = Row([700, 30], (8, 1, 32), torch.bfloat16), torch.get_num_threads()
    exact = row.alone(torch.float32)
    try:
        torch.set_num_threads(1)
        one = row.ours()
        torch.set_num_threads(4)
        four, again = row.ours(), row.ours()
    finally:
        torch.set_num_threads(threads)
    for mine, by_one in zip(apart(four, exact, 1e-1), apart(one, exact, 1e-1), strict=True):
        assert mine < 1.05 * by_one + 1e-5
    if path in ("amx", "avx512"):
        assert all(torch.equal(a, b) for a, b in zip(four, again, strict=True))


def test_log_sum_exps_are_those_of_the_scores(path: str) -> None:
    row = Row([20, 5], (4, 2, 16), torch.float32)
    _, lse = attend(*row.parts, row.groups, row.scale, None)
    query, key, _ = row.parts
    scores = torch.einsum("ihd,jhd->hij", query[:20], key[:20].repeat_interleave(2, dim=1)) * row.scale
    scores.masked_fill_(torch.ones(20, 20, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(lse[:, :20], scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_kernel_refuses_what_it_would_read_beyond(path: str) -> None:
    row = Row([20, 5], (4, 2, 16), torch.float32)
    out, lse = torch.empty_like(row.d_out), torch.empty(4, 25)
    if path not in ("amx", "avx512"):
        assert not kernels.attend(*row.parts, torch.tensor([[0, 20]]), row.scale, None, out, lse)
        return
    for places in ([[0, 26]], [[-1, 5]], [[20, 6]], [[3, 0]]):
        with pytest.raises(RuntimeError, match="outside the row"):
            kernels.attend(*row.parts, torch.tensor(places), row.scale, None, out, lse)
    with pytest.raises(RuntimeError, match="log-sum-exps"):
        kernels.attend(*row.parts, torch.tensor([[0, 25]]), row.scale, None, out, lse[:, :20])
    with pytest.raises(RuntimeError, match="heads of keys"):
        kernels.attend(row.parts[0][:, :3], *row.parts[1:], torch.tensor([[0, 25]]), row.scale, None, out[:, :3], lse[:3])
