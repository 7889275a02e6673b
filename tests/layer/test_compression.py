"""Compressed codes: every bit comes back, the size is near the bound, damage is found."""

import base64
import json
import math
import os
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_lm import save_tiny_model

import bae_fast as bf

pytest.importorskip("constriction")

from bae_fast.analysis import fvu
from bae_fast.cli import main
from bae_fast.compression import MAGIC, CompressedCode, compress, decompress
from bae_fast.compression import file as codes_file
from bae_fast.compression import gaps as gaps_coder
from bae_fast.compression.columns import IndependentColumns
from bae_fast.compression.tree import Halves, TreeColumns
from bae_fast.lm import ActivationCache

ROOT = Path(__file__).resolve().parents[2]


def independent(n_rows, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return bf.BinaryCode.from_dense(torch.rand(n_rows, len(p), generator=generator) < p)


def dependent(n_rows=400, n_columns=60, seed=0):
    """A chain of noisy copies, complements, a column that implies another, and constants."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(n_rows, n_columns, generator=generator) < 0.3
    noise = torch.rand(n_rows, n_columns, generator=generator) < 0.05
    for j in range(1, n_columns):
        if j % 5 == 4:
            bits[:, j] = ~bits[:, j - 1]
        elif j % 5 == 3:
            bits[:, j] &= bits[:, j - 1]
        elif j % 5 in (1, 2):
            bits[:, j] = bits[:, j - 1] ^ noise[:, j]
    if n_columns > 20:
        bits[:, 7], bits[:, 11] = False, True
    return bf.BinaryCode.from_dense(bits)


def mixed(n_rows=300, n_columns=75, seed=0):
    """Constant, rare, fair, frequent and almost constant columns."""
    p = torch.tensor([0.0, 1.0, 0.001, 0.02, 0.2, 0.5, 0.7, 0.97, 0.999])
    return independent(n_rows, p[torch.arange(n_columns) % len(p)], seed)


# -- the bits come back ------------------------------------------------------------------------


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n_rows=st.integers(1, 90),
    n_columns=st.integers(1, 100),
    kind=st.sampled_from(["zeros", "ones", "fair", "sparse", "dense", "by column", "one bit"]),
    block_rows=st.sampled_from([1, 7, 32, 64, 4096]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(tmp_path, n_rows, n_columns, kind, block_rows, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_rows, n_columns, generator=generator)
    p = torch.rand(n_columns, generator=generator).mul(1.4).sub(0.2)  # beyond 0 and 1: constant
    bits = {
        "zeros": uniform < 0,
        "ones": uniform < 2,
        "fair": uniform < 0.5,
        "sparse": uniform < 0.02,
        "dense": uniform < 0.95,
        "by column": uniform < p,
        "one bit": uniform == uniform.max(),
    }[kind]
    keep = torch.rand(n_rows, generator=generator) < 0.6 if masked else None
    if keep is not None:
        bits = bits & keep[:, None]
    plain = bf.BinaryCode.from_dense(bits)
    code = bf.BinaryCode(plain.words, n_columns, row_mask=keep)
    size = compress(code, tmp_path / "code", block_rows=block_rows)
    assert size.file_bytes == (tmp_path / "code").stat().st_size
    found = decompress(tmp_path / "code")
    assert found.equal(code)
    assert (found.row_mask is None) == (keep is None)


@pytest.mark.parametrize("n_columns", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("n_rows", [1, 31, 32, 33, 4095, 4096, 4097])
def test_sizes_beside_the_edges_of_words_and_blocks(tmp_path, n_rows, n_columns):
    code = mixed(n_rows, n_columns)
    compress(code, tmp_path / "code")
    assert decompress(tmp_path / "code").equal(code)


@pytest.mark.parametrize("n_columns", [40, 64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3), (4, 1, 5)])
def test_leading_dimensions_bits_a_feature_and_masks_come_back(tmp_path, shape, n_columns):
    bits = torch.rand(*shape, n_columns) < 0.3
    keep = torch.rand(shape) < 0.7
    code = bf.BinaryCode.from_dense(bits & keep[..., None], n_bits=4)
    code = bf.BinaryCode(code.words, n_columns, n_bits=4, row_mask=keep)
    compress(code, tmp_path / "code", block_rows=3)
    found = decompress(tmp_path / "code")
    assert found.equal(code)
    assert found.n_bits == 4
    assert torch.equal(found.row_mask, keep)


@pytest.mark.parametrize("p", [1e-6, 3e-5, 1e-3, 0.013, 0.02, 0.3, 0.5])
def test_gaps_of_every_size_come_back(p):
    """Gaps beyond the alphabet, at its ends and across the split into two symbols."""
    gaps = gaps_coder.Gaps(round(p * 2**32))
    last = (gaps_coder._HIGH - 1) << gaps.shift
    edges = [0, 1, last - 1, last, last + 1, 2 * last - 1, 2 * last, 7 * last + 3]
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.permutation(edges * 4), rng.geometric(p, 500) - 1])
    stream = gaps_coder.constriction_stream().queue
    encoder = stream.RangeEncoder()
    n_symbols = gaps.encode(encoder, values)
    decoder = stream.RangeDecoder(encoder.get_compressed())
    assert n_symbols > len(values)  # some gaps did not fit
    assert gaps.decode(decoder, n_symbols).tolist() == values.tolist()


def test_columns_unpacked_by_parts_give_the_same_file(tmp_path, monkeypatch):
    code = mixed(130)
    compress(code, tmp_path / "whole", block_rows=64)
    monkeypatch.setattr("bae_fast.compression.bits._CHUNK_BITS", 300)
    compress(code, tmp_path / "parts", block_rows=64)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert decompress(tmp_path / "parts").equal(code)


def frozen_code():
    row, column = torch.arange(1500)[:, None], torch.arange(14)
    below = torch.tensor([0, 1, 3, 3, 20, 20, 21, 1009, 60, 61, 1006, 1008, 990, 1])
    return bf.BinaryCode.from_dense((row * row * 7919 + column * 104729) % 1009 < below)


def test_files_written_before_are_still_read(tmp_path):
    """Tables and layout belong to the format: both sides could change together unseen."""
    (tmp_path / "code").write_bytes(base64.b64decode(FROZEN))
    compressed = CompressedCode.open(tmp_path / "code")
    assert compressed.metadata == {"hook": "layers.11"}
    assert compressed.n_blocks == 2
    assert len(compressed._model.sizes) > 1
    assert {gaps.shift > 0 for gaps in compressed._model.gaps} == {True, False}
    assert compressed.code().equal(frozen_code())


FROZEN = """
iUJBRWJpdHMBAAAAdQAAAA4AAAABAAEAAAQAAAcAAAACAAAAFQAAANwFAAAAAAAAAAAAAG8SgwBZq2MCDElTCj81XvqR7Xz/
/////wIAAAABAAAAAwAAAAQAAAABAAAAAgAAAAEAAAB22PcFZBbcb3siaG9vayI6ICJsYXllcnMuMTEifbkAAABDXiywjXmV
sen1CHBdAAAAt0/aodoaQUY6Iz8ACHNdTSbwgi0AAAAAAG8ax1ZGDw4VP4X8hUuR27LHZEKqUkFZyrHvGrA6CYirTzTJPqLX
63/8OB8aRbSQ3TtKtZYqMJHUFFtqb/J2qYQz/qLBQX10rIaZQLuB7Cz6Q70hGgp4KbCpaGO9NRkyQ3/V3AYT65t+c9cpWygf
ihtxKU6PpyEG3zjUiunTOvbfhUyfUsvp9YS1hm4WEtiQccwibFVjGvkzRhPCC0kfyG7J0MEvgC/VI3UxvzdH7V5SPTqcRwIC
AgICOkppUf0yzYg/rlrnK8RlsqDMSHliB7bHd9MQxi0rCmphWCwKY1rRwgN+5COgaYRr9gMRVLZcym/7q8C5zicOCZqdZpy6
g5bv3e8zHIANhwlgLYmZSURawA==
"""


# -- along a tree ------------------------------------------------------------------------------


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n_rows=st.integers(1, 150),
    n_columns=st.integers(1, 70),
    block_rows=st.sampled_from([13, 32, 64, 4096]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_bit_of_dependent_columns_comes_back(
    tmp_path, n_rows, n_columns, block_rows, masked, seed
):
    bits = dependent(n_rows, n_columns, seed).to_dense()
    keep = None
    if masked:
        keep = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed)) < 0.6
        bits &= keep[:, None]
    code = bf.BinaryCode(bf.BinaryCode.from_dense(bits).words, n_columns, row_mask=keep)
    size = compress(code, tmp_path / "code", block_rows=block_rows, coder="tree")
    compressed = CompressedCode.open(tmp_path / "code")
    assert compressed.edges == size.edges
    assert compressed.code().equal(code)


def test_copies_cost_what_their_flips_cost(tmp_path):
    """Groups of a fair bit and seven copies, a twentieth of each flipped: exact along a tree."""
    groups, copies, n = 8, 7, 16384
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(n, groups, 1, generator=generator) < 0.5
    flips = torch.rand(n, groups, copies, generator=generator) < 0.05
    code = bf.BinaryCode.from_dense(torch.cat([first, first ^ flips], 2).flatten(1))
    truth = groups * (1 + copies * -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95)))
    size = compress(code, tmp_path / "tree", coder="tree")
    assert size.edges == groups * copies
    assert size.bits_a_row == pytest.approx(truth, rel=0.01)
    assert decompress(tmp_path / "tree").equal(code)
    apart = compress(code, tmp_path / "columns", coder="columns")
    assert apart.edges == 0
    assert apart.bits_a_row == pytest.approx(groups * (1 + copies), rel=0.01)
    assert size.entropy_bits == apart.entropy_bits
    assert size.overhead < -0.4 < 0 < apart.overhead


def test_a_column_that_another_decides_costs_nothing_a_row(tmp_path):
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(20000, 10, generator=generator) < 0.2
    alone = compress(bf.BinaryCode.from_dense(own), tmp_path / "alone", coder="tree")
    both = torch.cat([own, ~own, own], 1)
    size = compress(bf.BinaryCode.from_dense(both), tmp_path / "both", coder="tree")
    assert size.edges == 20
    assert size.file_bytes < alone.file_bytes + 200


def test_independent_columns_make_the_same_file_as_without_a_tree(tmp_path):
    code = mixed(3000)
    size = compress(code, tmp_path / "tree", coder="tree")
    assert size.edges == 0
    compress(code, tmp_path / "columns", coder="columns")
    assert (tmp_path / "tree").read_bytes() == (tmp_path / "columns").read_bytes()


def test_rows_of_a_tree_are_selected_and_blocks_read_alone(tmp_path):
    code = dependent(300)
    compress(code, tmp_path / "code", block_rows=64, coder="tree")
    compressed = CompressedCode.open(tmp_path / "code")
    assert compressed.edges > 20
    assert compressed[[3, 250, 64]].equal(code[[3, 250, 64]])
    assert compressed.block(4).equal(code[256:])


@pytest.mark.parametrize("parents", [[1, 0, -1], [0, -1, -1], [-1, 2, 3, 1]])
def test_a_tree_with_a_circle_is_refused(parents):
    with pytest.raises(ValueError, match="circle"):
        Halves(np.array(parents))


def frozen_tree_code():
    row = torch.arange(1200)[:, None]
    noise = (row * row * 7919 + torch.arange(9) * 104729) % 1009
    bits = noise < torch.tensor([300, 5, 90, 200, 960, 8, 2, 0, 500])
    bits[:, 1] ^= bits[:, 0]
    bits[:, 2] ^= ~bits[:, 1]
    bits[:, 3] &= bits[:, 0]
    bits[:, 5] |= bits[:, 2]
    bits[:, 6] = bits[:, 4]
    return bf.BinaryCode.from_dense(bits)


def test_files_along_a_tree_written_before_are_read_and_written_alike(tmp_path):
    """Made by a coder that went column by column: the order of the bits belongs to the format."""
    path = tmp_path / "code"
    path.write_bytes(base64.b64decode(FROZEN_TREE))
    compressed = CompressedCode.open(path)
    assert compressed.metadata == {"hook": "layers.11"}
    model = compressed._model
    assert len(model.gaps) > 2  # several classes
    assert len(model.halves.levels) > 5
    code = frozen_tree_code()
    assert compressed.code().equal(code)
    blocks = b"".join(model.encode_rows(words) for words in code.words.split(1024))
    assert path.read_bytes().endswith(blocks)


FROZEN_TREE = """
iUJBRWJpdHMCAAAAfQAAAAkAAAABAAEAAAQAAAcAAAADAAAAFQAAALAEAAAAAAAAAAAAAAAAAACrwXMELvnGSyC0ObkxsCPv////
/wQAAAABAAAAAQAAAAIAAAACAAAAAgAAAAMAAAAGAAAAA1K9OPXpfNyboBFYeyJob29rIjogImxheWVycy4xMSJ9XgEAADn5dbjD
iFVq/LLKSUIAAAC/g/4u+ClOvAfglBY0NDVXl3hk7gzIBuoFbifaeKuoAx+g3yBLVFllpIj30ZQtqdhMfL1GPPgbmSCzHvqrZjEf
dfY0nmWVUvRbXxp+IRCV+NCNYKUEaXW1sdfAGY90XDZZvREFvqTXL7XjzpsmUQ4AOqekoKXYDy9PGtBNHGeiBtwzgOPJkD3PSPwb
PNmr5p04rchYNxG+WYrg7n7X3LFIRic6txedtad3CdrbueKn/5KQnwCns1sViAIttNsRncwftO0fdUPi5PwLhVKUIUiaIRZBBdJ9
Tn9kSEpfYT1m25MwhHw5r8m1HT4d6JDtWIyzJjPq+Zh/r0s1ke6o1wewt5TAkWIy1447Y/rApgUU3PSYWGTIZQQs7zpf4y8la5ty
GSUYnRhVP1yg+IQYizwtsjcvN36g5D1hOx3HOU39IlO4T+ohRJS48OPLx6OnxHQiTPec23814NYp845Gqr3Jk6xWG7VVcLyGjTRv
TPgfgJCFBIoBjgEKeDdTpbb08AldqZNnrhBEVYsTDnSBBKsnI/Q3Poya90CScWLtmUlxIWhHKNtX0OFJBTCkSEPq3EetcmM4
"""


# -- the size ----------------------------------------------------------------------------------


def slack_bits(size, n_blocks):
    """What the file may hold beyond the bound, from its parts: all but the rate of the coder.

    A block: two bytes a class, a word and a half of the coder. Classes are at most 1/16 wide in
    the logit where that pays; the coarser ones are chosen only if the file is then shorter.
    """
    n_classes = 2 * 16 * math.log(2.0 * size.n_rows + 1)
    classes = min(n_classes, size.n_columns)
    return 8 * size.header_bytes + n_blocks * (16 * classes + 48)


@pytest.mark.parametrize("p", [0.0005, 0.02, 0.2, 0.5, 0.98])
@pytest.mark.parametrize("n_rows", [4096, 10000])
def test_the_size_is_the_bound_and_what_the_header_needs(tmp_path, p, n_rows):
    code = independent(n_rows, torch.full((512,), p))
    size = compress(code, tmp_path / "code")
    density = code.density()
    bound = n_rows * float(
        -(torch.special.xlogy(density, density) + torch.special.xlogy(1 - density, 1 - density))
        .sum()
        .div(math.log(2))
    )
    assert size.entropy_bits == pytest.approx(bound, rel=1e-6)
    n_blocks = math.ceil(n_rows / 4096)
    assert 8 * size.file_bytes < bound * 1.001 + slack_bits(size, n_blocks)
    # the columns are alike: one class and no more than a hundred bytes of header serve them all
    assert size.header_bytes < 150


def test_columns_of_many_densities_cost_one_percent_at_4096_rows(tmp_path):
    generator = torch.Generator().manual_seed(1)
    p = torch.exp(torch.randn(2048, generator=generator) - 4).clamp(max=0.9)
    code = independent(4096, p)
    size = compress(code, tmp_path / "code")
    assert 0 < size.overhead < 0.02
    # at twelve times the rows the header counts for a twelfth; what chance made them share is
    # then true, and a tree would use it
    size = compress(bf.BinaryCode.cat([code] * 12), tmp_path / "more", coder="columns")
    assert 0 < size.overhead < 0.004


def test_constant_columns_cost_nothing_a_row(tmp_path):
    varying = independent(20000, torch.full((16,), 0.1)).to_dense()
    constant = torch.cat([torch.zeros(20000, 500), torch.ones(20000, 500)], 1)
    alone = compress(bf.BinaryCode.from_dense(varying), tmp_path / "alone")
    code = bf.BinaryCode.from_dense(torch.cat([varying, constant], 1))
    beside = compress(code, tmp_path / "beside")
    assert beside.file_bytes - alone.file_bytes < 250  # one class of three each: 1.1 bits a column
    nothing = compress(bf.BinaryCode.from_dense(constant), tmp_path / "nothing")
    assert nothing.file_bytes < 400
    assert nothing.entropy_bits == 0
    assert nothing.overhead == math.inf
    assert nothing.summary()["overhead"] is None


def test_the_plain_forms_are_counted_right(tmp_path):
    code = independent(100, torch.tensor([0.9, 0.1, 0.2, 0.0, 1.0, 0.4, 0.3, 0.05, 0.6]))
    size = compress(code, tmp_path / "code")
    bits = code.to_dense()
    prototype = bits.double().mean(0) > 0.5
    assert size.differences == int((bits != prototype).sum())
    assert size.packed_bytes == 100 * 2
    # 0 to 9 differences: 4 bits; nine columns: 4 bits
    assert size.listed_bytes == math.ceil((100 * 4 + size.differences * 4 + 9) / 8)
    assert size.summary()["bits_a_row"] == 8 * size.file_bytes / 100


def test_masked_rows_do_not_count_in_the_bound(tmp_path):
    code = independent(1000, torch.full((64,), 0.1))
    keep = torch.arange(1000) % 2 == 0
    masked = bf.BinaryCode.from_dense(code.to_dense() & keep[:, None])
    size = compress(bf.BinaryCode(masked.words, 64, row_mask=keep), tmp_path / "code")
    assert size.entropy_bits == pytest.approx(500 * float(code[keep].entropy()), rel=1e-9)


# -- parts of a file ---------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        3, -1, slice(None), slice(60, 200, 3), slice(5, 5), [1, 250, 250, 7], [],
        torch.arange(300) % 3 == 0, np.array([299, 0]),
    ],
)  # fmt: skip
def test_rows_are_selected_as_in_a_code(tmp_path, rows, masked):
    code = mixed()
    if masked:
        keep = torch.arange(300) % 4 != 1
        dense = bf.BinaryCode.from_dense(code.to_dense() & keep[:, None])
        code = bf.BinaryCode(dense.words, code.n_columns, row_mask=keep)
    compress(code, tmp_path / "code", block_rows=64)
    compressed = CompressedCode.open(tmp_path / "code")
    assert len(compressed) == 300
    assert compressed.n_blocks == 5
    assert compressed.shape == code.shape
    assert compressed[rows].equal(code[rows])


def test_only_the_blocks_asked_for_are_decoded(tmp_path, monkeypatch):
    compress(mixed(), tmp_path / "code", block_rows=64, metadata={"model": "x"})
    compressed = CompressedCode.open(tmp_path / "code")
    assert compressed.metadata == {"model": "x"}
    asked = []
    block = CompressedCode.block
    monkeypatch.setattr(CompressedCode, "block", lambda self, i: asked.append(i) or block(self, i))
    _ = compressed[[70, 299, 71]]
    assert asked == [1, 4]


def test_bad_rows_and_arguments_are_named(tmp_path):
    code = mixed()
    compress(code, tmp_path / "code")
    compressed = CompressedCode.open(tmp_path / "code")
    with pytest.raises(IndexError):
        compressed[300]
    with pytest.raises(TypeError, match="indexed by rows"):
        compressed["a"]
    with pytest.raises(IndexError, match="block must be 0 to 0; got 1"):
        compressed.block(1)
    with pytest.raises(ValueError, match="block_rows must be an int from 1 to"):
        compress(code, tmp_path / "other", block_rows=0)
    with pytest.raises(ValueError, match="coder must be one of tree, columns; got 'forest'"):
        compress(code, tmp_path / "other", coder="forest")
    words = torch.full((2, 2), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match="bits past column 40"):
        compress(bf.BinaryCode(words, 40, trusted=True), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code"]


# -- damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["columns", "tree"])
def sound(tmp_path_factory, request):
    """A code of three blocks and its file, small enough to be damaged at every byte."""
    path = tmp_path_factory.mktemp("sound") / "code"
    code = mixed(75, 40) if request.param == "columns" else dependent(75, 24)
    size = compress(code, path, block_rows=32, coder=request.param, metadata={"hook": "layers.1"})
    assert (size.edges > 0) == (request.param == "tree")
    assert CompressedCode.open(path).n_blocks == 3
    return code, path.read_bytes()


def must_refuse(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        decompress(path)


def test_every_flipped_byte_is_found(tmp_path, sound):
    _, data = sound
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= (1, 128, 255)[at % 3]
        must_refuse(tmp_path / "damaged", bytes(damaged))


def test_every_cut_and_every_surplus_is_found(tmp_path, sound):
    _, data = sound
    for length in range(len(data)):
        must_refuse(tmp_path / "cut", data[:length])
    must_refuse(tmp_path / "longer", data + b"\0")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_found(tmp_path, sound, data):
    _, good = sound
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=12))
        damaged[at : at + len(piece)] = piece
    if bytes(damaged) != good:
        must_refuse(tmp_path / "damaged", bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), n_rows=st.integers(1, 70))
def test_a_block_that_was_never_encoded_is_an_error_or_bits(data, n_rows):
    """Behind the digests: a decoder fed anything neither crashes nor writes past the rows."""
    shares = np.array([0, 2**31, 2**20, 2**32 - 2**24, 2**32 - 1], dtype=np.uint32)
    model = IndependentColumns(shares, np.arange(40, dtype=np.int32) % 5)
    try:
        words = model.decode_rows(data, n_rows)
    except (ValueError, AssertionError):
        return
    assert words.shape == (n_rows, 2)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), n_rows=st.integers(1, 70))
def test_a_block_that_was_never_encoded_along_a_tree_is_an_error_or_bits(data, n_rows):
    shares = np.array([0, 2**31, 2**20, 2**32 - 2**24, 2**32 - 1], dtype=np.uint32)
    halves = Halves(np.arange(40) // 3 - 1)
    model = TreeColumns(shares, np.arange(halves.n_halves) % 5, halves)
    try:
        words = model.decode_rows(data, n_rows)
    except (ValueError, AssertionError):
        return
    assert words.shape == (n_rows, 2)


def sealed(
    *, columns=32, n_bits=1, lead=(1,), masked=0, block_rows=4096, shares=(0,), members=None,
    note=b"{}", data=b"",
):  # fmt: skip
    """A file of one block whose digests are right, whatever its sizes say."""
    members = [columns + masked] if members is None else members
    header = codes_file._FIXED.pack(
        columns, n_bits, len(lead), masked, block_rows, len(shares), 0, len(note)
    )
    for values, dtype in ((lead, "<u8"), (shares, "<u4"), (members, "<u4")):
        header += np.array(values, dtype=dtype).tobytes()
    header += note
    blocks = -(-math.prod(lead) // block_rows)
    entries = codes_file._ENTRY.pack(len(data), codes_file._digest(data), 0) * min(blocks, 1)
    head = codes_file._PREFIX.pack(MAGIC, 1, len(header)) + header + entries
    return head + codes_file._digest(head) + data


def announced(number):
    out = bytearray()
    gaps_coder._append_number(out, number)
    return bytes(out)


@pytest.mark.parametrize(
    "made",
    [
        {"columns": 2**32 - 1},  # 32 GiB for the classes of its columns
        {"columns": 2**24, "masked": 1},
        {"columns": 2**16, "lead": (2**31 - 1,), "block_rows": 2**31 - 1},  # a block of 16 TiB
        {"columns": 2**10, "lead": (2**22 + 1,), "block_rows": 2**23},
        # a class of 2^28 bits that announces 2^27 ones in no byte
        {"columns": 2**16, "lead": (4096,), "shares": (2**12,), "data": announced(2**27)},
        {"lead": (2**31,), "block_rows": 2**31},
        {"lead": (0, 2**63)},
        {"lead": (0, 2**40, 2**20)},
        {"columns": 4097, "shares": (0,) * 4097, "members": (1,) * 4097},
        {"note": b"[" * 100_000},
        {"note": b"[]"},
        {"n_bits": 3},
        {"n_bits": 0},
        {"masked": 2, "members": [34]},
        {"block_rows": 2**32 - 1, "members": [31]},
    ],
    ids=lambda made: ",".join(made),
)
def test_a_few_bytes_cannot_ask_for_all_of_the_memory(tmp_path, made):
    """A stranger's file with right digests, whose sizes are no code's."""
    path = tmp_path / "bomb"
    path.write_bytes(sealed(**made))
    with pytest.raises(ValueError, match=str(path)):
        decompress(path)


def test_a_code_beyond_the_memory_is_read_by_rows(tmp_path, monkeypatch):
    code = bf.BinaryCode(torch.zeros(75, 2, dtype=torch.int32), 40)
    compress(code, tmp_path / "code", block_rows=32)
    monkeypatch.setattr(codes_file, "_machine_bytes", lambda: 75 * 8)
    assert decompress(tmp_path / "code").equal(code)
    monkeypatch.setattr(codes_file, "_machine_bytes", lambda: 75 * 8 - 1)
    with pytest.raises(MemoryError, match=r"code holds 0.0 GiB of words.* some of its rows"):
        decompress(tmp_path / "code")
    assert CompressedCode.open(tmp_path / "code")[:3].equal(code[:3])


def test_metadata_that_no_reader_takes_are_not_written(tmp_path):
    with pytest.raises(TypeError, match="metadata must be a dict; got list"):
        compress(mixed(), tmp_path / "code", metadata=["hook"])
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_reader_takes_are_not_written(tmp_path):
    wide = bf.BinaryCode(torch.zeros(2, 2**19 + 1, dtype=torch.int32), 2**24 + 32)
    with pytest.raises(ValueError, match=r"at most 2\^24 columns, the mask's included; got"):
        compress(wide, tmp_path / "code")
    long = bf.BinaryCode(torch.zeros(1, 1, dtype=torch.int32).expand(2**27 + 1, 1), 32)
    with pytest.raises(ValueError, match="block_rows must be at most 134,217,728 for 32 columns"):
        compress(long, tmp_path / "code", block_rows=2**27 + 1)
    assert not list(tmp_path.iterdir())


def test_other_files_are_named(tmp_path):
    code = mixed()
    code.save(tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match=r"code\.safetensors is not a compressed code"):
        decompress(tmp_path / "code.safetensors")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is not a compressed code"):
        decompress(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        decompress(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        decompress(tmp_path)


def test_another_version_and_another_coder_are_named(tmp_path, sound, monkeypatch):
    code, data = sound
    path = tmp_path / "code"
    path.write_bytes(data[:8] + (9).to_bytes(4, "little") + data[12:])
    with pytest.raises(ValueError, match="has version 9; can read 1 and 2"):
        decompress(path)
    path.write_bytes(data)
    assert decompress(path).equal(code)
    init = gaps_coder.Gaps.__init__
    monkeypatch.setattr(
        gaps_coder.Gaps, "__init__", lambda self, flips: init(self, min(flips + 99999999, 2**31))
    )
    with pytest.raises(ValueError, match=r"another version of constriction|cannot be decoded"):
        decompress(path)


def test_a_file_replaced_after_opening_is_found(tmp_path):
    compress(mixed(seed=1), tmp_path / "code")
    compressed = CompressedCode.open(tmp_path / "code")
    compress(mixed(seed=2), tmp_path / "code")
    with pytest.raises(ValueError, match="fails its digest"):
        compressed[0]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "code"
    old = mixed(50)
    compress(old, path)
    program = textwrap.dedent(
        f"""
        import torch, bae_fast as bf
        from bae_fast import compression
        from bae_fast.compression.columns import IndependentColumns
        encode = IndependentColumns.encode_rows
        def slow(self, words):
            if getattr(self, "once", False):
                print("in the middle")
                import time; time.sleep(60)
            self.once = True
            return encode(self, words)
        IndependentColumns.encode_rows = slow
        compression.compress(bf.BinaryCode.from_dense(torch.rand(90, 40) < 0.1), {str(path)!r},
                             block_rows=30, coder="columns")
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = tmp_path / "said"
    child = processes.start("-c", program, output=said, env=environment)
    try:
        processes.wait_until(
            lambda: said.is_file() and said.read_text() == "in the middle\n", child
        )
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
    finally:
        child.kill()
    assert decompress(path).equal(old)


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, words):
        raise OSError("no space left")

    monkeypatch.setattr(IndependentColumns, "encode_rows", fail)
    with pytest.raises(OSError, match="no space left"):
        compress(mixed(), tmp_path / "code")
    assert list(tmp_path.iterdir()) == []


