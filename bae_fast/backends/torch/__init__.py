"""``impl="torch"``: packed and chunked PyTorch, for any device; runs when nothing is compiled.

No N x F float and no F x F number is ever whole in memory: features are taken in chunks, the
covariance in square tiles. One file per operator, each with its mathematics at the top.
"""

from collections.abc import Callable
from typing import Any

from bae_fast.backends.torch.covariance import covariance
from bae_fast.backends.torch.decode import decode, decoder_backward
from bae_fast.backends.torch.encode import encode
from bae_fast.backends.torch.encoder_backward import covariance_columns, encoder_backward
from bae_fast.ops import registry, schemas
from bae_fast.ops.products import raw
from bae_fast.ops.terms import slopes, terms

_BODIES: dict[str, Callable[..., Any]] = {
    "encode": encode,
    "decode": decode,
    "covariance": covariance,
    "terms": terms,
    "slopes": slopes,
    "decoder_backward": decoder_backward,
    "encoder_backward": encoder_backward,
}

schemas.define("torch")
schemas.implement(
    "torch", {name: raw(body) for name, body in _BODIES.items()}, "CompositeExplicitAutograd"
)

BACKEND = registry.register(
    registry.Backend(
        name="torch",
        ops=schemas.overloads("torch"),
        extras=registry.Extras(covariance_columns=covariance_columns),
    )
)
