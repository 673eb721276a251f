"""Quantized keys and values as operators of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import tenpak

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")

from tenpak.torch import _kv  # noqa: E402
from tenpak.torch._kv import BLOCK, Cache, kv_append, kv_attend, kv_recall, shapes  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402


def empty(
    sequences: int = 2,
    columns: int = 4,
    heads: int = 2,
    channels: int = 64,
    bits: tuple[int, int] = (4, 8),
    **where: Any,
) -> Cache:
    parts = shapes(sequences, sequences * columns, columns, heads, channels, bits)
    cache = Cache(*(torch.zeros(shape, dtype=dtype, **where) for shape, dtype in parts), *bits)
    if cache.pages.device.type == "cpu":
        cache.pages.copy_(torch.randperm(sequences * columns).view_as(cache.pages))
    return cache


def tokens(cache: Cache, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    heads, channels = cache.format[:2]
    shape = (cache.lengths.shape[0], heads, count, channels)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def filled(count: int, **options: Any) -> Cache:
    cache = empty(**options)
    kv_append(*tokens(cache, count), *cache)
    cache.lengths.add_(count)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_come_back_within_half_a_step_and_those_of_the_tail_as_halves(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cache = empty()
    keys, values = tokens(cache, 77, dtype)
    for part in (slice(0, 5), slice(5, 70), slice(70, 77)):
        kv_append(keys[:, :, part], values[:, :, part], *cache)
        cache.lengths.add_(part.stop - part.start)
    found = kv_recall(*cache, 77, torch.float32)
    for numbers, stored, bits, dim in zip((keys, values), found, (4, 8), (2, 3), strict=True):
        halves = numbers.half().float()
        assert torch.equal(stored[:, :, 64:], halves[:, :, 64:])
        blocks = halves[:, :, :64]
        grouped = blocks.unflatten(dim, (-1, 32))
        span = (grouped.amax(dim + 1 if dim == 2 else 4) - grouped.amin(dim + 1 if dim == 2 else 4)).amax()
        # Half a step, and what rounding the scale to a half adds over all steps.
        limit = float(span) * (0.5 / (2**bits - 1) + 2.0**-10)
        assert (stored[:, :, :64] - blocks).abs().max() <= limit


def test_attention_is_that_over_what_comes_back() -> None:
    torch.manual_seed(2)
    cache = filled(100)
    keys, values = kv_recall(*cache, 100, torch.float32)
    for m, causal in ((1, True), (3, True), (3, False)):
        q = torch.randn(2, 6, m, 64)
        mask = torch.ones(m, 100, dtype=torch.bool)
        if causal:
            mask = mask.tril(100 - m)
        for own in (None, torch.rand(2, m, 100) < 0.5):
            seen = mask if own is None else (mask & own)[:, None]
            want = torch.nn.functional.scaled_dot_product_attention(
                q.double(), keys.double(), values.double(), seen, scale=0.1, enable_gqa=True
            )
            got = kv_attend(q, *cache, own, 0.1, causal, 100)
            torch.testing.assert_close(got.transpose(1, 2).double(), want, rtol=1e-5, atol=1e-5)


def test_operators_are_what_compilers_take_them_to_be() -> None:
    torch.manual_seed(3)
    cache = filled(40)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kv_append, (*tokens(cache, 30), *cache), test_utils=checks)
    q = torch.randn(2, 4, 1, 64)
    mask = torch.ones(2, 1, 40, dtype=torch.bool)
    torch.library.opcheck(kv_attend, (q, *cache, None, 0.1, True, 40))
    torch.library.opcheck(kv_attend, (q, *cache, mask, 0.1, True, 40))
    torch.library.opcheck(kv_recall, (*cache, 40, torch.bfloat16))


def test_a_step_is_three_operators_in_a_compiled_graph() -> None:
    torch.manual_seed(4)

    def step(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *cache: Any) -> torch.Tensor:
        kv_append(keys, values, *cache)
        cache[7].add_(keys.shape[2])
        return kv_attend(q, *cache, None, 0.1, True, 100)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, other = filled(31), empty()
    other = Cache(*(part.clone() for part in eager.tensors), *eager[8:])
    for _ in range(3):
        q, (keys, values) = torch.randn(2, 4, 1, 64), tokens(eager, 1)
        assert torch.equal(compiled(q, keys, values, *other), step(q, keys, values, *eager))
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors, other.tensors, strict=True))


def test_operators_know_their_results_on_a_device_before_there_are_any() -> None:
    for name in ("kv_append", "kv_attend", "kv_recall"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tenpak::{name}", "CUDA"), name
    with FakeTensorMode():
        cache = empty(device="cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q = torch.empty(2, 8, 3, 64, dtype=dtype, device="cuda")
            out = kv_attend(q, *cache, None, 0.1, True, 100)
            assert (out.shape, out.dtype, out.device.type) == ((2, 3, 8, 64), dtype, "cuda")
            keys, values = kv_recall(*cache, 50, dtype)
            assert keys.shape == values.shape == (2, 2, 50, 64) and keys.device.type == "cuda"
            kv_append(keys, values, *cache)
        graph = make_fx(lambda q: kv_attend(q, *cache, None, 0.1, True, 100))(q)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [kv_attend]


def test_what_does_not_fit_a_cache_is_refused_by_name() -> None:
    cache = empty()
    keys, values = tokens(cache, 3)
    bad = keys.clone()
    bad[1, 0, 2, 5] = 1e6
    with pytest.raises(tenpak.InvalidError, match="token 2, head 0, channel 5 is 1000000"):
        kv_append(bad, values, *cache)
    with pytest.raises(tenpak.InvalidError, match="expected both of one dtype"):
        kv_append(keys.half(), values, *cache)
    with pytest.raises(tenpak.InvalidError, match="float64"):
        kv_append(keys.double(), values.double(), *cache)
    with pytest.raises(tenpak.InvalidError, match="expected a page for each"):
        kv_append(*tokens(cache, 4 * BLOCK + 32), *cache)
    with pytest.raises(tenpak.InvalidError, match="queries of shape"):
        kv_attend(torch.randn(2, 3, 1, 64), *cache, None, 0.1, True, 1)
    with pytest.raises(tenpak.InvalidError, match="without tokens"):
        kv_attend(torch.randn(2, 4, 1, 64), *cache, None, 0.1, True, 1)
    with pytest.raises(tenpak.InvalidError, match="a mask of"):
        kv_attend(torch.randn(2, 4, 1, 64), *cache, torch.ones(1), 0.1, True, 1)
    cache.pages[0, 0] = 77
    with pytest.raises(tenpak.InvalidError, match="page 77 of a pool of 8 pages"):
        kv_append(*tokens(cache, 40), *cache)
    with pytest.raises(tenpak.InvalidError, match="key_tail of a cache"):
        kv_append(keys, values, *cache._replace(key_tail=cache.key_tail.float()))
    with pytest.raises(tenpak.InvalidError, match="expected one device"):
        _kv._places(cache._replace(pages=torch.empty(2, 4, dtype=torch.int32, device="meta")), keys)
