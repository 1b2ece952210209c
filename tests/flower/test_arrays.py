from __future__ import annotations

import numpy as np
import pytest

from fedtune.flower.arrays import from_record, payload_bytes, to_record


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_arrays_come_back_in_every_type_and_shape(dtype: type, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)
    found = from_record(to_record({"x": array}))["x"]
    assert (found.dtype, found.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(found, array)


def test_the_layout_in_memory_does_not_change_what_is_sent() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for same in (np.asfortranarray(array), array[::1], array.astype(">f4"), np.repeat(array, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(from_record(to_record({"x": same}))["x"], array)
        assert to_record({"x": same})["x"].data == array.tobytes()


def test_special_numbers_keep_their_bits() -> None:
    array = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32)
    assert from_record(to_record({"x": array}))["x"].tobytes() == array.tobytes()


def test_what_was_received_cannot_be_written_to() -> None:
    found = from_record(to_record({"x": np.zeros(3, np.float32)}))["x"]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_the_payload_is_the_bytes_of_the_numbers() -> None:
    assert payload_bytes(to_record({"x": np.zeros((2, 3), np.float32), "y": np.zeros(5, np.int64)})) == 24 + 40
