"""The methods of ``compare``: Binary Autoencoder, registered baselines, and what a user adds.

A baseline that :func:`~bae_fast.baselines.register_method` names is found without a word here. Any
other :class:`~bae_fast.autoencoder.Autoencoder` that can be trained joins by :func:`register`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import METHODS, TRAINING, make_baseline
from bae_fast.model import BinaryAutoencoder
from bae_fast.training import PRESETS, LoopConfig


class Maker(Protocol):
    """Makes an untrained autoencoder; its random weights are drawn by torch's global generator."""

    def __call__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None,
        d_out: int | None,
        metadata: dict[str, Any],
        device: Any,
    ) -> Autoencoder:
        """Make one.

        Args:
            d_in, d_sae: the width of the rows and the number of features.
            k: the number of features that are on in a row; None where the method takes no k.
            d_out: the width of the target where that is another than the rows; else None.
            metadata: what ``cfg.json`` keeps of the data.
            device: where the parameters lie.
        """


class Method(NamedTuple):
    """One method of the comparison.

    Attributes:
        make: makes an untrained autoencoder.
        training: the constants of its training; steps, rows a step, seed and precision are the
            comparison's.
        takes_k: whether it is trained once for each k.
        own_lr: whether its learning rate stays when the comparison sets one.
    """

    make: Maker
    training: LoopConfig
    takes_k: bool
    own_lr: bool


def _binary(preset: str) -> Method:
    def make(
        d_in: int, d_sae: int, *, k: int | None, d_out: int | None, **options: Any
    ) -> Autoencoder:
        return BinaryAutoencoder(d_in, d_sae, preset=preset, **options)

    return Method(make, PRESETS[preset], takes_k=False, own_lr=True)


# the methods that are no baselines, by name; register adds to them
NAMED: dict[str, Method] = {"bae": _binary("sparse"), "bae_paper": _binary("paper")}


def names() -> tuple[str, ...]:
    """The names of all methods: the Binary Autoencoder's presets first."""
    return (*NAMED, *METHODS)


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        KeyError: there is none; :func:`names` lists them.
    """
    if name in NAMED:
        return NAMED[name]
    if name not in METHODS:
        raise KeyError(name)
    make: Any = functools.partial(make_baseline, name)
    return Method(make, TRAINING, takes_k=True, own_lr=False)


def register(
    name: str, *, training: LoopConfig = TRAINING, takes_k: bool = False
) -> Callable[[Maker], Maker]:
    """A decorator that gives ``compare`` a further method, by the function that makes it.

    Args:
        name: what stands in ``Config.methods`` and in the table.
        training: the constants of its training, those of the baselines unless told otherwise.
        takes_k: True trains it once for each k of the comparison.

    Raises:
        ValueError: the name belongs to another method.
    """

    def add(make: Maker) -> Maker:
        if name in names():
            raise ValueError(f"name must be a new method's; got {name!r}, which is taken")
        NAMED[name] = Method(make, training, takes_k, own_lr=False)
        return make

    return add
