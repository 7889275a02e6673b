"""Text to run a language model over: the standard library's own, or the user's files."""

from __future__ import annotations

import ast
import bz2
import contextlib
import gzip
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.files import naming
from bae_fast.lm.inputs import bos_to_prepend, without_surrogates
from bae_fast.progress import tracked

# of English, with room: a first part that is too short is only tokenized once more
_CHARACTERS_A_TOKEN = 6
_MARGIN = 128
# characters tokenized at a time, and how many of them the next time again: an encoding takes some
# 200 bytes a character while it is made
_PIECE = 2**18
_OVERLAP = 2**12
# endings of files of JSON lines, and of what is read in a folder
LINES = (".jsonl", ".ndjson")
_TEXTS = (".txt", ".md", ".rst", *LINES)
# endings of archives, which hold files and not a text
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".parquet", ".arrow")


def _open_zstd(raw: IO[bytes], path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{path} needs the package zstandard: pip install zstandard") from error
    return zstandard.open(raw, "rb")


# what decompresses the bytes of a file, by the ending behind the text's own
_COMPRESSED: dict[str, Callable[[IO[bytes], Path], Any]] = {
    ".gz": lambda raw, path: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": lambda raw, path: bz2.BZ2File(raw),
    ".xz": lambda raw, path: lzma.LZMAFile(raw),  # noqa: SIM115
    ".zst": _open_zstd,
}
TEXT_FORMS = "UTF-8 text, plain or compressed (" + ", ".join(_COMPRESSED) + ")"


def text_ending(path: Path) -> str:
    """The ending of a text, in lower case, without that of its compression: .txt of a.TXT.gz."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in _COMPRESSED else ending


@contextlib.contextmanager
def open_bytes(path: Path, raw: IO[bytes], start: int = 0) -> Iterator[IO[bytes]]:
    """The bytes of a text file from one of them on, decompressed where its ending says so.

    A plain file is read from there on; a compressed one from its beginning, and what comes before
    is dropped.

    Args:
        path: says by its ending what the bytes are, and is named in errors.
        raw: the file, or its bytes, from the beginning.
        start: the first byte, of what is decompressed.

    Raises:
        ValueError: an archive, or a compressed file that is damaged.
        ImportError: .zst, without the package zstandard.
        OSError: a file that cannot be read.
    """
    archive = text_ending(path)
    if archive in _ARCHIVES:
        raise ValueError(f"{path} must be {TEXT_FORMS}; {archive} is an archive: unpack it")
    opener = _COMPRESSED.get(path.suffix.lower())
    if opener is None:
        raw.seek(start)
        yield raw
        return
    try:
        with opener(raw, path) as stream, io.BufferedReader(stream) as file:
            while start > 0:
                part = len(file.read(min(start, 1 << 20)))
                if not part:
                    break
                start -= part
            yield file
    except Exception as error:
        damage = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
        # bz2 and zstandard have no exception of their own that every version has
        plain = type(error) is OSError and error.errno is None
        if not (isinstance(error, damage) or plain or type(error).__name__ == "ZstdError"):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} must be {TEXT_FORMS}; it cannot be decompressed: {reason}"
        ) from error


def standard_library_text() -> str:
    """The English of Python's language reference, as `help()` shows it.

    The topics of `pydoc_data.topics` in alphabetical order of their keys, two line breaks between
    them: about 465,000 characters, a little different from one Python release to the next.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def standard_library_docstrings() -> str:
    """The docstrings of the standard library's modules, its tests left out.

    In the order of paths and of the source, each once, two line breaks between them: 1.8
    million characters, different from one Python release to the next.
    """
    root = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates of source that is not Python
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
        found.update(dict.fromkeys(filter(None, map(ast.get_docstring, nodes))))
    return "\n\n".join(found)


def text_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that paths name, in the order given; of folders all texts in them, sorted.

    Texts in a folder are .txt, .md, .rst, .jsonl and .ndjson, in folders below it too, plain or
    compressed (.gz, .bz2, .xz, .zst).

    Raises:
        ValueError: a path that is missing, a folder without such a file, or no path.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, (str, Path)) else list(paths):
        if path == "":  # which Path takes for the folder that the program runs in
            raise ValueError("paths must name text files or folders of them; got ''")
        path = Path(path)
        found = [path]
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if text_ending(p) in _TEXTS)
            found = [p for p in inside if p.is_file()]
        if not found or not found[0].is_file():
            state = f"is a folder without {', '.join(_TEXTS)}" if path.is_dir() else "is missing"
            more = " (files of other endings are named one by one)" if path.is_dir() else ""
            raise ValueError(f"paths must name text files or folders of them; {path} {state}{more}")
        files += found
    if not files:
        raise ValueError("paths must name at least one file; got none")
    return files