def test_without_the_coder_the_extra_is_named(tmp_path, monkeypatch):
    compress(mixed(), tmp_path / "code")
    monkeypatch.setitem(sys.modules, "constriction", None)
    for call in (lambda: compress(mixed(), tmp_path / "no"), lambda: decompress(tmp_path / "code")):
        with pytest.raises(ImportError, match=r"pip install 'bae-fast\[compress\]'"):
            call()
    assert not (tmp_path / "no").exists()


# -- the commands ------------------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """``bae-fast compress`` on a tiny language model, trained there."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("compress")
    model = save_tiny_model(folder / "model", WORDS)
    order = torch.randint(len(WORDS), (9000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    arguments = [
        "compress", "--model", str(model), "--hook", "model.layers.0",
        "--text", str(folder / "text.txt"), "--context", "16", "--expansion", "2",
        "--steps", "25", "--batch-size", "64", "--device", "cpu", "--no-progress",
        "--cache", str(folder / "cache"),
    ]  # fmt: skip
    assert main([*arguments, "--out", str(folder / "out")]) == 0
    return arguments, folder / "out"


def test_the_report_says_what_the_file_holds(ran):
    arguments, out = ran
    result = json.loads((out / "compress.json").read_text())
    bae = bf.BinaryAutoencoder.from_pretrained(out / "model")
    cache = ActivationCache.open(next(Path(arguments[-1]).glob("*layers.0-*")))
    rows = cache.rows.float()
    code = decompress(out / "codes.bae")
    assert code.equal(bae.encode(rows))
    with torch.no_grad():
        recon = bae.decode(code)
    assert result["fvu"] == pytest.approx(fvu(rows, recon), rel=1e-5)
    heldout = slice(cache.split(4096).heldout.start, None)
    assert result["fvu_heldout"] == pytest.approx(fvu(rows[heldout], recon[heldout]), rel=1e-5)
    on_disk = 8 * (out / "codes.bae").stat().st_size / len(rows)
    assert result["size"]["bits_a_row"] == pytest.approx(on_disk)
    assert result["bound_bits_a_row"] == pytest.approx(float(code.entropy()), rel=1e-6)
    assert result["ratio_to_bfloat16"] == pytest.approx(16 * rows.shape[1] / on_disk)
    names = {row["name"]: row for row in result["quantised"]}
    assert names["int8"]["fvu"] < names["int4"]["fvu"] < names["int2"]["fvu"]
    for name in ("entropy coded", "PCA, entropy coded"):
        assert names[name]["fvu"] == pytest.approx(result["fvu"], rel=0.02)
    assert "| **code, on disk** |" in (out / "compress.md").read_text()
    assert (out / "compress.png").read_bytes().startswith(b"\x89PNG")


def test_a_loaded_model_compresses_the_heldout_rows(ran, tmp_path):
    arguments, out = ran
    again = ["--load", str(out / "model"), "--rows", "heldout", "--block-rows", "500"]
    assert main([*arguments, *again, "--out", str(tmp_path)]) == 0
    every, part = decompress(out / "codes.bae"), CompressedCode.open(tmp_path / "codes.bae")
    assert part.block_rows == 500
    assert part.code().equal(every[-len(part) :])
    result = json.loads((tmp_path / "compress.json").read_text())
    assert result["fvu"] == result["fvu_heldout"]


def test_decompress_writes_the_code_or_the_reconstructions(ran, tmp_path):
    _, out = ran
    code = decompress(out / "codes.bae")
    target = tmp_path / "code.safetensors"
    assert main(["decompress", str(out / "codes.bae"), "--out", str(target)]) == 0
    assert bf.BinaryCode.load(target).equal(code)
    target = tmp_path / "rows.safetensors"
    call = ["decompress", str(out / "codes.bae"), "--load", str(out / "model")]
    assert main([*call, "--out", str(target)]) == 0
    with torch.no_grad():
        expected = bf.BinaryAutoencoder.from_pretrained(out / "model").decode(code)
    rows = load_file(target)["rows"]
    assert torch.allclose(rows, expected, rtol=1e-5, atol=1e-5)
    assert main([*call, "--out", str(target), "--dtype", "bfloat16"]) == 0
    assert torch.allclose(load_file(target)["rows"].float(), expected, rtol=1e-2, atol=1e-2)


def test_what_a_user_can_mend_is_one_line(ran, tmp_path, capsys):
    arguments, out = ran
    narrow, other = tmp_path / "narrow", tmp_path / "other"
    bf.BinaryAutoencoder(8, 16).save_pretrained(narrow)
    bf.BinaryAutoencoder.from_pretrained(out / "model").save_pretrained(other)
    file = str(out / "codes.bae")
    for call, message in (
        ([*arguments, "--load", str(narrow), "--out", str(tmp_path)], "it is of width 8"),
        ([*arguments, "--load", str(tmp_path / "no"), "--out", str(tmp_path)], "does not exist"),
        (["decompress", file, "--load", str(narrow)], "has 16 columns of 1 bits"),
        (["decompress", file, "--load", str(other)], "is not the model"),
        (["decompress", file, "--out", file], "is the file that is read"),
        (["decompress", str(narrow / "cfg.json")], "is not a compressed code"),
    ):
        capsys.readouterr()
        assert main(call) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"bae-fast {call[0]}: ")
        assert message in error
        assert "\n" not in error
