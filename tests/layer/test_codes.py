"""BinaryCode against dense tensors, and its file."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import bae_fast as bf
from bae_fast import codes, packing
from bae_fast.codes import keep_signs
from bae_fast.ops import registry


def make(shape=(70, 100), density=0.3, **options):
    bits = torch.rand(shape) < density
    return bits, bf.BinaryCode.from_dense(bits, **options)


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 4, 70), (64, 64)])
def test_shape_counts_density_and_contents_equal_the_dense_bits(shape):
    bits, code = make(shape)
    flat = bits.flatten(0, -2)
    assert code.shape == bits.shape
    assert len(code) == shape[0]
    assert torch.equal(code.to_dense(), bits)
    assert torch.equal(code.counts(), flat.sum(0))
    assert torch.equal(code.density(), flat.double().mean(0))
    assert torch.equal(code.l0(), bits.sum(-1))
    assert torch.equal(code.indices(), bits.nonzero())
    assert code.nbytes == flat.shape[0] * math.ceil(shape[-1] / 32) * 4


def test_entropy_is_the_pooled_sum_of_binary_entropies():
    bits, code = make((200, 40))
    p = bits.numpy().mean(0)
    expected = sum(
        -q * math.log2(q + 1e-10) - (1 - q) * math.log2(1 - q + 1e-10) for q in p.tolist()
    )
    assert code.entropy().dtype == torch.float64
    assert float(code.entropy()) == pytest.approx(expected, rel=1e-12)


def test_masked_rows_are_not_counted():
    bits, _ = make((50, 20))
    keep = torch.rand(50) < 0.6
    code = bf.BinaryCode.from_dense(bits & keep[:, None])
    masked = bf.BinaryCode(code.words, 20, row_mask=keep)
    assert int(masked.n_rows()) == int(keep.sum())
    assert torch.equal(masked.density(), bits[keep].double().mean(0))
    assert torch.equal(masked[10:30].row_mask, keep[10:30])


@pytest.mark.parametrize(
    "rows", [3, -1, slice(5, 40, 3), [1, 5, 5], torch.tensor([9, 0]), torch.arange(70) % 3 == 0]
)
def test_indexing_selects_rows(rows):
    bits, code = make()
    assert torch.equal(code[rows].to_dense(), bits[rows])


@pytest.mark.parametrize("rows", [[True, False] * 35, np.arange(70) % 2 == 0])
def test_bools_of_any_kind_are_a_mask(rows):
    bits, code = make()
    assert torch.equal(code[rows].to_dense(), bits[::2])


def test_a_mask_of_several_leading_dimensions_selects_rows():
    bits, code = make((4, 10, 45))
    keep = torch.rand(4, 10) < 0.5
    assert torch.equal(code[keep].to_dense(), bits[keep])


@pytest.mark.parametrize(
    "rows", [np.int64(3), torch.tensor(3), torch.tensor([3], dtype=torch.uint8)]
)
def test_integers_of_any_kind_are_rows(rows):
    bits, code = make()
    assert torch.equal(code[rows].to_dense().view(-1), bits[3])


def test_an_empty_selection_is_empty():
    _, code = make()
    assert len(code[[]]) == len(code[5:5]) == 0
    assert torch.equal(code[[]].counts(), torch.zeros(100, dtype=torch.int64))


@pytest.mark.parametrize("rows", [(1, 2), True, "3", 1.5, torch.rand(3), torch.ones(70, 100) > 0])
def test_what_is_not_rows_does_not_index(rows):
    _, code = make()
    with pytest.raises(TypeError, match="indexed by rows"):
        code[rows]


def test_counts_handed_out_are_the_callers_own():
    out = bf.binary_autoencoder(
        torch.randn(9, 4), torch.randn(4, 40), torch.zeros(40), torch.randn(40, 4), torch.zeros(4)
    )
    expected = out.code.counts().clone()
    counts = out.code.counts()
    counts += 1
    assert torch.equal(out.code.counts(), expected)


def test_bits_of_rows_that_are_dropped_afterwards_do_not_count(tmp_path):
    dense, code = make((30, 70))
    keep = torch.rand(30) < 0.5
    masked = bf.BinaryCode(code.words, 70, row_mask=keep)
    assert torch.equal(masked.counts(), dense[keep].sum(0))
    assert torch.equal(masked.density(), code[keep].density())
    assert masked.entropy() == code[keep].entropy()
    assert not masked.l0()[~keep].any()
    assert code.equal(bf.BinaryCode.from_dense(dense))  # a copy was changed
    save_file({"words": code.words, "row_mask": keep}, tmp_path / "code", {
        "format": "bae_fast.binary_code", "version": "1", "n_columns": "70", "n_bits": "1",
    })  # fmt: skip
    assert bf.BinaryCode.load(tmp_path / "code") == masked


def test_cat_joins_rows_and_masks_and_refuses_other_widths():
    a, code_a = make((5, 33))
    b, code_b = make((7, 33))
    assert torch.equal(bf.BinaryCode.cat([code_a, code_b]).to_dense(), torch.cat([a, b]))
    keep = torch.tensor([True, False, True, True, True])
    masked = bf.BinaryCode(code_a.words, 33, row_mask=keep)
    joined = bf.BinaryCode.cat([masked, code_b])
    assert joined.row_mask.tolist() == keep.tolist() + [True] * 7
    with pytest.raises(ValueError, match="codes must agree"):
        bf.BinaryCode.cat([code_a, make((5, 34))[1]])
    with pytest.raises(ValueError, match="not be empty"):
        bf.BinaryCode.cat([])


def test_single_states_are_stacked():
    dense = torch.rand(5, 40) < 0.3
    code = bf.BinaryCode.from_dense(dense)
    assert bf.BinaryCode.stack([code[i] for i in range(5)]) == code
    batches = list(torch.utils.data.DataLoader(code, 2, collate_fn=bf.BinaryCode.stack))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert bf.BinaryCode.cat(batches) == code
    both = bf.BinaryCode.stack([code, code])
    assert both.shape == (2, 5, 40)
    masked = bf.BinaryCode(torch.zeros(40, dtype=torch.int32), 40 * 32, row_mask=torch.tensor(True))
    assert int(bf.BinaryCode.stack([masked, masked]).n_rows()) == 2
    with pytest.raises(ValueError, match=r"codes must have rows.*stack joins those"):
        bf.BinaryCode.cat([code[0]])


def test_ones_of_a_row_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr(codes, "_L0_WORDS", 5)
    dense = torch.rand(3, 7, 70) < 0.3
    assert torch.equal(bf.BinaryCode.from_dense(dense).l0(), dense.sum(-1))
    assert torch.equal(bf.BinaryCode.from_dense(dense[0, 0]).l0(), dense[0, 0].sum())
    assert bf.BinaryCode(torch.zeros(0, 3, dtype=torch.int32), 70).l0().shape == (0,)


def test_multibit_values_weigh_bits_least_significant_first():
    bits, code = make((30, 12), n_bits=3)
    dense = bits.numpy().reshape(30, 4, 3).astype(float)
    expected = (dense * np.array([1, 2, 4]) / 7).sum(-1)
    assert code.n_features == 4
    np.testing.assert_allclose(code.values(torch.float64).numpy(), expected, rtol=1e-15)


def test_codes_of_the_same_bits_are_equal_and_those_of_others_are_not():
    bits, code = make()
    same = bf.BinaryCode.from_dense(bits)
    assert code == same
    assert hash(code) == hash(same)
    assert same in [code]
    others = [
        bf.BinaryCode.from_dense(~bits),
        bf.BinaryCode.from_dense(bits, n_bits=4),
        bf.BinaryCode(code.words, 100, row_mask=torch.arange(70) > 3),
        code[:3],
    ]
    for other in others:
        assert code != other
    assert code != "a code"


def test_a_code_moves_and_has_no_dtype():
    _, code = make()
    assert code.to("cpu") == code
    with pytest.raises(TypeError, match=r"device must be a device; got torch.float32: to_dense"):
        code.to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3])
def test_words_of_one_column_may_have_any_stride(n, dtype, tmp_path):
    bits, code = make((n, 20))
    words = code.words.clone().as_strided((n, 1), (1, 7))
    odd = bf.BinaryCode(words, 20)
    assert odd.words.stride() != code.words.stride()
    assert odd == code
    assert torch.equal(odd.to_dense(), bits)
    assert bf.BinaryCode.load(odd.save(tmp_path / "code.safetensors")) == code
    bae = bf.BinaryAutoencoder(4, 20, dtype=dtype)
    assert torch.equal(bae.decode(odd), bae.decode(code))


def test_save_and_load_keep_every_bit_and_the_mask(tmp_path):
    bits, _ = make((40, 3, 37))
    keep = torch.rand(40, 3) < 0.5
    code = bf.BinaryCode.from_dense(bits & keep[..., None])
    code = bf.BinaryCode(code.words, 37, row_mask=keep)
    path = code.save(tmp_path / "deep" / "code.safetensors", {"hook": "layer 3"})
    assert bf.BinaryCode.load(path).equal(code)
    assert bf.BinaryCode.read_metadata(path) == {"hook": "layer 3"}
    assert [p.name for p in path.parent.iterdir()] == ["code.safetensors"]
    with safe_open(path, "pt") as file:
        on_disk = file.get_tensor("words").numpy()
    packed = np.packbits(code.to_dense().numpy(), axis=-1, bitorder="little")
    np.testing.assert_array_equal(on_disk.view(np.uint8)[..., : packed.shape[-1]], packed)


def test_loading_refuses_foreign_truncated_and_inconsistent_files(tmp_path):
    path = tmp_path / "code.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        bf.BinaryCode.load(path)
    save_file({"words": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="not a saved BinaryCode"):
        bf.BinaryCode.load(path)
    header = {"format": "bae_fast.binary_code", "version": "1", "n_columns": "37", "n_bits": "1"}
    save_file({"words": torch.full((3, 2), -1, dtype=torch.int32)}, path, header)
    with pytest.raises(ValueError, match="bits past column 37"):
        bf.BinaryCode.load(path)
    save_file({"words": torch.zeros(3, 2, dtype=torch.int32)}, path, {**header, "version": "9"})
    with pytest.raises(ValueError, match="version '9'"):
        bf.BinaryCode.load(path)
    save_file({"words": torch.zeros(3, 5, dtype=torch.int32)}, path, header)
    with pytest.raises(ValueError, match="not a valid BinaryCode"):
        bf.BinaryCode.load(path)
    make()[1].save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        bf.BinaryCode.load(path)


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "code.safetensors"
    _, old = make()
    old.save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make()[1].save(path)
    assert bf.BinaryCode.load(path).equal(old)
    assert [p.name for p in tmp_path.iterdir()] == ["code.safetensors"]


def test_integers_do_not_stand_for_the_values_of_several_bits():
    code = bf.BinaryCode.from_dense(torch.ones(2, 6), n_bits=3)
    with pytest.raises(TypeError, match=r"floating point for n_bits=3; got torch\.int64"):
        code.values(torch.int64)
    one = bf.BinaryCode.from_dense(torch.ones(2, 6))
    assert one.values(torch.int64).sum() == 12


def test_from_dense_names_what_is_no_dense_tensor():
    with pytest.raises(TypeError, match="bits must be a tensor; got list"):
        bf.BinaryCode.from_dense([[0, 1]])
    with pytest.raises(TypeError, match="bits must be a dense tensor; got a sparse_coo one"):
        bf.BinaryCode.from_dense(torch.eye(3).to_sparse())


def test_from_dense_refuses_values_that_are_not_bits():
    with pytest.raises(ValueError, match="only 0 and 1"):
        bf.BinaryCode.from_dense(torch.tensor([[0.0, 0.5]]))
    with pytest.raises(ValueError, match="only 0 and 1"):
        bf.BinaryCode.from_dense(torch.tensor([[0.0, float("nan")]]))


def test_constructor_names_what_is_wrong():
    words = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"words must be an int32 tensor; got torch\.int64"):
        bf.BinaryCode(words.long(), 40)
    with pytest.raises(ValueError, match="words must be"):
        bf.BinaryCode(words, 65)
    with pytest.raises(ValueError, match="n_bits must divide"):
        bf.BinaryCode(words, 40, n_bits=3)
    with pytest.raises(ValueError, match="row_mask must be bool"):
        bf.BinaryCode(words, 40, row_mask=torch.ones(4, dtype=torch.bool))
    for counts in (torch.zeros(40), torch.zeros(3, dtype=torch.int64)):  # kernels read 40 int64
        with pytest.raises(ValueError, match=r"counts must be int64 \[40\]; got torch"):
            bf.BinaryCode(words, 40, counts=counts)
    words[2, 1] = 1 << 8  # column 40: the covariance of such a code ended the process
    with pytest.raises(ValueError, match="words must have no bits past column 40; some are set"):
        bf.BinaryCode(words, 40)
    assert int(bf.BinaryCode(words, 41).counts()[40]) == 1


def counting(monkeypatch):
    """What was counted by a backend rather than in plain torch, filled as it happens."""
    calls = []

    def count(words, n_columns):
        calls.append(n_columns)
        return packing.column_counts(words, n_columns)

    backend = registry.BACKENDS["torch"]
    extras = dataclasses.replace(backend.extras, column_counts=count)
    monkeypatch.setitem(registry.BACKENDS, "torch", dataclasses.replace(backend, extras=extras))
    return calls


def test_counts_reach_what_the_backend_has_for_them(monkeypatch):
    calls = counting(monkeypatch)
    code = bf.BinaryCode.from_dense(torch.rand(3, 5, 40) < 0.4)
    right = code.to_dense(torch.int64).sum((0, 1))
    monkeypatch.setenv("BAE_FAST_IMPL", "torch")
    assert torch.equal(code.counts(), right)
    assert calls == [40]
    monkeypatch.setenv("BAE_FAST_IMPL", "reference")
    assert torch.equal(code.counts(), right)
    assert calls == [40]


@pytest.mark.parametrize("shape", [(0, 70), (1, 31), (130, 70), (2, 3, 64)])
def test_counts_are_the_same_by_every_choice(monkeypatch, shape):
    bits = torch.rand(shape) < 0.3
    right = bits.reshape(-1, shape[-1]).sum(0)
    for impl in ("auto", *registry.IMPLS[1:]):  # those for other devices count in plain torch
        monkeypatch.setenv("BAE_FAST_IMPL", impl)
        assert torch.equal(bf.BinaryCode.from_dense(bits).counts(), right), impl


def test_counts_are_traced_in_plain_torch():
    @torch.compile(fullgraph=True, backend="eager")
    def double(words):
        return 2 * bf.BinaryCode(words, 70).counts()

    bits = torch.rand(20, 70) < 0.3
    assert torch.equal(double(packing.pack_rows(bits)), 2 * bits.sum(0))


def test_sign_planes_have_a_share_of_a_gpus_memory(monkeypatch):
    """Making them again costs more than the rest of a step, and 1 GiB is little of 80."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(total_memory=memory),
    )
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    memory = 80 * 2**30
    assert keep_signs(65536, gpu)
    assert not keep_signs(2 * 65536, gpu)
    memory = 4 * 2**30
    assert keep_signs(32768, gpu)  # never less than on a CPU
    assert not keep_signs(65536, gpu)
    assert keep_signs(32768, cpu)
    assert not keep_signs(65536, cpu)
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", "0")
    assert not keep_signs(64, gpu)
