"""Packing by hand, and scales by hand, against what the encoder stores."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import tenpak
from hypothesis import given
from tenpak import planes

#: Those whose parameters `tenpak.planes` finds.
LEVELS = ("unsigned", "signed", "zero point")
CODECS = {c["id"]: c for c in tenpak.codecs() if c["bits"]}


@pytest.fixture
def weights(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    out = rng.standard_normal((40, 128)).astype(np.float32)
    out[3, :64] = 0.25
    out[4] = 0
    out[5, 64:] = -0.5
    return out


@given(st.data(), st.integers(1, 8))
def test_unpacking_inverts_packing_at_every_width(data: st.DataObject, bits: int) -> None:
    shape = data.draw(arrays.array_shapes(max_dims=3, min_side=0, max_side=40))
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    words = planes.pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (*shape[:-1], -(-shape[-1] * bits // 32))
    assert np.array_equal(planes.unpack(words, bits, shape[-1]), codes)
    for index in np.ndindex(shape[:-1]):
        want = sum(int(q) << (bits * i) for i, q in enumerate(codes[index]))
        assert int.from_bytes(words[index].tobytes(), "little") == want


@pytest.mark.parametrize("codec", CODECS)
def test_packed_codes_are_those_of_the_encoder(codec: str, rng: np.random.Generator) -> None:
    encoded = tenpak.encode(rng.standard_normal((7, 75)).astype(np.float32), codec)
    bits = CODECS[codec]["bits"]
    # Of codes of 5 and 6 bits the high ones have a plane of their own.
    widths = {"codes": 4, "high_codes": bits - 4} if 4 < bits < 8 else {"codes": bits}
    for plane, width in widths.items():
        stored = encoded.planes[plane]
        codes = planes.unpack(stored, width, 75)
        assert codes.shape == (7, 75) and np.array_equal(planes.pack(codes, width).view(np.uint8), stored)


@pytest.mark.parametrize("codec", [c for c, a in CODECS.items() if a["levels"] in LEVELS and a["fit"] != "mse search"])
def test_scales_offsets_and_zero_points_are_those_of_the_encoder(codec: str, weights: Any) -> None:
    about = CODECS[codec]
    stored = tenpak.encode(weights, codec).planes
    groups = weights.reshape(40, -1, min(about["group"] or 128, weights.shape[1]))
    dtype = {"F16": "float16", "F32": "float32"}[about["scale"]]
    if about["levels"] == "unsigned":
        scale, offset = planes.minmax(groups, about["bits"], dtype)
        assert np.array_equal(offset, stored["offsets"])
    elif about["levels"] == "signed":
        scale = planes.absmax(groups, about["bits"], dtype)
    else:
        scale, zero = planes.zero_point(groups, about["bits"], dtype)
        assert np.array_equal(zero, planes.unpack(stored["zero_points"], about["bits"], groups.shape[1]))
    assert scale.dtype == stored["scales"].dtype and np.array_equal(scale, stored["scales"])


def test_torch_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    codes = torch.arange(16)[None]
    assert np.array_equal(planes.unpack(torch.from_numpy(planes.pack(codes, 4).view(np.uint8)), 4, 16), codes.numpy())
    scale, offset = planes.minmax(torch.tensor([[-1.0, 14.0]], dtype=torch.bfloat16, requires_grad=True))
    assert (scale[0], offset[0]) == (1, -1)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(tenpak.InvalidError, match="from 0 to 16, expected 0 to 15"):
        planes.pack(np.array([0, 16]), 4)
    with pytest.raises(tenpak.InvalidError, match="from -1 to"):
        planes.pack(np.array([-1]), 4)
    with pytest.raises(tenpak.InvalidError, match="float64"):
        planes.pack(np.array([1.0]), 4)
    with pytest.raises(tenpak.InvalidError, match="1 to 8"):
        planes.pack(np.array([1]), 9)
    with pytest.raises(tenpak.InvalidError, match="4 bytes for 9 codes of 4 bits, expected at least 5"):
        planes.unpack(np.zeros(1, np.uint32), 4, 9)
    with pytest.raises(tenpak.InvalidError, match="cannot be stored as float16"):
        planes.minmax(np.array([0, 1e9]))
    with pytest.raises(tenpak.InvalidError, match="offset.*float16"):
        planes.minmax(np.array([1e-9, 1e-9]))
    with pytest.raises(tenpak.InvalidError, match="finite"):
        planes.absmax(np.array([np.nan]))
    with pytest.raises(tenpak.InvalidError, match="4 or 8"):
        planes.absmax(np.ones(4), 3)
    with pytest.raises(tenpak.InvalidError, match="not float64"):
        planes.zero_point(np.ones(4), dtype="float64")


def test_the_module_s_example_holds() -> None:
    words = planes.pack(np.array([[1, 2, 15]]), bits=4)
    assert words.tolist() == [[3873]] and planes.unpack(words, bits=4, cols=3).tolist() == [[1, 2, 15]]
