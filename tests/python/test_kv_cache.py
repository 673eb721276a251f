"""Models of transformers with quantized keys and values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tenpak
from conftest import ROOT

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'tenpak[hf]'")

import tenpak.torch as tt  # noqa: E402
from tenpak.torch._cache import QuantizedCacheLayer  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps under the old tree by the river. " * 3


@pytest.fixture(scope="module")
def loaded() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tests/data/tiny-books", dtype=torch.float32).eval()


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    before = loaded.config._attn_implementation
    yield loaded
    loaded.set_attn_implementation(before)


@pytest.fixture(scope="module")
def prompt() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-books")
    return tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :70]


def step_by_step(model: Any, ids: Any, cache: Any, steps: int = 40) -> Any:
    """The logits of a prompt and of steps with the tokens that the float model chooses."""
    with torch.inference_mode():
        logits = [model(ids[:, :-steps], past_key_values=cache).logits]
        for i in range(ids.shape[1] - steps, ids.shape[1]):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1)


class Rounded(transformers.DynamicCache):
    """A float cache of numbers as the format has them: what a model makes of the format's error alone."""

    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(config=config)
        self.stores = [QuantizedCacheLayer(None, bits) for _ in self.layers]

    def update(self, keys: Any, values: Any, layer: int, *rest: Any, **named: Any) -> Any:
        _, stored = None, self.stores[layer]
        prompt = stored.length == 0
        stored.update(keys, values)
        return (keys, values) if prompt else stored.recall()


def lengths_of(model: Any, cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize("bits", [8, 4, (8, 4)])
def test_a_model_on_codes_is_the_model_on_what_they_decode_to(model: Any, prompt: Any, bits: Any) -> None:
    cache = tt.QuantizedCache(model.config, bits=bits)
    decoded = step_by_step(model, prompt, cache)
    model.set_attn_implementation("tenpak")
    on_codes = tt.QuantizedCache(model.config, bits=bits)
    assert torch.allclose(step_by_step(model, prompt, on_codes), decoded, atol=1e-4, rtol=1e-4)
    assert lengths_of(model, cache) == lengths_of(model, on_codes) == [prompt.shape[1]] * len(cache.layers)
    for a, b in zip(cache.layers, on_codes.layers, strict=True):
        # The layers after the first see what attention rounds otherwise, so that a code may be the next one.
        assert torch.equal(a.cache.pages, b.cache.pages)
        assert torch.equal(a.cache.key_codes, b.cache.key_codes) or a is not cache.layers[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "tenpak"])
def test_eight_bits_choose_the_tokens_of_the_float_cache(model: Any, prompt: Any, attention: str) -> None:
    with torch.inference_mode():
        want = model.generate(prompt, max_new_tokens=50, do_sample=False)
        model.set_attn_implementation(attention)
        got = model.generate(
            prompt, max_new_tokens=50, do_sample=False, past_key_values=tt.QuantizedCache(model.config, bits=8)
        )
        floats = model(want).logits[0, :-1].log_softmax(-1)
    assert got.shape == want.shape
    # Where they part, both tokens are as good: by less than what the format's error moves the logits.
    same = (got == want)[0].long().cumprod(0).sum().item()
    if same < want.shape[1]:
        first, second = floats[same - 1].topk(2).values
        assert first - second < measured(model, want[:, :same], 8), f"they part at token {same}"


def measured(model: Any, ids: Any, bits: int) -> float:
    """How far the format's error moves log-probabilities: twice that of the model with decoded numbers."""
    with torch.inference_mode():
        exact = step_by_step(model, ids, transformers.DynamicCache(config=model.config), 20).log_softmax(-1)
        rounded = step_by_step(model, ids, Rounded(model.config, bits), 20).log_softmax(-1)
    return 2 * float((exact - rounded).abs().max())


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_as_far_from_the_float_caches_as_the_formats_error_takes_them(
    model: Any, prompt: Any, bits: int
) -> None:
    exact = step_by_step(model, prompt, transformers.DynamicCache(config=model.config))
    format_alone = (step_by_step(model, prompt, Rounded(model.config, bits)) - exact).abs().max()
    for attention in ("sdpa", "tenpak"):
        model.set_attn_implementation(attention)
        off = (step_by_step(model, prompt, tt.QuantizedCache(model.config, bits=bits)) - exact).abs().max()
        assert 0 < off <= format_alone * 1.05, f"{attention}: {off} of {format_alone}"


def test_memory_is_what_the_format_says(model: Any, prompt: Any) -> None:
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    sizes = {}
    for bits in (4, 8):
        cache = tt.QuantizedCache(config, bits=bits)
        step_by_step(model, prompt[:, :64], cache, 1)
        blocks = -(-dim * bits // 32) * 4 * 32 * 2 + dim * 4 + 32 * -(-dim // 32) * 4
        layer = heads * (2 * blocks + 2 * 32 * dim * 2) + 4 * (2 + 1)
        assert cache.nbytes == len(cache.layers) * layer
        sizes[bits] = cache.nbytes
    plain = transformers.DynamicCache(config=config)
    step_by_step(model, prompt[:, :64], plain, 1)
    assert sizes[4] < sizes[8] < sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)


def tokens_of(layer: QuantizedCacheLayer) -> Any:
    return torch.stack(layer.recall())


def layer_of(lengths: tuple[int, ...] = (70,), bits: int = 4, sequences: int = 3) -> QuantizedCacheLayer:
    torch.manual_seed(1)
    layer = QuantizedCacheLayer(None, bits)
    for length in lengths:
        layer.update(torch.randn(sequences, 2, length, 64), torch.randn(sequences, 2, length, 64))
    return layer


