"""GGUF files: their header, their dequantised copies, what is known of files at rest."""

from __future__ import annotations

import os
import struct
import time

import pytest
import torch
from language_models import TEXT, model_of

from bae_fast.lm import gguf as gguf_copies
from bae_fast.lm import known as known_files
from bae_fast.lm import load_language_model, load_tokenizer, model_digest
from bae_fast.lm import loading as model_loading


def gguf_file(changes=()):
    """A GGUF file of one tensor [4, 4] of float32, with numbers put at some places of it."""

    def text(value):
        return struct.pack("<Q", len(value)) + value

    parts = {
        "start": b"GGUF",
        "version": struct.pack("<I", 3),
        "tensors": struct.pack("<Q", 1),
        "values": struct.pack("<Q", 3),
        "key": text(b"general.name"),
        "kind": struct.pack("<I", 8),
        "string": text(b"tiny"),
        "numbers": text(b"numbers") + struct.pack("<II", 9, 5),
        "n_numbers": struct.pack("<Q", 2),
        "words": struct.pack("<ii", 1, 2) + text(b"words") + struct.pack("<II", 9, 8),
        "n_words": struct.pack("<Q", 2),
        "name": text(b"a") + text(b"bc") + text(b"weight"),
        "n_dimensions": struct.pack("<I", 2),
        "rows": struct.pack("<Q", 4),
        "columns": struct.pack("<Q", 4) + struct.pack("<I", 0),
        "offset": struct.pack("<Q", 0),
    }
    for name, value in dict(changes).items():
        form = "<I" if name in ("version", "kind", "n_dimensions") else "<Q"
        parts[name] = struct.pack(form, value) + parts[name][struct.calcsize(form) :]
    header = b"".join(parts.values())
    return header + bytes(-len(header) % 32) + torch.arange(16.0).numpy().tobytes()


def test_a_header_of_gguf_is_walked_as_its_library_reads_it(tmp_path):
    reader = pytest.importorskip("gguf").GGUFReader
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file())
    gguf_copies.check_header(path)
    (tensor,) = reader(path).tensors
    assert (tensor.name, tensor.data.tolist()) == ("weight", torch.arange(16.0).view(4, 4).tolist())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 9}, "must be of GGUF version 2 or 3; got 9"),
        ({"tensors": 10**19}, "is cut off or damaged"),
        ({"values": 4}, "damaged"),
        ({"values": 10**19}, "damaged"),
        ({"key": 10**19}, "its header counts 10,000,000,000,000,000,000 bytes"),
        ({"kind": 77}, "is of the kind 77, which GGUF lacks"),
        ({"n_numbers": 10**19}, "40,000,000,000,000,000,000 bytes, and"),
        ({"n_words": 10**19}, "is cut off or damaged"),
        ({"n_dimensions": 2**32 - 1}, "has 4,294,967,295 dimensions, and 8 are allowed"),
        ({"rows": 10**19}, "bytes of weights more than it has"),
        ({"rows": 5}, "its header counts 16 bytes of weights more than it has"),
        ({"offset": 10**19}, "bytes of weights more than it has"),
    ],
)
def test_counts_of_gguf_are_bounded_by_the_file(changes, said, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file(changes))
    with pytest.raises(ValueError, match=said) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_within_arrays_of_gguf_have_an_end(tmp_path):
    depth = 100_000
    key = struct.pack("<Q", 4) + b"deep" + struct.pack("<I", 9)
    nested = depth * struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + nested)
    with pytest.raises(ValueError, match="arrays lie in more than 8 others"):
        gguf_copies.check_header(path)


def test_a_header_of_gguf_is_walked_once_as_long_as_the_file_is_the_same(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    path, walks = tmp_path / "weights.gguf", []
    walk = gguf_copies._Header.check
    monkeypatch.setattr(
        gguf_copies._Header, "check", lambda header: (walks.append(0), walk(header))[1]
    )
    path.write_bytes(gguf_file())
    gguf_copies.check_header(path)
    gguf_copies.check_header(path)
    assert len(walks) == 1
    path.write_bytes(gguf_file({"rows": 5}))
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="16 bytes of weights more"):
        gguf_copies.check_header(path)
    assert len(walks) == 2


@pytest.mark.parametrize("size", [0, 3, 4, 20, 100])
def test_a_cut_gguf_file_is_one_line(size, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file()[:size])
    with pytest.raises(ValueError, match=r"weights.gguf (does not begin as|is cut off)"):
        load_tokenizer(str(path))


