"""The compiled operators: their schemas, why they may be missing, and the instruction set.

They are private to this backend, trust their caller for shapes and dtypes, and write results in
place where that saves a copy. ``columns`` is column-packed with a padded stride, as
``cpp_rows_to_columns`` makes it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from bae_fast.ops.registry import NOT_COMPILED

ENV_SIMD = "BAE_FAST_SIMD"

# numbers as in csrc/dispatch.h
LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3, "amx": 4}

_SCHEMAS = (
    # use a level (-1: the best there is, -3: the one in use) and return it; -2: the CPU lacks it
    "cpp_simd(int level) -> int",
    # fp32 [rows, columns], uninitialised, from memory that an earlier gradient gave back
    "cpp_new_gradient(int rows, int columns) -> Tensor",
    "cpp_rows_to_columns(Tensor words, int n_columns) -> Tensor",
    "cpp_column_counts(Tensor words, int n_columns) -> Tensor",
    "cpp_count_ones(Tensor words) -> int",
    # places in order, entries 2 column + bit, of the first k that hold in each row; its length
    # where there are fewer
    "cpp_salient(Tensor words, Tensor order, int n_columns, int k) -> Tensor",
    # offsets and rising indices of numbers, int32, below n_groups; others are left out
    "cpp_grouped(Tensor numbers, int n_groups) -> (Tensor, Tensor)",
    # [pre > 0] into words, [|pre| < width] into window unless that is empty, from column `start`;
    # pre is in fp32 or float64 and without its bias where that is given
    "cpp_threshold(Tensor pre, Tensor? bias, Tensor? keep, float width, int start,"
    " Tensor(a!) words, Tensor(b!) window) -> ()",
    "cpp_covariance(Tensor words, Tensor counts, int n_rows, bool keep_signs) -> (Tensor, Tensor)",
    # ranks of features and lists of the rows (csrc/pair_lists.h), or two empty tensors where bits
    # are the faster way to the signs; with `all_rows`, to their product with every row
    "cpp_pair_lists(Tensor words, Tensor counts, int n_rows, float list_cost, bool all_rows)"
    " -> (Tensor ranks, Tensor lists)",
    "cpp_list_rows(Tensor words, Tensor ranks, int n_features) -> Tensor",
    "cpp_listed_covariance(Tensor ranks, Tensor lists, int n_features, int n_rows) -> Tensor",
    # fp32 [k, k]: rows in which two columns are on, of those with a place from 0 to k - 1; as many
    # bit products as `list_cost` take the time of one visited entry of lists
    "cpp_pair_counts(Tensor words, Tensor place, int k, float list_cost) -> Tensor",
    # fp32 [G, a, c]: ones in common of bits left [G, a, m] and rows [k, m], k <= 2^16, of which
    # index [G, c] chooses for each group
    "cpp_common_ones(Tensor left, Tensor rows, Tensor index) -> Tensor",
    # gradient at the bits -> gradient at pre, for the columns of g from `start`; with a covariance
    # there are signs, or columns to make them of, or ranks with lists of rows counted and at hand
    "cpp_backward(Tensor(a!) g, Tensor words, int start, Tensor? shift, Tensor? curvature,"
    " bool covariance, Tensor? signs, Tensor? columns, Tensor? ranks, Tensor? counted,"
    " Tensor? at_hand, Tensor counts, int n_rows, Tensor? digits,"
    " float scale, Tensor? window, Tensor? factor, Tensor? keep, bool official,"
    " Tensor(b!) column_sum) -> ()",
    # int32: where each row begins, then the columns of its ones, none where `keep` is false; empty
    # where they are more than `most`
    "cpp_list_window(Tensor window, Tensor? keep, int most) -> Tensor",
    # cpp_backward for entries that cpp_list_window found, with the products on both sides of it;
    # an empty grad_x or grad_W is not asked for, grad_x is added to
    "cpp_sparse_backward(Tensor entries, Tensor words, Tensor? grad_recon,"
    " Tensor W_dec, Tensor? shift, Tensor? curvature, bool covariance, Tensor? signs,"
    " Tensor? columns, Tensor? ranks, Tensor? counted, Tensor? at_hand, Tensor counts, int n_rows,"
    " Tensor? digits, float scale, Tensor x, Tensor W_enc, Tensor(a!) grad_x,"
    " Tensor(b!) grad_W, Tensor(c!) column_sum) -> ()",
    "cpp_rows_to_features(Tensor words, int n_columns) -> Tensor",
    # flips bits of words where that gains more than `least` -> their number in each row
    "cpp_search(Tensor(a!) projection, Tensor gram, Tensor on, Tensor off, int most, float least,"
    " Tensor(b!) words) -> Tensor",
    # out = bits dense in fp32, added to what out holds with `add`; by adding rows with `gather`.
    # False, and nothing of use in out, where dense is not finite: only without `gather`, with AMX
    "cpp_bits_product(Tensor bits, Tensor dense, bool gather, bool add, Tensor(a!) out) -> bool",
    # bits dense + bias by adding rows of an fp32 or bf16 matrix where they lie, without copies in
    # blocks; summed in fp32, out is in fp32 or bf16
    "cpp_gather_rows(Tensor bits, Tensor dense, Tensor? bias, Tensor(a!) out) -> ()",
    # H in bits, float64 []; and its derivative at the bits of each column, times `scale`, in fp32
    # or float64
    "cpp_entropy(Tensor counts, int n_rows) -> Tensor",
    "cpp_entropy_slopes(Tensor counts, int n_rows, float scale, Tensor(a!) out) -> ()",
    # sum of ((recon - target) unit)^2, float64 [], over the rows that `keep` names; recon and
    # target are [n, d] in fp32 or bf16, units fp32 [d]; and its gradient at recon, times `scale`
    "cpp_squared_error(Tensor recon, Tensor target, Tensor unit, Tensor? keep) -> Tensor",
    "cpp_squared_error_gradient(Tensor recon, Tensor target, Tensor unit, Tensor? keep,"
    " float scale, Tensor(a!) out) -> ()",
    # dense products of the package's own, sums in fp32 -> 0: none; 1: of fp32 and bf16 numbers as
    # they are; 2: on matrix units, 3 digits for fp32, 1 for bf16 operands. False, and nothing of
    # use written, where an operand of 3 digits on matrix units is not below 2^127
    "cpp_unit_kind() -> int",
    "cpp_unit_encode(Tensor x, Tensor W, Tensor bias, Tensor? keep, float width, int digits,"
    " Tensor(a!) words, Tensor(b!) window) -> bool",
    "cpp_unit_product(Tensor left, Tensor right, int digits, bool add, Tensor(a!) out) -> bool",
    # cpp_backward of all columns and both dense products around it
    "cpp_unit_backward(Tensor x, Tensor grad_recon, Tensor W_dec, int digits_of_numbers,"
    " Tensor words, Tensor? shift, Tensor? curvature, bool covariance, Tensor? signs,"
    " Tensor? columns, Tensor? ranks, Tensor? counted, Tensor? at_hand, Tensor counts, int n_rows,"
    " Tensor? digits, float scale, Tensor? window, Tensor? keep, bool official,"
    " Tensor(a!) column_sum, Tensor(b!) grad_W) -> bool",
)

# bytes from which the memory of gradients is kept
_LARGE = 2**22

_library: torch.library.Library | None = None


def _define() -> None:
    global _library
    _library = torch.library.Library("bae_fast", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
        _library.impl(schema.partition("(")[0], torch.library.fallthrough_kernel, "Autograd")


def op(name: str) -> Any:
    """The compiled operator ``bae_fast::cpp_<name>``."""
    return getattr(torch.ops.bae_fast, f"cpp_{name}").default


def empty_gradient(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised gradient of a weight; large ones in fp32 reuse memory of the last step."""
    if dtype != torch.float32 or 4 * rows * columns < _LARGE:
        return torch.empty(rows, columns, dtype=dtype)
    gradient: Tensor = op("new_gradient")(rows, columns)
    return gradient


