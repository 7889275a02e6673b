"""That the interpreter is on, and that what makes it faster changes nothing."""

import numpy as np
import triton
from fast_interpreter import CONVERT, halves

import bae_fast as bf
from bae_fast.kernels import launch
from bae_fast.ops.nvidia import interpreted


def test_a_faster_conversion_is_that_of_the_interpreter():
    """For every number of bfloat16, subnormal ones together and apart, and every float32 so far
    from the next."""
    single, half = triton.language.float32, triton.language.bfloat16
    every = np.arange(2**16, dtype=np.uint16)
    tiny = (every & 0x7F80) == 0
    wide = (every.astype(np.uint32) << 16) + (np.arange(2**16, dtype=np.uint32) * 40503 & 0xFFFF)
    for part in (every, every[~tiny], every[tiny], every[:1], every[::2]):
        expected = CONVERT(part, half, single, None)
        np.testing.assert_array_equal(halves(part, half, single, None), expected)
    for part in (wide, wide[~tiny], wide[tiny], wide[:1], wide[::2]):
        numbers = part.view(np.float32)
        expected = CONVERT(numbers, single, half, None)
        np.testing.assert_array_equal(halves(numbers, single, half, None), expected)


def test_the_interpreter_is_on():
    assert interpreted()
    assert launch.INTERPRETED
    assert bf.info()["backends"]["triton"] == "available"