def test_a_dequantised_copy_is_whole_or_absent(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"stands for the weights")
    model = model_of("llama", tokenizer)
    assert gguf_copies.copy_of(path, torch.float32) is None
    assert gguf_copies.can_keep_copy(path, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", _full_disk)
        with pytest.warns(RuntimeWarning, match=r"weights.gguf is not kept.*No space left"):
            gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    assert list((tmp_path / "cache" / "bae_fast" / "models").iterdir()) == []
    gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    folder = gguf_copies.copy_of(path, torch.float32)
    lm = load_language_model(str(folder), dtype="float32")
    assert torch.equal(lm.model.lm_head.weight, model.lm_head.weight)
    assert lm.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    path.write_bytes(b"other weights, same name")
    os.utime(path, (time.time() + 5,) * 2)
    assert gguf_copies.copy_of(path, torch.float32) is None
    with pytest.warns(RuntimeWarning, match="bytes free and"):
        assert not gguf_copies.can_keep_copy(path, 10**18)


def _rewrite(path, content):
    """Write a file in place, with its old time of modification, once the clock has ticked."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def at_rest(monkeypatch, tmp_path):
    """Whatever is kept is kept here, of files that were written just now too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_files, "AT_REST", -(10.0**6))


def test_a_value_of_files_is_kept_until_one_of_them_changes(at_rest, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.write_bytes(b"123")
    looked = known_files.Known("sum", [first, second], "float32")
    assert looked.value() is None
    looked.keep("12")
    assert known_files.Known("sum", [first, second], "float32").value() == "12"
    for other in (("sum", [first], "float32"), ("sum", [first, second]), ("mean", [first, second])):
        assert known_files.Known(*other).value() is None
    # same size, same name, same time of modification
    _rewrite(second, b"124")
    changed = known_files.Known("sum", [first, second], "float32")
    assert changed.value() is None
    # a file that changes while it is read
    _rewrite(second, b"125")
    changed.keep("13")
    now = known_files.Known("sum", [first, second], "float32")
    assert now.value() is None
    # a file that may change once more within a tick of the clock
    monkeypatch.setattr(known_files, "AT_REST", 10.0**6)
    known_files.Known("sum", [first, second], "float32").keep("14")
    assert now.value() is None
    now.keep("14")
    assert known_files.Known("sum", [first, second], "float32").value() == "14"
    (kept,) = (tmp_path / "cache" / "bae_fast" / "digests").iterdir()
    kept.write_text('{"files":')
    assert now.value() is None
    # another file put in one's place
    now.keep("14")
    third = tmp_path / "c"
    third.write_bytes(b"123")
    os.utime(third, ns=(0, first.stat().st_mtime_ns))
    third.rename(first)
    assert known_files.Known("sum", [first, second], "float32").value() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(third.parent / "b" / "no folder"))
    nowhere = known_files.Known("sum", [first])
    nowhere.keep("6")
    assert nowhere.value() is None


def test_a_dequantised_copy_is_read_through_once(at_rest, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"stands for the weights")
    model = model_of("llama", tokenizer)
    assert gguf_copies.can_keep_copy(path, 1000)
    gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    hashed, summed = [], []
    file_digest, model_digest_ = known_files.file_digest, model_loading.model_digest
    monkeypatch.setattr(
        known_files, "file_digest", lambda *given: hashed.append(given) or file_digest(*given)
    )
    monkeypatch.setattr(
        model_loading, "model_digest", lambda given: summed.append(given) or model_digest_(given)
    )
    lms = [load_language_model(str(path), dtype="float32") for _ in range(3)]
    assert (len(hashed), len(summed)) == (0, 1)  # the file was hashed for the copy
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for lm in lms:
        held = {**dict(lm.model.named_parameters()), **dict(lm.model.named_buffers())}
        assert held.keys() == own.keys()
        assert all(torch.equal(held[name], own[name]) for name in own)
        assert lm.loaded == model_digest(lm.model)
        assert lm.current_revision() == lm.revision
    # weights are mapped: what is changed in memory is seen, and does not reach the file
    with torch.no_grad():
        lms[2].model.lm_head.weight[3, 4] += 1
    assert lms[2].current_revision() == f"{lms[2].revision}+{model_digest(lms[2].model)}"
    assert lms[1].current_revision() == lms[1].revision
    # the copy's own weights are written anew, then the file is
    folder = gguf_copies.copy_of(path, torch.float32)
    lms[2].model.save_pretrained(folder)
    summed.clear()
    edited = load_language_model(str(path), dtype="float32")
    assert len(summed) == 1
    assert edited.loaded == model_digest(edited.model) != lms[0].loaded
    _rewrite(path, b"Stands for the weights")
    assert gguf_copies.copy_of(path, torch.float32) is None
    assert len(hashed) == 1


def _full_disk(*_arguments, **_options):
    raise OSError(28, "No space left on device")
