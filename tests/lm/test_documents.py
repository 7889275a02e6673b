"""Text from files, folders and datasets: every token once, and read on from any place."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_lm import LetterTokenizer, places_lm

from bae_fast.lm import (
    DatasetText,
    TextFiles,
    TextWindows,
    TokenWindows,
    documents,
    harvest_shards,
    read_text,
)

TOKENIZER = LetterTokenizer()
END = TOKENIZER.eos_token_id


class BeginningTokenizer(LetterTokenizer):
    """One that begins every text with a token of its own."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


class Streamed:
    """What a streamed dataset of Hugging Face has: rows in order, and a state of plain values."""

    def __init__(self, texts):
        self.texts, self.at = texts, 0

    def __iter__(self):
        while self.at < len(self.texts):
            self.at += 1
            yield {"body": self.texts[self.at - 1]}

    def state_dict(self):
        return {"examples": {"n": self.at}}

    def load_state_dict(self, state):
        self.at = state["examples"]["n"]


def texts(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (n,), generator=generator).tolist()
    return [
        "".join(map(chr, torch.randint(97, 122, (length,), generator=generator).tolist()))
        for length in lengths
    ]


def ids_of(documents, end=END):
    return [i for text in documents for i in [*TOKENIZER(text)["input_ids"], end]]


def folder_of(path, documents):
    for i, text in enumerate(documents):
        (path / f"{i:03d}.txt").write_text(text)
    return TextFiles(path)


def lines_of(path, documents):
    lines = [json.dumps({"body": text}) + "\n" for text in documents]
    (path / "all.jsonl").write_text("\n".join(lines))  # empty lines between
    return TextFiles(path / "all.jsonl", field="body")