def text_of_line(line: str, path: Path, at: int, field: str = "text") -> str:
    """The text of one line of a file of JSON lines.

    Args:
        line: the line.
        path, at: the file and the byte behind the line, for the error.
        field: the field that holds the text.

    Raises:
        ValueError: no JSON object, no such field, or no text in it.
    """
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold an object with the field {field!r} in every line; the one "
            f"before byte {at:,} has none ({type(error).__name__})"
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f"{path} must hold text in the field {field!r}; got {type(text).__name__} "
            f"before byte {at:,}"
        )
    return text


def bytes_before(path: Path, size: int) -> bytes:
    """What stands before a file's bytes in the digest of a text: what they are, and how many."""
    ending = path.suffix
    if text_ending(path) != ending.lower():
        ending = text_ending(path) + ending
    return f"{ending} {size} ".encode()


def read_text(
    path: str | Path | Sequence[str | Path], *, field: str = "text", digest: Any = None
) -> str:
    """Read files, and folders of .txt, .md, .rst, .jsonl and .ndjson, in the order given, as UTF-8.

    Files that end in .gz, .bz2, .xz or .zst behind that are decompressed. Two line breaks stand
    between files, and between the texts of a file of JSON lines, which are in ``field``. Files of a
    folder that hold no text are left out.

    Args:
        path: files and folders.
        field: the field of a line of JSON that holds the text.
        digest: an object of hashlib, which is given what is read, as the identity of
            :class:`bae_fast.lm.TextFiles` has it. Every file is read once.

    Raises:
        ValueError: a path that is missing, a folder without any text, a file that is not UTF-8 or
            without any text, a line without its field; no path.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise ValueError("path must name at least one text file; got []")
    texts = []
    for item in paths:
        try:
            files = text_files(item)
        except ValueError as error:
            if item == "":
                raise
            state = str(error).rpartition(f"{item} ")[2]
            raise ValueError(f"path must name UTF-8 text; {str(item)!r} {state}") from error
        found = []
        for file in files:
            with naming(file):
                data = file.read_bytes()
            if digest is not None:
                digest.update(bytes_before(file, len(data)))
                digest.update(data)
            text = _file_text(file, data, field)
            if text.strip():
                found.append(text)
        if not found:
            raise ValueError(f"path must name UTF-8 text; {str(item)!r} holds none")
        texts += found
    return "\n\n".join(texts)


def _file_text(path: Path, data: bytes, field: str) -> str:
    """The text of one file, from the bytes that it has."""
    try:
        with open_bytes(path, io.BytesIO(data)) as file:
            data = file.read()
        # line ends of any kind, as files of text have them
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path must name {TEXT_FORMS}; {str(path)!r} is not UTF-8 (byte {error.start})"
        ) from error
    if text_ending(path) not in LINES:
        return text
    at, found = 0, []
    # only line feeds end a line: JSON may hold the other separators of lines as they are
    for line in text.split("\n"):
        at += len(line.encode()) + 1
        if line.strip():
            found.append(text_of_line(line, path, at, field))
    return "\n\n".join(found)


def windows(
    tokenizer: Any,
    text: str,
    context_size: int = 256,
    *,
    n_tokens: int | None = None,
    prepend_bos: bool | None = None,
) -> Tensor:
    """Cut a text into windows of equally many tokens, one after the other, none shared.

    Windows begin as the tokenizer begins a text: where it puts a beginning-of-text token first
    (Llama, Gemma), so does every window, and `context_size - 1` tokens of text follow; else a
    window is the text's tokens and nothing else. A text that begins with that token itself has it
    once. What is left over at the end is dropped.

    With `n_tokens` only as much of the text is tokenized as they need, and a long text by pieces;
    the tokens are the same.

    Args:
        tokenizer: a transformers tokenizer, or anything called in the same way.
        text: the text.
        context_size: tokens per window, the inserted one included; at least 2.
        n_tokens: stop after the windows that hold this many tokens, rounded up to whole windows;
            None takes the whole text.
        prepend_bos: start every window with the token that the tokenizer itself begins a text
            with, or else with its `bos_token_id`; None: if the tokenizer itself does so.

    Returns:
        int64 [n_windows, context_size].

    Raises:
        TypeError: a text that is no string.
        ValueError: a size out of range, a text shorter than one window, or no
            beginning-of-text token where one is asked for.
    """
    if not isinstance(text, str):
        several = "; '\\n\\n'.join(texts) makes one of several" if isinstance(text, list) else ""
        raise TypeError(f"text must be a string; got {type(text).__name__}{several}")
    check_int("context_size", context_size, 2)
    if n_tokens is not None:
        check_int("n_tokens", n_tokens, 1)
    bos = bos_to_prepend(tokenizer, prepend_bos)
    body = context_size if bos is None else context_size - 1
    most = None if n_tokens is None else -(-n_tokens // context_size)
    text = without_surrogates(text)
    ids = _first_tokens(tokenizer, text, None if most is None else most * body + 1)
    if bos is not None and len(ids) and int(ids[0]) == bos:
        ids = ids[1:]
    n_windows = len(ids) // body if most is None else min(len(ids) // body, most)
    if n_windows == 0:
        raise ValueError(
            f"text must hold at least one window of context_size={context_size}; got "
            f"{len(ids):,} tokens"
        )
    out = torch.as_tensor(ids[: n_windows * body], dtype=torch.int64).view(n_windows, body)
    if bos is not None:
        out = torch.cat([torch.full((n_windows, 1), bos, dtype=torch.int64), out], dim=1)
    return out


def _first_tokens(tokenizer: Any, text: str, n: int | None) -> list[int] | Tensor:
    """At least the first n token ids of a text, or all there are; None: all of them."""

    def tokens(part: str) -> list[int]:
        # verbose=False: a text longer than the model's context is the normal case here.
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    wanted = len(text) if n is None else n + _MARGIN
    length = _CHARACTERS_A_TOKEN * wanted
    if min(length, len(text)) > _PIECE + _OVERLAP:
        pieces = _by_pieces(tokenizer, text, n)
        if pieces is not None:
            return pieces
    while n is not None and length < len(text):
        # a word cut in two would be tokens that the text does not have
        cut = max(text.rfind("\n", 0, length), text.rfind(" ", 0, length))
        ids = tokens(text[: cut if cut > length // 2 else length])
        if len(ids) >= wanted:
            return ids[:n]
        length *= max(2, -(-wanted // max(len(ids), 1)))
    return tokens(text)


def _by_pieces(tokenizer: Any, text: str, n: int | None) -> Tensor | None:
    """At least the first n token ids of a long text, int32; None where pieces do not fit together.

    A piece begins before the end of the last one. Both have tokens of what lies between, and where
    tokens and their places agree all over the middle of it, the text goes over from one to the
    other. Tokens at the two ends, which a cut may have changed, are in neither.
    """
    parts: list[Tensor] = []
    n_tokens = 0
    before: tuple[Tensor, Tensor] | None = None
    for begin in tracked(range(0, len(text), _PIECE), len(text), "characters", by=_PIECE):
        end = begin + _PIECE + _OVERLAP
        try:
            found = tokenizer(
                text[begin:end],
                add_special_tokens=False,
                verbose=False,
                return_offsets_mapping=True,
            )
        except (NotImplementedError, TypeError):  # slow tokenizers know no places
            return None
        ids = torch.tensor(found["input_ids"], dtype=torch.int32)
        starts = torch.tensor(found["offset_mapping"], dtype=torch.int64).view(-1, 2)[:, 0] + begin
        if before is not None:
            edge = begin + _OVERLAP // 2
            low, high = edge - _OVERLAP // 4, edge + _OVERLAP // 4
            (old, old_starts), inside = before, (starts >= low) & (starts < high)
            old_inside = (old_starts >= low) & (old_starts < high)
            same = torch.equal(ids[inside], old[old_inside]) and torch.equal(
                starts[inside], old_starts[old_inside]
            )
            if not same or not bool(inside.any()):
                return None
            parts.append(old[old_starts < edge])
            n_tokens += len(parts[-1])
            ids, starts = ids[starts >= edge], starts[starts >= edge]
        if end >= len(text) or (n is not None and n_tokens + len(ids) >= n + _OVERLAP):
            break
        before = ids, starts
    return torch.cat([*parts, ids])[:n]
