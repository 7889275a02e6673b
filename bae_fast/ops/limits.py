"""How few rows have statistics, and how large a covariance may be: its numerator is an int64."""

from __future__ import annotations

from torch import Tensor

from bae_fast.packing import popcount

_BEYOND = 2**63
_ROW_BLOCK = 256


def check_counted(n_rows: Tensor) -> None:
    """Refuse the statistics of no row; not on a GPU, which would be waited for.

    Raises:
        ValueError: no row is counted.
    """
    if n_rows.device.type == "cpu" and int(n_rows) == 0:
        raise ValueError("mask must keep at least one of the rows that are counted; got none")


def fits_any(n_rows: int, n_columns: int) -> bool:
    """Whether the numerator of any N rows fits: |V| <= N^2 / 4, so (F N)^2 / 4 < 2^63."""
    return (n_columns * n_rows) ** 2 < 4 * _BEYOND


def check_numerator(words: Tensor, counts: Tensor, n_rows: Tensor) -> None:
    """Refuse rows whose numerator could leave int64; reads them, so not on a GPU.

    sum |V| is at most N sum_r l_r^2 + (sum_j n_j)^2 with l_r ones in row r: a bound that grows
    with the ones, not with the features.

    Raises:
        ValueError: fewer than two rows, or both bounds reach 2^63.
    """
    n, k = int(n_rows), counts.shape[0]
    if n < 2:
        raise ValueError(f"covariance needs at least 2 rows; got {n}")
    if fits_any(n, k):
        return
    total, used = int(counts.sum()), int((counts > 0).sum())
    if n * used * total + total**2 < _BEYOND:  # l is at most the columns in use: no row is read
        return
    squares = sum(int(popcount(part).sum(-1).square().sum()) for part in words.split(_ROW_BLOCK))
    bound = n * squares + total**2
    if bound >= _BEYOND:
        raise ValueError(
            f"covariance needs (F N)^2 / 4 < 2^63, or N sum(l^2) + (sum n)^2 < 2^63 with l ones in "
            f"a row and n in a column; got N={n}, F={k} columns, {bound:.3g}"
        )