SOURCES = {
    "a folder": folder_of,
    "lines": lines_of,
    "a streamed dataset": lambda _, documents: DatasetText(Streamed(documents), field="body"),
    "numbered rows": lambda _, found: DatasetText([{"body": t} for t in found], field="body"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_windows_are_the_documents_tokens_one_after_the_other(tmp_path, source):
    text = TextWindows(TOKENIZER, SOURCES[source](tmp_path, texts()), 7)
    want = ids_of(texts())
    read = torch.cat([text.read(n) for n in (1, 3, 0, 10, 1000, 5)])
    assert read.flatten().tolist() == want[: len(want) // 7 * 7]


@pytest.mark.parametrize("source", SOURCES)
def test_reading_goes_on_from_every_place(tmp_path, source):
    def made():
        return TextWindows(TOKENIZER, SOURCES[source](tmp_path, texts()), 7)

    text, states, read = made(), [], []
    while True:
        states.append(json.loads(json.dumps(text.state_dict())))
        part = text.read(2)
        if not len(part):
            break
        read.append(part)
    for i, state in enumerate(states):
        assert state["window"] == sum(map(len, read[:i]))
        other = made()
        other.read(4)
        other.load_state_dict(state)
        assert other.read(1000).tolist() == [w for part in read[i:] for w in part.tolist()]


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    text = TextWindows(BeginningTokenizer(), DatasetText([{"text": t} for t in texts()]), 7)
    read = text.read(1000)
    assert set(read[:, 0].tolist()) == {1}
    want = ids_of(texts())
    assert read[:, 1:].flatten().tolist() == want[: len(want) // 6 * 6]


class MarkedTokenizer(BeginningTokenizer):
    """One whose beginning token may be written in a text, as ^."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        marked = [
            1 if c == "^" else i for c, i in zip(text, TOKENIZER(text)["input_ids"], strict=True)
        ]
        return {"input_ids": [1, *marked] if add_special_tokens else marked}


@pytest.mark.parametrize("n", [1, 2, 100])
def test_a_text_that_begins_with_the_beginning_token_has_it_once(n):
    def text(first):
        documents = [first + "abcdefghijk", "^lmnop"]
        return TextWindows(MarkedTokenizer(), DatasetText([{"text": t} for t in documents]), 7)

    marked, plain = text("^"), text("")
    for _ in range(4):
        got = marked.read(n)
        assert torch.equal(got, plain.read(n))
        state, marked = marked.state_dict(), text("^")
        marked.load_state_dict(state)


def test_a_number_of_windows_ends_the_text():
    text = TextWindows(TOKENIZER, DatasetText([{"text": t} for t in texts()]), 7, n_windows=3)
    assert [len(text.read(2)) for _ in range(3)] == [2, 1, 0]


def test_a_large_file_is_read_in_pieces_between_characters_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 32)
    words = "\ufeff" + "naïve façade: ελληνικά\n" * 9 + "日本語のテキスト" * 9
    path = tmp_path / "text.txt"
    path.write_text(words, encoding="utf-8")
    pieces = list(TextFiles(path).pieces())
    assert "".join(piece.text for piece in pieces) == words[1:]
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 10


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", [*COMPRESSIONS, ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, monkeypatch, ending, kind):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 64)
    compress = COMPRESSIONS.get(ending)
    if compress is None:
        compress = pytest.importorskip("zstandard").compress
    body = " ".join(texts(20)) + "\n"
    data = (json.dumps({"text": body}) + "\n") * 3 if kind == ".jsonl" else body
    plain, packed = tmp_path / ("a" + kind), tmp_path / ("b" + kind + ending)
    plain.write_text(data)
    packed.write_bytes(compress(data.encode()))
    want = list(TextFiles(plain).pieces())
    assert list(TextFiles(packed).pieces()) == want
    assert read_text(packed) == read_text(plain)
    # and read on from behind the first piece
    text = TextFiles(packed)
    next(text.pieces())
    state = text.state_dict()
    text.load_state_dict(state)
    assert list(text.pieces()) == want[1:]
    assert TextFiles(tmp_path).files == [plain, packed]
    assert TextFiles(packed).identity() != TextFiles(plain).identity()


@pytest.mark.parametrize("read", [read_text, lambda path: list(TextFiles(path).pieces())])
@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.txt.gz", b"plain", ValueError, "cannot be decompressed: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], ValueError, "cannot be decompressed"),
        ("a.txt.bz2", b"plain", ValueError, "cannot be decompressed"),
        ("a.txt.xz", b"plain", ValueError, "cannot be decompressed"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), ValueError, ".tar is an archive: unpack it"),
        ("a.zip", b"PK", ValueError, ".zip is an archive: unpack it"),
        ("a.txt.zst", b"x", ImportError, "needs the package zstandard: pip install zstandard"),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    tmp_path, monkeypatch, read, name, data, error, message
):
    if name.endswith(".zst"):
        monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_a_folder_come_sorted_and_others_are_left_out(tmp_path):
    for name in ("b.txt", "a/c.md", "a/b.jsonl", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in TextFiles(tmp_path).files]
    assert found == ["a/b.jsonl", "a/c.md", "b.txt"]


def test_a_changed_text_is_another_one(tmp_path):
    one = folder_of(tmp_path, texts()).identity()
    assert folder_of(tmp_path, texts()).identity() == one
    assert folder_of(tmp_path, texts(seed=1)).identity() != one


@pytest.mark.parametrize("change", ["written", "replaced"])
def test_a_text_that_changes_behind_its_digest_is_refused(tmp_path, change):
    text = folder_of(tmp_path, texts())
    text.identity()
    assert len(list(text.pieces())) > 0
    path = text.files[-1]
    body = path.read_bytes()
    if change == "replaced":  # by as many bytes of the same time
        before = path.stat()
        path.rename(tmp_path / "old")
        path.write_bytes(bytes(reversed(body)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path.write_bytes(body + b" more")
    text.load_state_dict({"file": 0, "at": 0})
    with pytest.raises(ValueError, match=f"{path.name} must stay as it is while it is read"):
        list(text.pieces())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_the_digest_of_a_text_in_memory_is_of_the_bytes_that_were_read(tmp_path, monkeypatch, name):
    path = tmp_path / name
    data = b'{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reads = []
    read_bytes = Path.read_bytes

    def counted(path):
        reads.append(path)
        found = read_bytes(path)
        path.write_bytes(b"another text")  # as soon as it has been read
        return found

    identity = TextFiles(path).identity()
    want = read_text(path)
    monkeypatch.setattr(Path, "read_bytes", counted)
    digest = hashlib.sha256()
    assert read_text(path, digest=digest) == want
    assert digest.hexdigest() == identity["sha256"]
    assert reads == [path]


def test_an_experiment_reads_its_text_once(tmp_path, monkeypatch):
    from bae_fast.experiments import data, demo

    text = folder_of(tmp_path, texts())
    want = text.identity()["sha256"]
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    monkeypatch.setattr(TextFiles, "identity", None)  # it reads, too
    windows, facts = data.read_windows(
        demo.Config(text=(str(tmp_path),), context=8), LetterTokenizer()
    )
    assert len(windows)
    assert facts["text_sha256"] == want
    assert reads == text.files


def test_shards_of_documents_are_those_of_their_windows_whoever_makes_them(tmp_path):
    def made(name, text, **options):
        return harvest_shards(
            places_lm(),
            text,
            ["first"],
            tmp_path / name,
            shard_windows=6,
            progress=False,
            **options,
        )

    def text():
        return TextWindows(TOKENIZER, folder_of(tmp_path, texts(40)), 7)

    tokens = text().read(10_000)
    want = made("tensor", TokenWindows(tokens))
    for name, options in (("one", {}), ("other", {"rank": 2, "world": 3})):
        got = made(name, text(), **options)
        assert got.n_windows == len(tokens)
        for i in range(len(want.shards)):
            path = f"first/shard-{i:05d}.safetensors"
            assert (got.folder / path).read_bytes() == (want.folder / path).read_bytes()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda p: TextFiles(p / "no"), ValueError, "paths must name text files .* is missing"),
        (lambda p: TextFiles(p), ValueError, "is a folder without .txt"),
        (lambda p: TextFiles([]), ValueError, "paths must name at least one file; got none"),
        (lambda p: DatasetText(iter([])), TypeError, "dataset must have state_dict and load_state"),
        (
            lambda p: TextWindows(TOKENIZER, DatasetText([]), 1),
            ValueError,
            "context_size must be an int >= 2; got 1",
        ),
        (
            lambda p: TextWindows(TOKENIZER, DatasetText([{"text": 5}]), 4).read(1),
            ValueError,
            "must have text in the field 'text'; row 0 has int",
        ),
        (
            lambda p: harvest_shards(
                places_lm(), TextWindows(TOKENIZER, DatasetText([]), 4), ["first"], p
            ),
            ValueError,
            "text must give at least one window; got none",
        ),
    ],
)
def test_what_is_not_allowed_is_said(tmp_path, make, error, text):
    with pytest.raises(error, match=text):
        make(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", b"fine \xff", "must be UTF-8 text, .* byte 5 is not"),
        ("a.jsonl", b'{"text": "x"}\n{"other": 1}\n', "with the field 'text' in every line"),
        ("a.jsonl", b'{"text": 3}\n', "must hold text in the field 'text'; got int"),
        ("a.jsonl", b"[", "with the field 'text' in every line"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=text) as raised:
        list(TextFiles(tmp_path).pieces())
    assert str(tmp_path / name) in str(raised.value)
