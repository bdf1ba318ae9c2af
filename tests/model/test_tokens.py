"""TokenBatch: ragged tokens to and from numpy and Arrow, and their size."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import TokenBatch
from model.tokens import id_type

ragged_ids = st.lists(st.lists(st.integers(0, 999), max_size=9), max_size=6)


@given(ragged_ids)
def test_ids_round_trip_through_numpy_and_arrow(images):
    arrays = [np.array(image, dtype=np.int64) for image in images]
    batch = TokenBatch.from_numpy(arrays, 1000)
    assert batch.values.dtype == np.uint16
    assert batch.num_tokens.tolist() == [len(image) for image in images] and len(batch) == len(images)
    for number, (image, found) in enumerate(zip(images, batch.to_numpy(), strict=True)):
        assert found.tolist() == image == batch[number].tolist()
    column = batch.to_arrow()
    assert column.to_pylist() == images
    again = TokenBatch.from_arrow(column, 1000)
    assert again.values.dtype == batch.values.dtype
    assert [x.tolist() for x in again] == images
    sliced = TokenBatch.from_arrow(column.slice(1), 1000)
    assert [x.tolist() for x in sliced] == images[1:]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_round_trip(dtype):
    images = [np.arange(6, dtype=dtype).reshape(2, 3), np.zeros((0, 3), dtype), np.ones((1, 3), dtype)]
    batch = TokenBatch.from_numpy(images, None)
    assert batch.values.dtype == dtype
    assert batch.bits.tolist() == [n * 3 * 8 * np.dtype(dtype).itemsize for n in (2, 0, 1)]
    again = TokenBatch.from_arrow(batch.to_arrow(), None, latent_dim=3)
    assert again.values.dtype == dtype
    for one, other in zip(images, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert batch.half().values.dtype == np.float16


@pytest.mark.parametrize(
    ("size", "bits", "dtype"), [(2, 1, "u1"), (256, 8, "u1"), (257, 9, "u2"), (4096, 12, "u2"), (70000, 17, "u4")]
)
def test_bits_and_types(size, bits, dtype):
    assert id_type(size) == np.dtype(dtype)
    batch = TokenBatch.from_numpy([np.array([0, size - 1]), np.array([1])], size)
    assert batch.bits.tolist() == [2 * bits, bits]
    assert int(batch.values[1]) == size - 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="token ids -1 to 3"):
        TokenBatch.from_numpy([np.array([-1, 3])], 8)
    with pytest.raises(ValueError, match="token ids 0 to 8: allowed is 0 to 7"):
        TokenBatch.from_numpy([np.array([0, 8])], 8)
    with pytest.raises(ValueError, match="sums to 2"):
        TokenBatch(np.zeros(3, np.uint8), np.array([2]), 8)
    with pytest.raises(ValueError, match="300"):
        TokenBatch.from_arrow(pa.array([[300]]), 256)
    with pytest.raises(ValueError, match="null"):
        TokenBatch.from_arrow(pa.array([[1], None]), 256)
    with pytest.raises(ValueError, match="latent_dim = 3"):
        TokenBatch.from_arrow(pa.array([[1.0, 2.0]]), None, latent_dim=3)


def test_empty():
    for size in (16, None):
        batch = TokenBatch.from_numpy([], size)
        assert len(batch) == 0 and list(batch) == [] and batch.bits.tolist() == []
