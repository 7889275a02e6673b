"""Windows of tokens, read one after the other: of a tensor, of files, of streamed datasets.

Documents are tokenized one by one and packed without gaps: behind each stands the tokenizer's
end-of-text token, where it has one, and a window may hold the end of one document and the
beginning of the next. Windows begin as the tokenizer begins a text, see
:func:`bae_fast.lm.windows`. Where the reading stands is a state of plain values.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.lm.cache import tokens_digest
from bae_fast.lm.inputs import bos_to_prepend, without_surrogates
from bae_fast.lm.text import (
    LINES,
    TEXT_FORMS,
    bytes_before,
    open_bytes,
    text_ending,
    text_files,
    text_of_line,
)

# a file is read and tokenized in pieces of so many bytes, cut at white space
_PIECE_BYTES = 1 << 20


class Windows(Protocol):
    """Windows of equally many tokens, in one order.

    Attributes:
        context_size: tokens a window.
        n_windows: how many there are; None where the end is not known before.
    """

    context_size: int
    n_windows: int | None

    def read(self, n: int) -> Tensor:
        """The next n windows, int64 ``[n, context_size]``; fewer at the end, then none."""

    def identity(self) -> dict[str, Any]:
        """What the text is, JSON values."""

    def source(self) -> dict[str, Any]:
        """Where the text is, JSON values, as :meth:`TextWindows.source` has them; may be empty."""

    def state_dict(self) -> dict[str, Any]:
        """Where the reading stands, JSON values; ``window`` is the number of the next one."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read on from a state."""


