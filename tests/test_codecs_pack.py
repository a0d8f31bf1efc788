"""Packing of low-bit codes: the documented layout, byte for byte, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from slimjax.cache.pack import pack, packed_size, unpack

WIDTHS = (1, 2, 3, 4, 8)


def bytes_by_the_layout(codes: list[int], bits: int) -> list[int]:
    """The documented layout of one row of codes, a byte at a time."""
    if bits == 3:
        return bytes_by_the_layout([c % 4 for c in codes], 2) + bytes_by_the_layout(
            [c // 4 for c in codes], 1
        )
    parts = 8 // bits
    size = len(codes) // parts
    return [sum(codes[j + part * size] * 2 ** (bits * part) for part in range(parts)) for j in range(size)]


def random_codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_those_of_the_layout(bits):
    codes = random_codes((24,), bits)
    packed = pack(jnp.asarray(codes), bits, 0)
    assert packed.dtype == jnp.uint8
    assert packed.tolist() == bytes_by_the_layout(codes.tolist(), bits)


def test_a_four_bit_byte_holds_a_code_of_each_half():
    assert pack(jnp.arange(8, dtype=jnp.uint8), 4, 0).tolist() == [0x40, 0x51, 0x62, 0x73]


@pytest.mark.parametrize("axis", [0, 2, -1, -2])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_axis_is_packed_by_itself(bits, axis):
    shape = [3, 5, 2]
    shape[axis] = 16
    codes = random_codes(tuple(shape), bits)
    packed = jax.jit(pack, static_argnums=(1, 2))(jnp.asarray(codes), bits, axis)
    expected = np.apply_along_axis(lambda row: np.array(bytes_by_the_layout(row.tolist(), bits)), axis, codes)
    np.testing.assert_array_equal(packed, expected)
    restored = unpack(packed, bits, axis)
    assert restored.dtype == jnp.uint8
    np.testing.assert_array_equal(restored, codes)


@settings(max_examples=20)
@given(st.data(), st.sampled_from(WIDTHS), st.sampled_from([8, 24]), st.sampled_from([0, -1]))
def test_any_codes_come_back(data, bits, count, axis):
    shape = (count, 2) if axis == 0 else (2, count)
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=2 * count, max_size=2 * count))
    codes = np.array(values, np.uint8).reshape(shape)
    packed = pack(jnp.asarray(codes), bits, axis)
    assert packed.size == 2 * packed_size(count, bits) == 2 * count * bits // 8
    np.testing.assert_array_equal(unpack(packed, bits, axis), codes)


@pytest.mark.parametrize(("bits", "count"), [(1, 12), (2, 6), (3, 12), (4, 7)])
def test_codes_that_do_not_fill_bytes_are_refused(bits, count):
    with pytest.raises(ValueError, match=rf"{count} codes of {bits} bits do not fill whole bytes"):
        pack(jnp.zeros((2, count), jnp.uint8), bits, -1)


def test_three_bit_codes_need_a_multiple_of_three_bytes():
    with pytest.raises(ValueError, match="4 bytes along axis 0 cannot hold 3-bit codes"):
        unpack(jnp.zeros(4, jnp.uint8), 3, 0)


@pytest.mark.parametrize("bits", [0, 5, 16])
def test_other_widths_are_refused(bits):
    codes = jnp.zeros(16, jnp.uint8)
    for operation in (pack, unpack):
        with pytest.raises(ValueError, match=f"bits, not bits={bits}"):
            operation(codes, bits, 0)
