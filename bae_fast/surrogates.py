"""Names and parameters of the surrogate gradients of the step.

The step B = [pre > 0] has derivative zero almost everywhere; training passes a surrogate
instead. With g the sum of all gradients that reach the bits in one backward call:

==============  ==========================================  ====================================
name            gradient at pre                             width
==============  ==========================================  ====================================
``identity``    g                                           none
``official``    g (1 - g)                                   none; parity with the released
                                                            program only, not linear in g
``sigmoid``     4 g s (1 - s), s = sigmoid(pre / T)         T > 0, default 0.5
``rectangle``   g where abs(pre) < w, else 0                w > 0, default 0.25
==============  ==========================================  ====================================
"""

from __future__ import annotations

import sys

_LARGEST = sys.float_info.max

DEFAULT_WIDTH: dict[str, float] = {
    "identity": 0.0,
    "official": 0.0,
    "sigmoid": 0.5,
    "rectangle": 0.25,
}
SURROGATES = tuple(DEFAULT_WIDTH)


def resolve_surrogate(surrogate: str, width: float | None) -> tuple[str, float]:
    """Check a surrogate's name and width; fill in the default width.

    Returns:
        (name, width); width is 0.0 for the surrogates that have none.

    Raises:
        ValueError: unknown name, a width where none applies, or one that is not positive.
    """
    if surrogate not in DEFAULT_WIDTH:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}; got {surrogate!r}")
    default = DEFAULT_WIDTH[surrogate]
    if width is None:
        return surrogate, default
    if not default:
        raise ValueError(f"surrogate_width must be None for surrogate {surrogate!r}; got {width!r}")
    # comparisons only: torch.compile cannot trace math.isfinite
    number = isinstance(width, (int, float)) and not isinstance(width, bool)
    if not (number and 0 < width <= _LARGEST):
        raise ValueError(f"surrogate_width must be a positive finite number; got {width!r}")
    return surrogate, float(width)
