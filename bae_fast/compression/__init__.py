"""Codes on disk near the entropy of their columns, or of their tree; exact in the bits.

Prototype and differences (arXiv 2509.20997, Compression): a column whose share of ones p is above
1/2 is kept inverted, so a row is the list of columns where it differs from the rounded mean code.
Columns of like p form a class; each class stores one p, each column the number of its class. The
differences of a class, column after column, are one sequence of independent bits: its gaps are
geometric and are coded by a range coder (library ``constriction``). Symbols are as many as there
are differences, not as many as there are bits, and constant columns cost nothing. Classes are as
fine as pays: their number is chosen by the length of the file.

Along the tree (``coder="tree"``): the columns of most mutual information are joined in a tree
(Chow and Liu 1968), and a column is coded given its parent. An edge that saves less than it takes
to describe is left out: without any the file is that of independent columns.

``bits`` finds ones in packed columns, ``gaps`` codes the places of
ones, ``columns`` and ``tree`` make these of a block of rows and back, ``file`` writes and reads.
"""

from bae_fast.compression.file import (
    BLOCK_ROWS,
    CODERS,
    FORMAT_VERSION,
    MAGIC,
    TREE_VERSION,
    CompressedCode,
    CompressedSize,
    compress,
    decompress,
)

__all__ = [
    "BLOCK_ROWS",
    "CODERS",
    "FORMAT_VERSION",
    "MAGIC",
    "TREE_VERSION",
    "CompressedCode",
    "CompressedSize",
    "compress",
    "decompress",
]