class TokenWindows:
    """Windows that are there as a tensor."""

    def __init__(self, tokens: Tensor, *, source: Mapping[str, Any] | None = None) -> None:
        """Take token windows, integers ``[n, context_size]``.

        Args:
            tokens: the windows.
            source: where they come from, for manifests; see :meth:`TextWindows.source`.

        Raises:
            TypeError: no tensor of integers.
            ValueError: another shape.
        """
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            kind = getattr(tokens, "dtype", type(tokens).__name__)
            raise TypeError(f"text must be an integer tensor or a reader of windows; got {kind}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(
                f"text must have shape [n_windows, context_size], neither zero; got "
                f"{list(tokens.shape)}"
            )
        self.tokens = tokens.cpu()
        self._source = dict(source or {})
        self.n_windows: int | None = len(tokens)
        self.context_size = tokens.shape[1]
        self._next = 0

    def read(self, n: int) -> Tensor:
        part = self.tokens[self._next : self._next + n].long()
        self._next += len(part)
        return part

    def identity(self) -> dict[str, Any]:
        return {"tokens_sha256": tokens_digest(self.tokens), "n_windows": self.n_windows}

    def source(self) -> dict[str, Any]:
        return dict(self._source)

    def state_dict(self) -> dict[str, Any]:
        return {"window": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = int(state["window"])


# -- documents ---------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Text of a document.

    Attributes:
        text: characters.
        ends: whether the document ends behind it.
    """

    text: str
    ends: bool


class Documents(Protocol):
    """Documents in one order."""

    def pieces(self) -> Iterator[Piece]:
        """Read on from where the reading stands."""

    def identity(self) -> dict[str, Any]:
        """What the documents are, JSON values."""

    def source(self) -> dict[str, Any]:
        """Where the documents are found again, JSON values; what is compared is the identity."""

    def state_dict(self) -> dict[str, Any]:
        """Where the reading stands, behind the last piece given out: JSON values; a copy."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read on from a state; iterators of before are not to be used any more."""


class TextFiles:
    """Files and folders of text: a file is a document; of .jsonl files every line is one."""

    def __init__(self, paths: str | Path | Sequence[str | Path], *, field: str = "text") -> None:
        """Find the files; of folders all .txt, .md, .rst, .jsonl and .ndjson in them, sorted.

        Files that end in .gz, .bz2, .xz or .zst behind that are decompressed as they are read.

        Args:
            paths: files and folders, in the order they are read.
            field: the field of a line of a .jsonl file that holds the text.

        Raises:
            ValueError: a path that is missing, or a folder without such a file.
        """
        self.field = field
        self.paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.files = text_files(self.paths)
        self._file = self._at = 0
        self._identity: dict[str, Any] | None = None
        # of each file, as its digest was made: another one may stand there when it is read
        self._states: dict[Path, tuple[int, ...]] = {}

    def pieces(self) -> Iterator[Piece]:
        """Read on from where the reading stands.

        Raises:
            ValueError: a file that is no text, or is another one than :meth:`identity` is of.
        """
        while self._file < len(self.files):
            path = self.files[self._file]
            by_line = text_ending(path) in LINES
            with path.open("rb") as raw, open_bytes(path, raw, self._at) as file:
                if self._states.get(path) not in (None, _state_of(raw)):
                    raise ValueError(f"{path} must stay as it is while it is read; it was changed")
                for data, ends in _lines(file) if by_line else _cut(file):
                    first, self._at = self._at == 0, self._at + len(data)
                    text = _decoded(data, path, self._at - len(data), first)
                    if not by_line:
                        yield Piece(text, ends)
                    elif text.strip():
                        yield Piece(text_of_line(text, path, self._at, self.field), True)
            self._file, self._at = self._file + 1, 0

    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            digest = hashlib.sha256()
            for path in self.files:
                with path.open("rb") as file:
                    self._states[path] = _state_of(file)
                    digest.update(bytes_before(path, self._states[path][0]))
                    while data := file.read(1 << 22):
                        digest.update(data)
            self._identity = {
                "files": len(self.files), "sha256": digest.hexdigest(), "field": self.field
            }  # fmt: skip
        return dict(self._identity)

    def source(self) -> dict[str, Any]:
        names = [str(path) for path in self.paths]
        return {"dataset_path": " ".join(names), "text_files": names, "text_field": self.field}

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "at": self._at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._file, self._at = int(state["file"]), int(state["at"])


def _state_of(file: IO[bytes]) -> tuple[int, ...]:
    """What changes when a file is written to, or replaced by another."""
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns, state.st_ino


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file, each a document."""
    for line in file:
        yield line, True


def _cut(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Pieces of a file, each up to a white space where there is one, and whether it is the last."""
    data = b""
    while True:
        data += file.read(_PIECE_BYTES + 1 - len(data))
        if len(data) <= _PIECE_BYTES:
            if data:
                yield data, True
            return
        cut = max(data.rfind(b"\n", 0, _PIECE_BYTES), data.rfind(b" ", 0, _PIECE_BYTES))
        if cut <= 0:  # no white space: between two characters
            cut = _PIECE_BYTES
            while cut > _PIECE_BYTES - 4 and data[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            cut -= data[cut - 1] >= 0xC0
        yield data[:cut], False
        data = data[cut:]


def _decoded(data: bytes, path: Path, at: int, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be {TEXT_FORMS}; byte {at + error.start:,} is not"
        ) from error


class DatasetText:
    """A dataset of Hugging Face, streamed or not, or anything with rows and a state.

    Example::

        data = datasets.load_dataset("HuggingFaceFW/fineweb", split="train", streaming=True)
        text = TextWindows(tokenizer, DatasetText(data, name="HuggingFaceFW/fineweb"))

    A streamed dataset should not be shuffled by itself: its buffer of rows is lost when it is
    resumed. Batches are shuffled later, by the supply of rows.
    """

    def __init__(self, dataset: Any, *, field: str = "text", name: str | None = None) -> None:
        """Take a dataset.

        Args:
            dataset: has ``state_dict`` and ``load_state_dict`` (streamed), or a length and numbers.
            field: the field of a row that holds the text.
            name: what it is called in manifests; None: as it calls itself.

        Raises:
            TypeError: rows that cannot be gone back to.
        """
        self._streamed = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        if not self._streamed and not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                "dataset must have state_dict and load_state_dict, or a length and numbered rows; "
                f"got {type(dataset).__name__}"
            )
        self.dataset, self.field = dataset, field
        self.name = name or str(
            getattr(getattr(dataset, "info", None), "dataset_name", None) or type(dataset).__name__
        )
        self._row = 0
        self._first = copy.deepcopy(dataset.state_dict()) if self._streamed else None

    def pieces(self) -> Iterator[Piece]:
        if self._streamed:
            for row in self.dataset:
                self._row += 1
                yield Piece(self._text(row), True)
            return
        while self._row < len(self.dataset):
            row = self.dataset[self._row]
            self._row += 1
            yield Piece(self._text(row), True)

    def _text(self, row: Any) -> str:
        text = row.get(self.field) if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            raise ValueError(
                f"dataset {self.name} must have text in the field {self.field!r}; row "
                f"{self._row - 1:,} has {type(text).__name__}"
            )
        return text

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"dataset": self.name, "field": self.field}
        split = getattr(self.dataset, "split", None)
        if split is not None:
            found["split"] = str(split)
        fingerprint = getattr(self.dataset, "_fingerprint", None)
        if isinstance(fingerprint, str):
            found["fingerprint"] = fingerprint
        return found

    def source(self) -> dict[str, Any]:
        return {"dataset_path": self.name}

    def state_dict(self) -> dict[str, Any]:
        state = copy.deepcopy(self.dataset.state_dict()) if self._streamed else None
        return {"row": self._row, "dataset": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._row = int(state["row"])
        if self._streamed:
            self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))