def load() -> str | None:
    """Register the operators and choose the instruction set; the reason where that fails.

    Raises:
        ValueError: ``BAE_FAST_SIMD`` is not the name of a level.
    """
    level = os.environ.get(ENV_SIMD)
    if level and level not in LEVELS:
        raise ValueError(f"{ENV_SIMD} must be one of {', '.join(LEVELS)}; got {level!r}")
    if importlib.util.find_spec("bae_fast._C") is None:
        return (
            f"{NOT_COMPILED}: install again with a C++ compiler at hand; without it impl='torch' "
            "does the same on plain torch operators, slower"
        )
    if _library is None:
        _define()
    try:
        importlib.import_module("bae_fast._C")
    except ImportError as error:
        return f"its compiled part does not load with torch {torch.__version__}: {error}"
    if level and op("simd")(LEVELS[level]) < 0:
        return f"{ENV_SIMD}={level}, which this CPU lacks"
    return None


def simd() -> str:
    """Name of the instruction set in use."""
    return next(name for name, number in LEVELS.items() if number == op("simd")(-3))


def use_simd(level: str | None) -> str:
    """Use an instruction set from now on, the best there is for None; returns its name.

    Raises:
        ValueError: unknown name, or the CPU lacks it.
    """
    if level is not None and level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}; got {level!r}")
    found = op("simd")(-1 if level is None else LEVELS[level])
    if found < 0:
        raise ValueError(f"this CPU lacks {level}")
    return next(name for name, number in LEVELS.items() if number == found)