@pytest.mark.parametrize("left", [69, 64, 63, 40, 32, 5, 0])
def test_what_is_cropped_is_gone_and_the_rest_stays(left: int) -> None:
    layer = layer_of((40, 30))
    before = tokens_of(layer)
    layer.crop(left - 70)
    assert layer.get_seq_length() == left and layer.get_mask_sizes(3) == (left + 3, 0)
    after = tokens_of(layer)
    # Tokens that go back to a tail are rounded to halves.
    whole = left // 32 * 32
    assert torch.equal(after[..., :whole, :], before[..., :whole, :])
    torch.testing.assert_close(after, before[..., :left, :], rtol=2.0**-11, atol=2.0**-24)
    more = torch.randn(2, 3, 2, 50, 64)
    layer.update(*more)
    torch.testing.assert_close(tokens_of(layer)[..., left:, :], more, rtol=0.2, atol=0.4)
    torch.testing.assert_close(tokens_of(layer)[..., :whole, :], before[..., :whole, :], rtol=0, atol=0)


def test_sequences_are_chosen_without_moving_blocks_and_go_their_own_ways() -> None:
    layer = layer_of()
    before, codes = tokens_of(layer), layer.cache.key_codes
    for choose, indices in (
        (lambda: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda: layer.batch_repeat_interleave(2), [2, 2, 2, 2, 0, 0]),
        (lambda: layer.batch_select_indices(torch.tensor([4, 1, 0, 5])), [0, 2, 2, 0]),
        (lambda: layer.batch_select_indices(torch.tensor([True, True, False, False])), [0, 2]),
    ):
        choose()
        assert layer.cache.key_codes is codes
        assert layer.batch_size == len(indices)
        assert torch.equal(tokens_of(layer), before[:, indices])
    # Two of the same: what they get afterwards is their own, also where a block is written again.
    twice = layer_of()
    twice.reorder_cache(torch.tensor([1, 1, 1]))
    for _ in range(2):
        fresh = torch.randn(2, 3, 2, 33, 64)
        twice.update(*fresh)
        found = tokens_of(twice)
        assert torch.equal(found[:, :, :, :64], before[:, [1, 1, 1], :, :64])
        torch.testing.assert_close(found[..., 70:, :], fresh, rtol=0.2, atol=0.4)
        twice.crop(-33)


def test_beams_and_batches_are_those_of_the_float_cache(model: Any, prompt: Any) -> None:
    ids = torch.cat([prompt[:, :40], prompt[:, 7:47]])
    ids[1, :9] = 0
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :9] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        for beams in (1, 3):
            rounded = model.generate(ids, num_beams=beams, past_key_values=tt.QuantizedCache(model.config), **options)
            model.set_attn_implementation("tenpak")
            on_codes = model.generate(ids, num_beams=beams, past_key_values=tt.QuantizedCache(model.config), **options)
            model.set_attn_implementation("sdpa")
            assert torch.equal(on_codes, rounded), f"{beams} beams"


def test_a_prompt_in_pieces_and_a_cache_that_is_used_again(model: Any, prompt: Any) -> None:
    for attention in ("sdpa", "tenpak"):
        model.set_attn_implementation(attention)
        cache = tt.QuantizedCache(model.config)
        with torch.inference_mode():
            for _ in range(2):
                whole = model(prompt).logits
                parts = [model(part, past_key_values=cache).logits for part in prompt.split([40, 20, 10], 1)]
                assert (torch.cat(parts, 1) - whole).abs().max() < 0.05 * whole.abs().max()
                cache.reset()
                assert cache.get_seq_length() == 0 and cache.nbytes == 0
    # Any other cache, or none, goes with the same attention.
    with torch.inference_mode():
        assert torch.equal(
            model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)[0, :70], prompt[0]
        )
        plain = step_by_step(model, prompt, transformers.DynamicCache(config=model.config))
        model.set_attn_implementation("sdpa")
        assert torch.equal(plain, step_by_step(model, prompt, transformers.DynamicCache(config=model.config)))


def test_layers_that_do_not_see_all_tokens_stay_what_transformers_makes_of_them(loaded: Any) -> None:
    config = copy.deepcopy(loaded.config)
    config.sliding_window = 16
    kinds = ["sliding_attention" if i % 2 else "full_attention" for i in range(config.num_hidden_layers)]
    config.layer_types = kinds
    for layer, kind in zip(tt.QuantizedCache(config).layers, kinds, strict=True):
        assert isinstance(layer, QuantizedCacheLayer) == (kind == "full_attention")


def test_what_a_cache_cannot_hold_is_refused_by_name(loaded: Any) -> None:
    with pytest.raises(tenpak.InvalidError, match="5 bits, expected 4 or 8"):
        tt.QuantizedCache(loaded.config, bits=5)
    layer = QuantizedCacheLayer(None)
    with pytest.raises(tenpak.UnsupportedError, match="keys of 64 channels and values of 32"):
        layer.update(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 32))
    with pytest.raises(tenpak.InvalidError, match="expected a negative number"):
        layer_of().crop(5)
    with pytest.raises(tenpak.InvalidError, match="keep this cache"):
        QuantizedCacheLayer(None).update(torch.full((1, 1, 1, 64), 1e6), torch.zeros(1, 1, 1, 64))
    with pytest.raises(AttributeError, match="no attribute 'Quantized'"):
        _ = tt.Quantized