# -- windows of documents ----------------------------------------------------------------------


class TextWindows:
    """Windows of documents, tokenized as they are read.

    Example::

        text = TextWindows(lm.tokenizer, TextFiles("corpus/"), context_size=256)
        harvest_shards(lm, text, ["model.layers.11"], "cache/l11")
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Documents,
        context_size: int = 256,
        *,
        n_windows: int | None = None,
        prepend_bos: bool | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            tokenizer: see :func:`bae_fast.lm.windows`.
            documents: :class:`TextFiles` or :class:`DatasetText`.
            context_size: tokens a window, a beginning-of-text token included; at least 2.
            n_windows: stop behind so many; None: at the end of the text.
            prepend_bos: see :func:`bae_fast.lm.windows`.

        Raises:
            ValueError: a number out of range, or no beginning-of-text token where one is asked
                for.
        """
        check_int("context_size", context_size, 2)
        if n_windows is not None:
            check_int("n_windows", n_windows, 1)
        self.tokenizer, self.documents = tokenizer, documents
        self.context_size, self.n_windows = context_size, n_windows
        self._bos = bos_to_prepend(tokenizer, prepend_bos)
        end = getattr(tokenizer, "eos_token_id", None)
        self._end = end if isinstance(end, int) else None
        self._window = 0
        # pieces that are tokenized and not used up: (state before it, tokens)
        self._pieces: deque[tuple[dict[str, Any], list[int]]] = deque()
        self._used = 0  # tokens of the first of them that are gone
        self._ready = 0  # tokens left in all of them
        self._reader: Iterator[Piece] | None = None

    def read(self, n: int) -> Tensor:
        if self.n_windows is not None:
            n = min(n, self.n_windows - self._window)
        body = self.context_size - (self._bos is not None)
        self._fill(n * body)
        begins = self._window == self._used == 0 and self._pieces
        if begins and self._pieces[0][1][0] == self._bos:  # a text that begins with it has it once
            self._take(1)
            self._fill(n * body)
        n = max(min(n, self._ready // body), 0)
        ids = self._take(n * body)
        self._window += n
        out = torch.tensor(ids, dtype=torch.int64).view(n, body)
        if self._bos is not None:
            out = torch.cat([torch.full((n, 1), self._bos, dtype=torch.int64), out], dim=1)
        return out

    def _fill(self, n_tokens: int) -> None:
        while self._ready < n_tokens and self._more():
            pass

    def _take(self, n_tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < n_tokens:
            tokens = self._pieces[0][1]
            part = tokens[self._used : self._used + n_tokens - len(ids)]
            ids += part
            self._used += len(part)
            if self._used == len(tokens):
                self._pieces.popleft()
                self._used = 0
        self._ready -= len(ids)
        return ids

    def _more(self) -> bool:
        """Tokenize one more piece; False at the end of the text."""
        if self._reader is None:
            self._reader = self.documents.pieces()
        state = self.documents.state_dict()
        piece = next(self._reader, None)
        if piece is None:
            return False
        text = without_surrogates(piece.text)
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if piece.ends and self._end is not None:
            ids.append(self._end)
        if ids:
            self._pieces.append((state, ids))
            self._ready += len(ids)
        return True

    def identity(self) -> dict[str, Any]:
        return {
            **self.documents.identity(),
            "n_windows": self.n_windows,
            "bos_token": self._bos,
            "token_behind_documents": self._end,
        }

    def source(self) -> dict[str, Any]:
        """Where the text is, and how its windows are made again: JSON values for manifests.

        ``dataset_path``: its name; ``text_files`` and ``text_field``: paths as they were given;
        ``text_sha256``: the digest of the files; ``text_packed``: documents stand one behind the
        other; ``tokens``: where it ends; ``prepend_bos``.
        """
        return {
            **self.documents.source(),
            "text_packed": True,
            "text_sha256": self.documents.identity().get("sha256"),
            "tokens": None if self.n_windows is None else self.n_windows * self.context_size,
            "prepend_bos": self._bos is not None,
        }

    def state_dict(self) -> dict[str, Any]:
        state = self._pieces[0][0] if self._pieces else self.documents.state_dict()
        return {"window": self._window, "used": self._used, "documents": copy.deepcopy(state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.documents.load_state_dict(state["documents"])
        self._pieces.clear()
        self._reader = None
        self._window, self._used, self._ready = int(state["window"]), 0, 0
        used = int(state["used"])
        if used:
            self._more()
            self._used = used
            self._ready -= used
