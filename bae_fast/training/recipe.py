"""What makes a sparse binary code train: the start, the revival of dead features, the refit."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.arguments import all_finite, check_int
from bae_fast.codes import BinaryCode
from bae_fast.distributed import Mesh
from bae_fast.functional import decode
from bae_fast.model import BinaryAutoencoder
from bae_fast.normalization import check_rows
from bae_fast.ops import registry
from bae_fast.pairs import pair_counts
from bae_fast.search import SearchedAutoencoder

# rows decoded or encoded densely at a time
_ROW_BLOCK = 8192

# columns whose pre-activations are computed at a time at the start: 1 GiB of float32
_COLUMN_BLOCK = 65536

# rows over which the start's deviation and density are taken
START_ROWS = 4096

# length of the noise on a unit direction that is drawn more than once
_JITTER = 0.3

# the refit solves F x F normal equations in float64
MAX_REFIT_FEATURES = 16384


@torch.no_grad()
def init_from_rows_(
    bae: BinaryAutoencoder,
    x: Tensor,
    density: float,
    *,
    decoder_norm: float,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Start every feature along a row of the data, on in a given share of the rows.

    Row j of W_dec and column(s) j of W_enc point along one normalised row of x, drawn at random,
    no row twice while they last (two features along one row would stay the same for ever: beyond
    that, directions are jittered). Columns of W_enc are scaled so that pre-activations have unit
    standard deviation, which is the unit of the surrogate's width; b_enc then sets the density.
    Deviation and density are taken over the first 4,096 rows.

    Args:
        x: raw rows ``[n, d_in]`` in random order, n >= 2; best at least d_sae of them.
        density: share of the rows in which each bit is on.
        decoder_norm: norm of the rows of W_dec, in normalised units.
        generator: draws the random numbers.
        part: (i, m): the module holds the i-th of m equal parts of the features, and gets what
            they get in the whole.

    Raises:
        ValueError: for a transcoder, whose inputs and targets have different spaces.
    """
    if bae.is_transcoder:
        raise ValueError(
            "init_from_rows_ needs d_out=None, as a transcoder's target is not x; "
            f"got d_out={bae.config.d_out}"
        )
    rows = bae.normalize(x).to(bae.W_enc.dtype)
    each = bae.config.d_sae
    f, own = each * part[1], slice(each * part[0], each * (part[0] + 1))
    order = torch.randperm(len(rows), generator=generator, device="cpu")
    chosen = order.repeat(-(-f // len(rows)))[:f][own].to(rows.device)
    directions = torch.nn.functional.normalize(rows[chosen], dim=1)
    if f > len(rows):
        noise = torch.randn(
            (f, rows.shape[1]), generator=generator, dtype=torch.float32, device="cpu"
        )
        directions = torch.nn.functional.normalize(
            directions + _JITTER * noise[own].to(directions) / rows.shape[1] ** 0.5, dim=1
        )
    x, rows = x[:START_ROWS], rows[:START_ROWS]
    bae.W_dec.copy_(directions * decoder_norm)
    columns = directions.T.repeat_interleave(bae.config.n_bits, dim=1)
    # by columns: the pre-activations of a very wide dictionary do not fit into memory
    for some, own_columns in zip(
        columns.split(_COLUMN_BLOCK, 1), bae.W_enc.split(_COLUMN_BLOCK, 1), strict=True
    ):
        own_columns.copy_(some / (rows @ some).std(0).clamp_min(1e-6))
    bae.b_dec.zero_()
    bae.init_density_(x, density)


@torch.no_grad()
def revive_(
    bae: BinaryAutoencoder,
    dead: Tensor,
    x: Tensor,
    error: Tensor,
    optimizer: torch.optim.Optimizer | None,
    *,
    quantile: float,
    decoder_scale: float,
    generator: torch.Generator | None = None,
    mesh: Mesh | None = None,
) -> int:
    """Point dead features at what is reconstructed worst.

    Each dead feature takes the direction of the residual of one row, drawn with probability
    proportional to its squared error; the encoder gets the median norm of the live features, the
    decoder ``decoder_scale`` of it, b_enc the given quantile of the pre-activations of x, and
    the optimizer, if there is one, forgets the feature.

    Args:
        dead: bool ``[F]``.
        x: normalised rows ``[N, d_in]``.
        error: target - reconstruction of these rows, normalised, ``[N, d_out]``; d_out = d_in.
        mesh: where the module holds the features of one rank: ``x`` and ``error`` are of all
            ranks' rows, and every rank calls with the same generator state.

    Returns:
        How many features were revived, over all ranks.
    """
    k = bae.config.n_bits
    dead_ids = dead.nonzero().flatten()
    all_dead, before = dead, 0
    if mesh is not None:
        all_dead = mesh.gather(dead.to(torch.uint8), "feature", "dead features").bool()
        before = int(all_dead[: mesh.feature_rank * len(dead)].sum())
    n_dead = int(all_dead.sum())
    if n_dead == 0 or n_dead == len(all_dead):
        return 0
    badness = error.square().sum(1).cpu()  # where the generator is
    picked = torch.multinomial(
        badness, n_dead, replacement=n_dead > len(badness), generator=generator
    )[before : before + len(dead_ids)].to(error.device)
    directions = torch.nn.functional.normalize(error[picked].to(bae.W_dec.dtype), dim=1)
    columns = (dead_ids[:, None] * k + torch.arange(k, device=dead.device)).flatten()
    encoder_norms = bae.W_enc[:, (~dead).repeat_interleave(k)].norm(dim=0)
    decoder_norms = bae.W_dec[~dead].norm(dim=1)
    if mesh is not None:
        encoder_norms = _of_live(mesh, bae.W_enc.norm(dim=0), all_dead.repeat_interleave(k))
        decoder_norms = _of_live(mesh, bae.W_dec.norm(dim=1), all_dead)
    encoder_norm = encoder_norms.median()
    bae.W_dec[dead_ids] = directions * (decoder_scale * decoder_norms.median())
    if not len(dead_ids):
        return n_dead
    bae.W_enc[:, columns] = directions.T.repeat_interleave(k, dim=1) * encoder_norm
    pre = x.to(bae.W_enc.dtype) @ bae.W_enc[:, columns]
    n = len(pre)
    rank = min(max(round(quantile * n), 1), max(n - 1, 1))  # one row at least lies above
    at_rank, above = (pre.kthvalue(r, dim=0).values for r in (rank, min(rank + 1, n)))
    bae.b_enc[columns] = -(at_rank + above) / 2  # on no row: rounding would decide on it
    for parameter, at in (
        (bae.W_enc, (slice(None), columns)),
        (bae.b_enc, (columns,)),
        (bae.W_dec, (dead_ids,)),
    ):
        known = {} if optimizer is None else optimizer.state.get(parameter, {})
        for name, state in known.items():
            if name != "step":
                state[at] = 0
    return n_dead


def _of_live(mesh: Mesh, norms: Tensor, dead: Tensor) -> Tensor:
    """Norms of the live features of all ranks."""
    return mesh.gather(norms, "feature", "norms")[~dead]


@torch.no_grad()
def refit_decoder_(bae: BinaryAutoencoder, x: Tensor, *, ridge: float = 1e-5) -> None:
    """Replace W_dec and b_dec by the least-squares optimum for the code of x; bits stay.

    Solves (V^T V + ridge n I) [W; b] = V^T x with V the feature values and a column of ones;
    products of blocks of rows in the module's dtype (fp32 or wider), sums and solution in
    float64. For one-bit codes V^T V is the matrix of co-occurrence counts.

    Args:
        x: raw rows ``[n, d_in]``, any floating dtype; read in blocks.
        ridge: keeps features that never fire, or always fire together, determined.

    Raises:
        ValueError: a transcoder, more than 16,384 features (the F x F system would not fit), or x
            that is not finite, which changes nothing.
    """
    if bae.is_transcoder:
        raise ValueError(
            "refit_decoder_ needs d_out=None, as a transcoder's target is not x; "
            f"got d_out={bae.config.d_out}"
        )
    f, d = bae.W_dec.shape
    if f > MAX_REFIT_FEATURES:
        raise ValueError(f"refit_decoder_ needs d_sae <= {MAX_REFIT_FEATURES}; got {f}")
    dtype = torch.promote_types(bae.W_dec.dtype, torch.float32)
    system = torch.zeros(f + 1, f + 1, dtype=torch.float64, device=bae.W_dec.device)
    moment = torch.zeros(f + 1, d, dtype=torch.float64, device=bae.W_dec.device)
    columns = torch.arange(f, device=bae.W_dec.device)
    for block in x.split(_ROW_BLOCK):
        block = block.to(bae.W_dec.device, bae.W_dec.dtype)
        code = bae.encode(block)
        rows = bae.normalize(block).to(dtype)
        moment[:f] += _sums_of_rows(code, rows, bae.impl)
        moment[f] += rows.sum(0, dtype=torch.float64)
        if code.n_bits == 1:  # integers, of the pairs that are on together
            system[:f, :f] += pair_counts(code, columns)
            ones = code.counts().double()
        else:
            values = code.values(dtype)
            system[:f, :f] += values.T @ values
            ones = values.sum(0, dtype=torch.float64)
        system[f, :f] += ones
        system[:f, f] += ones
        system[f, f] += len(block)
    solution = least_squares(system, moment, ridge * len(x))
    bae.W_dec.copy_(solution[:f])
    bae.b_dec.copy_(solution[f])


def _sums_of_rows(code: BinaryCode, rows: Tensor, impl: str) -> Tensor:
    """V^T x ``[F, d]``, V the values of the code and x rows ``[N, d]`` of a dtype of products."""
    device = rows.device
    name = registry.choose(impl, device.type, rows.dtype, code.n_columns, code.n_bits, device.index)
    if name == "reference":
        return code.values(rows.dtype).T @ rows
    backward = registry.BACKENDS[name].ops["decoder_backward"]
    sums: Tensor = backward(code.words, rows, code.n_columns, code.n_bits, rows.dtype)[0]
    return sums


def least_squares(system: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """The solution ``[k, d]`` of normal equations ``[k, k]`` and ``[k, d]`` of rows x, float64.

    Args:
        ridge: added to the diagonal of ``system``, in place.

    Raises:
        ValueError: x was not finite.
    """
    if not all_finite(moment):
        raise ValueError("x must be finite; it holds NaN or Inf")
    system.diagonal().add_(ridge)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(system))


@torch.no_grad()
def fit_search_(
    searched: SearchedAutoencoder, x: Tensor, *, rounds: int = 1, ridge: float = 1e-5
) -> SearchedAutoencoder:
    """Fit the decoder and the shares of the bits to searched codes, in turn with the search.

    In each round the codes of x are searched, and the decoder becomes their least-squares optimum
    (:func:`refit_decoder_`); then the shares become those of codes searched with it. The second
    round gains a tenth of what the first does.

    Args:
        searched: the module, which is changed and returned.
        x: raw rows ``[n, d_in]``, held-in ones, 50 times as many as features or more: with fewer
            the decoder fits their noise.
        rounds: at least 1.

    Raises:
        TypeError: another module, or x is no tensor of floats.
        ValueError: x has another shape, or fewer rows than the module has features; rounds is
            below 1; more than 16,384 features; x is not finite, which changes nothing.
    """
    if not isinstance(searched, SearchedAutoencoder):
        raise TypeError(
            f"searched must be a SearchedAutoencoder; got {type(searched).__name__}, of which "
            "SearchedAutoencoder.of makes one"
        )
    check_rows("x", x, searched.d_in, least=searched.d_sae)
    check_int("rounds", rounds, 1)
    for _ in range(rounds):
        refit_decoder_(searched, x, ridge=ridge)
        searched.fit_density_(x)
    return searched


@torch.no_grad()
def reconstruct(
    bae: BinaryAutoencoder, x: Tensor, mesh: Mesh | None = None
) -> tuple[Tensor, BinaryCode]:
    """(reconstruction in normalised units, code) of raw rows ``[N, d_in]``.

    With a mesh the reconstruction is that of all ranks' features, the code that of this rank's.
    """
    code = bae.encode(x)  # of a module that searches, the searched one
    if mesh is None or mesh.feature == 1:
        return decode(code, bae.W_dec, bae.b_dec, impl=bae.impl), code
    recon = decode(code, bae.W_dec, torch.zeros_like(bae.b_dec), impl=bae.impl)
    recon = recon.to(torch.promote_types(recon.dtype, torch.float32))
    return mesh.sum_(recon, "feature", "reconstructions") + bae.b_dec, code


@torch.no_grad()
def residual(bae: BinaryAutoencoder, x: Tensor, mesh: Mesh | None = None) -> tuple[Tensor, Tensor]:
    """Normalised rows and what is left of them: (``[N, d_in]``, ``[N, d_in]``), no gradient.

    With a mesh, x is of this rank's rows, and the result of all ranks'.
    """
    rows = bae.normalize(x)
    error = rows - reconstruct(bae, x, mesh)[0]
    if mesh is None:
        return rows, error
    return mesh.gather(rows, "data", "rows"), mesh.gather(error, "data", "errors")
