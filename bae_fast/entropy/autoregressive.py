"""A bound of a code's entropy that sees dependence of any order: a learned model of all columns.

For any distribution q, H(b) <= E[-log2 q(b)]. Here q is a product over columns in the order of the
tree, parents first, each given all before it:

    logit q(b_j = 1 | b_1 .. b_{j-1}) = a_j + sum_{i<j} W_ji b_i + sum_h V_jh relu(u_h . b + c_h),

a logistic regression on the columns before, and hidden units each of which reads the columns up to
a place of its own and serves those behind it (the masks of Germain et al. 2015). It starts as the
tree, whose conditional probabilities the linear part holds exactly, and so is not worse than the
tree but for chance. One of g exclusive bits is exact in the linear part.

Three sets of documents: one is fitted to, one says when to stop, and the bits are those of the
third. So the bound holds whatever was learned, up to the sampling of the third set, which the
interval over its documents says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from bae_fast.codes import BinaryCode
from bae_fast.pairs import counts_with_parents, mutual_information_, pair_counts, spanning_tree
from bae_fast.spacing import even_numbers

# the linear part is one square matrix, with its gradient and two moments 1 GiB at this width
MAX_COLUMNS = 8192

# rows that can be told into the three sets
LEAST_ROWS = 64

# rows of a block where no documents are given, and the least number of blocks
_BLOCK_ROWS, _LEAST_BLOCKS = 256, 32

# of every eight documents two are charged and one says when to stop
_CHARGED, _STOPS = (3, 7), (5,)

# Adam's constants and the schedule; hidden units a column, and at most
_STEPS, _BATCH, _LR, _DECAY = 600, 256, 1e-2, 1e-2
_LOOK_EVERY, _PATIENCE, _LOOK_ROWS = 25, 8, 8192
_HIDDEN_EACH, _HIDDEN_MOST = 2, 512

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class AutoregressiveBound:
    """Cross-entropy of rows that nothing was fitted to, in bits a row.

    Attributes:
        bits: held-out cross-entropy under the model, in bits a row.
        low, high: 95 % interval of ``bits``, by drawing documents with replacement.
        tree_bits: the same under the tree that the model started as, on the same rows.
        n_fitted, n_rows, n_documents: rows fitted to; rows and documents that were charged.
        steps: optimizer steps until the model that was taken; 0 if it is the tree.
    """

    bits: float
    low: float
    high: float
    tree_bits: float
    n_fitted: int
    n_rows: int
    n_documents: int
    steps: int


class _Model(torch.nn.Module):
    """Logits of every column given those before it; columns are in their order."""

    lower: Tensor
    reads: Tensor

    def __init__(self, bias: Tensor, linear: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        k = len(bias)
        n_hidden = min(_HIDDEN_EACH * k, _HIDDEN_MOST)
        # the last column that a hidden unit reads, evenly over all but the last
        last = torch.arange(n_hidden) * max(k - 1, 1) // n_hidden
        self.register_buffer("reads", torch.arange(k) <= last[:, None])
        self.tree_bias, self.tree_linear = bias, linear
        draw = torch.randn(n_hidden, k, generator=generator, dtype=torch.float32)
        # a unit's input has unit variance for fair bits near it, whatever it could read
        self.u = torch.nn.Parameter(draw / math.sqrt(min(k, 16)))
        self.c = torch.nn.Parameter(draw.new_zeros(n_hidden))
        self.v = torch.nn.Parameter(draw.new_zeros(k, n_hidden))
        # beyond the tree
        self.bias = torch.nn.Parameter(draw.new_zeros(k))
        self.linear = torch.nn.Parameter(draw.new_zeros(k, k))

    def forward(self, bits: Tensor) -> Tensor:
        """Float bits ``[n, k]`` to logits ``[n, k]``."""
        hidden = torch.relu(bits @ (self.u * self.reads).T + self.c)
        serves = ~self.reads.T
        linear = self.tree_linear + self.linear.tril(-1)
        return self.tree_bias + self.bias + bits @ linear.T + hidden @ (self.v * serves).T


def autoregressive_bound(
    code: BinaryCode, *, documents: Tensor | None = None, seed: int = 0
) -> AutoregressiveBound:
    """Fit the model to some documents and charge others.

    Args:
        code: ``[..., K]``, at least 64 rows, without a row mask.
        documents: int64 ``[N]``, the document each row is of; neighbouring rows are alike, so
            documents are fitted to or charged as a whole. Without it blocks of 256 rows, or N / 32
            where that is fewer.
        seed: the seed of the hidden units' weights, the batches and the interval.

    Raises:
        ValueError: a row mask, fewer than 64 rows, documents of another length or fewer than 8 of
            them, or more than 8,192 columns that vary.
    """
    if code.row_mask is not None:
        raise ValueError("code must have no row_mask: index the kept rows first")
    n = code.words.shape[:-1].numel()
    if n < LEAST_ROWS:
        raise ValueError(f"code must have at least {LEAST_ROWS} rows for the bound; got {n}")
    with torch.device("cpu"):  # all is computed on the host, whatever torch's default device is
        return _bound(code.flatten().to("cpu"), documents, seed)


def _bound(rows: BinaryCode, documents: Tensor | None, seed: int) -> AutoregressiveBound:
    n = len(rows)
    if documents is None:
        documents = torch.arange(n) // max(min(_BLOCK_ROWS, n // _LEAST_BLOCKS), 1)
    if documents.shape != (n,):
        raise ValueError(f"documents must have shape [{n}]; got {list(documents.shape)}")
    documents = documents.to("cpu").unique(return_inverse=True)[1]
    if int(documents.max()) < 7:
        raise ValueError(f"documents must be at least 8; got {int(documents.max()) + 1}")
    part = documents % 8
    charged = torch.isin(part, torch.tensor(_CHARGED))
    stops = torch.isin(part, torch.tensor(_STOPS))
    fit = rows[~charged & ~stops]
    generator = torch.Generator().manual_seed(seed)
    counts = fit.counts()
    columns = ((counts > 0) & (counts < len(fit))).nonzero().flatten()
    if len(columns) > MAX_COLUMNS:
        raise ValueError(
            f"code must have at most {MAX_COLUMNS} columns that vary for the bound, as its linear "
            f"part is one matrix; got {len(columns)}"
        )
    held = rows[charged]
    # columns that the fitted rows show constant, by a probability that is never 0
    bits = torch.zeros(len(held), dtype=torch.float64)
    fixed = torch.ones(rows.n_columns, dtype=torch.bool).index_fill_(0, columns, False)
    p = (counts[fixed].double() + 0.5) / (len(fit) + 1)
    for at, block in _blocks(held):
        own = block[:, fixed].double()
        bits[at] -= own @ p.log2() + (1 - own) @ (1 - p).log2()
    tree, steps = bits.clone(), 0
    if len(columns):
        order, bias, linear = _tree(fit, columns)
        model = _Model(bias, linear, generator)
        with torch.no_grad():
            tree += _length(model, held, order)
        steps = _fit(model, fit, rows[stops], order, generator)
        with torch.no_grad():
            bits += _length(model, held, order)
    low, high = _interval(bits, documents[charged], generator)
    return AutoregressiveBound(
        bits=float(bits.mean()),
        low=low,
        high=high,
        tree_bits=float(tree.mean()),
        n_fitted=len(fit),
        n_rows=len(held),
        n_documents=len(documents[charged].unique()),
        steps=steps,
    )


def _blocks(code: BinaryCode, rows: int = 1024) -> Iterator[tuple[slice, Tensor]]:
    """Dense bits of blocks of rows."""
    for start in range(0, len(code), rows):
        yield slice(start, start + rows), code[start : start + rows].to_dense()


def _tree(fit: BinaryCode, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns in the order of the tree, and its conditional probabilities as logits.

    Returns:
        The order, int64 ``[k]`` of columns; bias ``[k]`` and linear ``[k, k]``, float32.
    """
    n, k = len(fit), len(columns)
    counts = fit.counts()
    if k == 1:
        own = counts[columns].double()
        return columns, ((own + 0.5) / (n - own + 0.5)).log().float(), torch.zeros(1, 1).float()
    joint = pair_counts(fit, columns)
    mutual_information_(joint, counts[columns], n)
    edges = spanning_tree(joint)
    order = columns[torch.cat([edges[:1, 0], edges[:, 1]])]
    place = torch.full((fit.n_columns,), -1, dtype=torch.int64)
    place[order] = torch.arange(k)
    parents = torch.full((fit.n_columns,), -1, dtype=torch.int64)
    parents[columns[edges[:, 1]]] = columns[edges[:, 0]]
    both = counts_with_parents(fit, parents)[order].double()
    own, above = counts[order].double(), parents[order]
    on = torch.where(above >= 0, counts[above.clamp_min(0)], 0).double()
    both = torch.where(above >= 0, both, 0.0)

    def logit(ones: Tensor, total: Tensor) -> Tensor:
        return ((ones + 0.5) / (total - ones + 0.5)).log()

    off = logit(own - both, n - on)
    linear = torch.zeros(k, k, dtype=torch.float64)
    given = (above >= 0).nonzero().flatten()
    linear[given, place[above[given]]] = (logit(both, on) - off)[given]
    return order, off.float(), linear.float()


