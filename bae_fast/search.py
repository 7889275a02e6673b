"""Codes that are searched for, where the encoder gives only the first guess.

An encoder decides each bit alone, from one product. Which bits describe a row best depends on the
others that are on: two features of similar directions both fire where one would do. So the bits of
a row are flipped one at a time, the one that gains most first, until no flip lowers

    mean over dimensions of (x - x_hat)^2  +  bit_price x sum of bits, -log2 of each bit's share

which is the loss of training without its covariance, for one row and with the shares of the bits
held fixed. Ones of features that are on in many rows are cheap so; ``dense_bits`` makes them dearer
where few such features are wanted. The result is a minimum that no flip of a single bit improves
(iterated conditional modes, Besag 1986; the greedy choice is that of matching pursuit, Mallat and
Zhang 1993).

With P = (x - x_hat) D^T, D what each bit adds to x_hat, turning bit j on lowers the squared error
by 2 P_j - |D_j|^2, and a flip of bit i changes P by a row of D D^T: a flip costs K steps, and no
product is made again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bae_fast import functional
from bae_fast.arguments import at_least_0, check_int
from bae_fast.autoencoder import register_architecture
from bae_fast.codes import BinaryCode
from bae_fast.functional import BAEOutput, Encoded
from bae_fast.model import ARCHITECTURE as BINARY
from bae_fast.model import BinaryAutoencoder
from bae_fast.normalization import check_rows
from bae_fast.ops import registry
from bae_fast.packing import bit_weights, pack_rows, unpack_rows

ARCHITECTURE = "searched_binary_autoencoder"

# products of all pairs of bits are held: 4 GiB at most in float32, 8 in float64
MAX_SEARCH_COLUMNS = 32768

# numbers of gains held at a time: with more, new pages cost time, with fewer the product
_CHUNK_ELEMENTS = 4 * 2**20

# the share of rows from which on ``dense_bits`` makes ones dearer: so steep a price is met before a
# share of 0.1, where a feature counts as dense
DENSE_FROM = 2.0**-4

# a gain below this share of the largest |D_j|^2 is rounding
_LEAST = 2.0**-20


def flip_bits(
    projection: Tensor,
    gram: Tensor,
    on: Tensor,
    off: Tensor,
    words: Tensor,
    most: int,
    least: float,
) -> tuple[Tensor, Tensor]:
    """Flip bits of rows while that gains, in plain torch, on any device.

    Turning bit j on gains ``projection[:, j] - on[j]``, turning it off ``off[j] - projection[:,
    j]``. The kernels do the same, to the bit.

    Args:
        projection: ``[N, K]``, P of the words as they are.
        gram: ``[K, K]``, D D^T.
        on, off: ``[K]``, what P must exceed, or fall below.
        words: int32 ``[N, ceil(K/32)]``, row-packed.
        most: flips of a row.
        least: what a flip must gain more than.

    Returns:
        (words, flips of each row, int32 ``[N]``).
    """
    columns = projection.shape[1]
    bits = unpack_rows(words, columns, torch.bool)
    direction = torch.where(bits, -1.0, 1.0).to(projection.dtype)
    gain = torch.where(bits, off - projection, projection - on)
    rows = torch.arange(len(words), device=words.device)
    flips = torch.zeros(len(words), dtype=torch.int32, device=words.device)
    for _ in range(most):
        left = torch.where(gain[rows].isnan(), -torch.inf, gain[rows])
        at = left.argmax(1)  # the first of equal ones
        gained = left.gather(1, at[:, None])[:, 0]
        better = gained > least
        rows, at, gained = rows[better], at[better], gained[better]
        if not len(rows):
            break
        flipped = direction[rows, at]
        gain[rows] -= flipped[:, None] * direction[rows] * gram[at]
        gain[rows, at] = -gained  # flipping it back loses what was gained
        direction[rows, at] = -flipped
        flips[rows] += 1
    return pack_rows(direction < 0), flips


def _uncompiled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compiler.disable`` where the compiler is there: at the import it would load it."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Tensor:
        chosen = _disabled(method) if "torch._dynamo" in sys.modules else method
        return chosen(*arguments, **options)

    return call


# not functools.cache, which the compiler looks through, and warns of in every compiled call
_DISABLED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def _disabled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if method not in _DISABLED:
        _DISABLED[method] = torch.compiler.disable(method)
    return _DISABLED[method]


@register_architecture(ARCHITECTURE)
class SearchedAutoencoder(BinaryAutoencoder):
    """A Binary Autoencoder whose codes are searched for, from the encoder's bits on.

    ``encode`` gives searched codes, so everything that takes an autoencoder works on them:
    evaluation, substitution in the language model, compression, names of features. ``forward``
    decodes them too. It is made from a trained module by :meth:`of`, and its decoder is fitted to
    searched codes by :func:`bae_fast.training.fit_search_`.

    Buffer ``density [K]`` is the share of rows in which each bit is on, which prices it.

    Example::

        searched = SearchedAutoencoder.of(bae, rows, bit_price=3e-4)
        fit_search_(searched, rows)
        code = searched.encode(x)
    """

    density: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        bit_price: float = 3e-4,
        dense_bits: float = 0.0,
        max_flips: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Make a module with random weights, and a density of 1/2, which makes bits free.

        Args:
            d_in, d_sae, device, dtype, options: see :class:`bae_fast.BinaryAutoencoder`.
            bit_price: mean squared error, in normalised units, that a bit of code length is worth.
                The ``entropy_weight`` of the module's training is of the same unit.
            dense_bits: bits that a one costs more for each doubling of its bit's share of rows
                beyond 1/16: some 12 leave few features that are on in more than a tenth.
            max_flips: flips of a row after which its search ends.

        Raises:
            ValueError: see :class:`bae_fast.BinaryAutoencoder`; a negative price or
                dense_bits, max_flips below 0, a transcoder, whose target is not known where it
                encodes, or more than 32,768 columns.
        """
        super().__init__(d_in, d_sae, device=device, dtype=dtype, **options)
        columns = self.config.n_bits * d_sae
        if self.is_transcoder:
            raise ValueError(
                "a search needs d_out=None: of a transcoder's target it knows nothing; "
                f"got d_out={self.config.d_out}"
            )
        if columns > MAX_SEARCH_COLUMNS:
            raise ValueError(
                f"a search needs n_bits x d_sae <= {MAX_SEARCH_COLUMNS:,}, as it holds the "
                f"products of all pairs of bits; got {columns:,}"
            )
        self.bit_price = at_least_0("bit_price", bit_price)
        self.dense_bits = at_least_0("dense_bits", dense_bits)
        check_int("max_flips", max_flips, 0)
        self.max_flips = max_flips
        self.register_buffer("density", torch.full((columns,), 0.5, device=device, dtype=dtype))
        self._pairs: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        bae: BinaryAutoencoder,
        rows: Tensor,
        *,
        bit_price: float = 3e-4,
        dense_bits: float = 0.0,
        max_flips: int = 256,
    ) -> SearchedAutoencoder:
        """A trained module that searches, with a copy of its weights, in eval mode.

        Args:
            bae: the module.
            rows: raw rows ``[n, d_in]`` that give the bits' shares, first by the codes of ``bae``,
                then by codes searched with those: held-in ones, 10,000 or more.
            bit_price, dense_bits, max_flips: see :class:`SearchedAutoencoder`.

        Raises:
            TypeError: bae is no Binary Autoencoder, or rows are no tensor of floats.
            ValueError: as for :class:`SearchedAutoencoder`, or rows of another shape.
        """
        if not isinstance(bae, BinaryAutoencoder):
            raise TypeError(f"bae must be a BinaryAutoencoder; got {type(bae).__name__}")
        config = bae.config
        made = cls(
            config.d_in,
            config.d_sae,
            d_out=config.d_out if bae.is_transcoder else None,
            n_bits=config.n_bits,
            preset=config.preset,
            surrogate=config.surrogate,
            surrogate_width=config.surrogate_width or None,
            covariance=config.covariance,
            impl=bae.impl,
            check_finite=bae.check_finite,
            metadata=config.metadata,
            bit_price=bit_price,
            dense_bits=dense_bits,
            max_flips=max_flips,
            device=bae.W_dec.device,
            dtype=bae.W_dec.dtype,
        )
        state = {name: tensor.detach() for name, tensor in bae.state_dict().items()}
        made.load_state_dict({**state, "density": made.density}, strict=True)
        made.eval()
        made.learned = True  # a training of it goes on, see bae_fast.autoencoder.Autoencoder
        made.density.copy_(_shares(bae, rows))
        return made.fit_density_(rows)

    @torch.no_grad()
    def fit_density_(self, rows: Tensor) -> SearchedAutoencoder:
        """Set the bits' shares to those of the searched codes of raw rows ``[n, d_in]``.

        Raises:
            TypeError, ValueError: rows are no tensor of floats ``[n, d_in]``, n >= 1.
        """
        self.density.copy_(_shares(self, rows))
        return self

    # -- codes ---------------------------------------------------------------------------------

    def encode(self, x: Tensor, *, mask: Tensor | None = None) -> BinaryCode:
        """Searched bits of raw x ``[..., d_in]``; no gradient.

        Rows with NaN or Inf keep the encoder's.
        """
        code = super().encode(x, mask=mask)
        words = self._searched(x, code.words, mask)
        return BinaryCode(
            words, code.n_columns, n_bits=code.n_bits, row_mask=code.row_mask, trusted=True
        )

    def encode_rows(self, x: Tensor, *, mask: Tensor | None = None) -> Encoded:
        """See :meth:`bae_fast.BinaryAutoencoder.encode_rows`; the window is the encoder's."""
        found = super().encode_rows(x, mask=mask)
        if not _has_numbers(found.words):
            return found
        words = self._searched(x, found.words, mask).reshape(found.words.shape)
        counts = BinaryCode(words, len(found.counts), trusted=True).counts()
        return found._replace(words=words, counts=counts)

    def forward(self, x: Tensor, **options: Any) -> BAEOutput:
        """Search, decode and measure; see :meth:`bae_fast.BinaryAutoencoder.forward`.

        The gradient at the encoder is the surrogate's, at the searched bits.
        """
        if options.get("encoded") is None:
            options["encoded"] = self.encode_rows(x, mask=options.get("mask"))
        return super().forward(x, **options)

    @property
    def value_name(self) -> str:
        """The margin says which bits the search begins with, and not which it ends with."""
        name = super().value_name
        return f"encoder's {name}" if name == "margin" else name

    @_uncompiled
    @torch.no_grad()
    def _searched(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """Words int32 ``[..., ceil(K/32)]`` of raw x after the search from the given ones."""
        if not _has_numbers(words):
            return words
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        # autocast would round the products, whose differences are the gains
        with torch.autocast(x.device.type, enabled=False):
            W_dec, b_dec = self.W_dec.to(wide), self.b_dec.to(wide)
            gram, added = self._products(W_dec)
            columns = len(gram)
            squares = gram.diagonal()
            price = self.bit_price * self.config.d_out * self.bits_of_ones(wide)
            on, off = (price + squares) / 2, (price - squares) / 2
            rows = self.normalize(x).reshape(-1, self.config.d_in)
            flat = words.reshape(-1, words.shape[-1])
            kept = None if mask is None else mask.reshape(-1)
            search = extras_of(x.device, self.impl).search if wide == torch.float32 else None
            least = _LEAST * float(squares.max())
            done = []
            at_once = max(_CHUNK_ELEMENTS // columns, 1)
            for first in range(0, len(rows), at_once):
                part = slice(first, first + at_once)
                code = BinaryCode(flat[part], columns, n_bits=self.config.n_bits, trusted=True)
                recon = functional.decode(code, W_dec, b_dec, impl=self.impl)
                # Inf would gain without end: as NaN it gains nothing
                finite = torch.where(rows[part].isinf(), torch.nan, rows[part]).to(wide)
                projection = (finite - recon) @ added.T
                if kept is not None:  # rows that do not count have no bits, and nothing gains
                    projection[~kept[part]] = -torch.inf
                flipped, _ = (search or flip_bits)(
                    projection, gram, on, off, flat[part], self.max_flips, least
                )
                done.append(flipped)
            return torch.cat(done).reshape(words.shape)

    def _products(self, W_dec: Tensor) -> tuple[Tensor, Tensor]:
        """(D D^T ``[K, K]``, D ``[K, d]``) of a decoder ``[F, d]``, made again when it changed."""
        known = self._pairs
        # by the numbers: no address and no version tells of every change (that of a fused
        # optimizer, of `.data`, of a parametrization)
        if (
            known is None
            or (known[0].dtype, known[0].device) != (W_dec.dtype, W_dec.device)
            or not torch.equal(known[0], W_dec)
        ):
            self._pairs = known = None  # the old ones go before the new ones are made
            kept, n_bits = W_dec.clone(), self.config.n_bits
            added = kept
            if n_bits > 1:
                weights = bit_weights(n_bits, W_dec.dtype, W_dec.device)
                added = (kept[:, None] * weights[:, None]).flatten(0, 1)
            self._pairs = known = (kept, added @ added.T, added)
        return known[1], known[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without the products, which a copy and a file make anew."""
        return {**self.__dict__, "_pairs": None}

    def bits_of_ones(self, dtype: torch.dtype) -> Tensor:
        """How much longer the code of a one is than that of a zero, in bits, and what
        ``dense_bits`` adds, in each column: ``[K]``."""
        # a share of 0 or 1 is that of 65,536 rows without an exception, not of endless ones
        share = self.density.to(torch.float64).clamp(2.0**-17, 1 - 2.0**-17)
        dense = (share / DENSE_FROM).log2().clamp_min(0)
        return (((1 - share) / share).log2() + self.dense_bits * dense).to(dtype)

    # -- files ---------------------------------------------------------------------------------

    def config_values(self) -> dict[str, Any]:
        """The content of ``cfg.json``."""
        return {
            **super().config_values(),
            "architecture": ARCHITECTURE,
            "bit_price": self.bit_price,
            "dense_bits": self.dense_bits,
            "max_flips": self.max_flips,
        }

    @classmethod
    def from_config(
        cls, values: dict[str, Any], source: str, *, impl: str = "auto", **options: Any
    ) -> SearchedAutoencoder:
        """A module on the meta device from the content of ``cfg.json``.

        Raises:
            ValueError: see :meth:`bae_fast.BAEConfig.from_dict` and :class:`SearchedAutoencoder`.
        """
        if values.get("architecture") == BINARY:
            raise ValueError(
                f"{source} must have architecture {ARCHITECTURE!r}; got {BINARY!r}: "
                "SearchedAutoencoder.of makes a module that searches of one that does not"
            )
        for name in ("bit_price", "max_flips"):
            if name not in values:
                raise ValueError(f"{source} lacks {name!r}")
            options.setdefault(name, values[name])
        # files of before have none
        options.setdefault("dense_bits", values.get("dense_bits", 0.0))
        values = {**values, "architecture": BINARY}
        made = super().from_config(values, source, impl=impl, **options)
        assert isinstance(made, SearchedAutoencoder)
        return made

    def extra_repr(self) -> str:
        prices = f"bit_price={self.bit_price:g}, dense_bits={self.dense_bits:g}"
        return f"{super().extra_repr()}, {prices}, max_flips={self.max_flips}"


def _shares(bae: BinaryAutoencoder, rows: Tensor) -> Tensor:
    """The share of raw rows ``[n, d_in]`` in which each bit is on, never 0 or 1: float64 ``[K]``.

    (ones + 1/2) / (n + 1) (Krichevsky and Trofimov 1981), as the coders of codes estimate it.
    """
    check_rows("rows", rows, bae.d_in)
    counts = sum(bae.encode(block).counts() for block in bae.blocks(rows, dense=False))
    assert isinstance(counts, Tensor)
    return (counts.double() + 0.5) / (len(rows) + 1)


def _has_numbers(words: Tensor) -> bool:
    """Whether a tensor is more than its shape: neither on the meta device nor a fake tensor.

    Raises:
        RuntimeError: torch.export asks, whose programs would be without the search.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "a search cannot be exported, as its flips depend on the numbers; a BinaryAutoencoder "
            "can, whose codes are the encoder's"
        )
    # the compiler's tensors are fake, and the search runs between its graphs
    return torch.compiler.is_compiling() or not (words.is_meta or hasattr(words, "fake_device"))


def extras_of(device: torch.device, impl: str) -> registry.Extras:
    """What ``impl`` serves beyond the contract on a device; nothing where no backend does."""
    try:
        return registry.extras(impl, device.type)
    except registry.BackendUnavailableError:
        return registry.Extras()
