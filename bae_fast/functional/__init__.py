"""The layer as functions: one autograd Function over the packed operators.

Kept between forward and backward: x and the parameters themselves, the packed bits, the packed
window of the ``rectangle`` surrogate, the counts, and the sign planes of the covariance (or lists
of the ones of sparse codes, or nothing: then backward counts the pairs again). Under autocast GPU
backends keep a half-precision copy of W_dec as well.

``layer`` has the functions, ``outputs`` what they give, ``checks`` looks at their arguments, and
``autograd`` has the Function, and a small one that decodes fixed bits. ``error`` has the squared
error of a reconstruction.
"""

from bae_fast.functional.error import squared_error
from bae_fast.functional.layer import (
    binary_autoencoder,
    compute_dtype,
    decode,
    encode,
    encode_rows,
)
from bae_fast.functional.outputs import BAEOutput, Encoded

__all__ = [
    "BAEOutput",
    "Encoded",
    "binary_autoencoder",
    "compute_dtype",
    "decode",
    "encode",
    "encode_rows",
    "squared_error",
]