def _length(model: _Model, code: BinaryCode, order: Tensor) -> Tensor:
    """Bits of each row, float64 ``[n]``."""
    found = torch.empty(len(code), dtype=torch.float64)
    for at, block in _blocks(code):
        bits = block[:, order].float()
        found[at] = cross_entropy(model(bits), bits, reduction="none").double().sum(1)
    return found / math.log(2)


def _fit(
    model: _Model, fit: BinaryCode, stops: BinaryCode, order: Tensor, generator: torch.Generator
) -> int:
    """Train until the documents that say when to stop do; the steps of the model that is kept."""
    if len(stops) > _LOOK_ROWS:
        stops = stops[even_numbers(len(stops), _LOOK_ROWS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    with torch.no_grad():
        best = float(_length(model, stops, order).mean())
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    at = 0
    for step in range(1, _STEPS + 1):
        chosen = torch.randint(len(fit), (min(_BATCH, len(fit)),), generator=generator)
        bits = fit[chosen].to_dense()[:, order].float()
        loss = cross_entropy(model(bits), bits, reduction="sum") / len(bits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % _LOOK_EVERY == 0:
            with torch.no_grad():
                now = float(_length(model, stops, order).mean())
            if now < best:
                best, at = now, step
                kept = {name: value.detach().clone() for name, value in model.named_parameters()}
            elif step - at >= _PATIENCE * _LOOK_EVERY:
                break
    model.load_state_dict(kept, strict=False)
    return at


def _interval(bits: Tensor, documents: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """95 % interval of the mean over rows, documents drawn with replacement.

    The ends are moved outwards, as means drawn from n documents vary by (n - 1) / n too little, and
    their quantiles are those of a normal where few documents ask for Student's t (its quantile by
    the expansion of Cornish and Fisher).
    """
    _, which, sizes = documents.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, which, bits)
    drawn = torch.randint(len(sizes), (_RESAMPLES, len(sizes)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    n, middle = len(sizes), float(bits.mean())
    v, z = max(n - 1, 1), 1.959964
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    wider = math.sqrt(n / v) * t / z
    return middle + (low - middle) * wider, middle + (high - middle) * wider
