"""Files that appear whole or not at all, and safetensors with clear errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has other locks: there nothing is locked
    fcntl = None  # type: ignore[assignment]


# in the metadata of a safetensors file: the CRC-32 of each tensor, JSON
_CHECKSUMS = "bae_fast.crc32"
# why a checksum is another
CHANGED = "a bit has changed since it was written"


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/bae_fast/<name>``, where what can be made again is kept (``~/.cache``).

    Raises:
        OSError: the user has no home, and XDG_CACHE_HOME is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise OSError("XDG_CACHE_HOME must name a folder, as this user has no home") from error
    return Path(root) / "bae_fast" / name


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` if the body succeeds.

    The parent folder is made where it is missing. Another process that writes the same path
    wins or loses whole. As with a file that is opened for writing, a link stays and what it points
    to is replaced, a file that is there keeps its mode, and one that nobody may write is refused.
    The first call for a folder removes what writers left there that were killed.

    Raises:
        OSError: naming ``path``, where the system's own error names another file or none; it is a
            device or a pipe, which a file would take the place of.
    """
    target = Path(path)
    place = Path(os.path.realpath(target))
    # a name may take 255 bytes; 50 characters take at most 200
    name = place.name if len(os.fsencode(place.name)) <= 200 else place.name[:50]
    # not mkstemp, which makes files private: what mode a file should have only the umask would say,
    # and reading that means setting it, for all threads of the process
    writer = f"{_machine() or 'unknown'}-{os.getpid()}"
    temporary = place.with_name(f".{name}.{writer}-{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(str(place.parent))
        before = place.stat().st_mode if place.exists() else None
        if before is not None:
            _check_replaceable(before)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode if before is None else before)
    except OSError as error:
        raise _naming(error, target) from error
    try:
        yield temporary
        temporary.chmod(mode)  # writers of libraries may have put a private file there
        os.replace(temporary, place)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise _naming(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp", re.DOTALL)


def _machine() -> str | None:
    """A name for all that share this process's numbers of processes: a start of the kernel and a
    namespace in it, which no two containers or hosts on one file system have in common.

    None where the system does not tell; then nothing is removed.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text()
        names = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    content = f"{start} {names} {platform.node()}"
    return hashlib.sha256(content.encode()).hexdigest()[:8]


@functools.cache
def _sweep(folder: str) -> None:
    """Remove temporary files of processes that ran here and are no more; a living one's stays."""
    machine = _machine()
    if machine is None:
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            found = _TEMPORARY.fullmatch(name)
            if found is not None and found[1] == machine and not _lives(int(found[2])):
                Path(folder, name).unlink(missing_ok=True)


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: one that took hours must not be replaced by one that a
    machine which stops now has not written."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_replaceable(mode: int) -> None:
    """Refuse what is no file, and a file that is protected, by the mode that it has."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and must be a file")
    if not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EACCES, "it is write-protected")


def _naming(error: OSError, path: Path) -> OSError:
    """The same error, of a file that a user knows."""
    if error.errno is None:
        return OSError(f"{path} cannot be written: {error}")
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file an error of the system is, where it does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise _naming(error, Path(path)) from error


def first_line(error: BaseException) -> str:
    """What an error says, cut to a line; the name of its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def torch_reason(error: BaseException) -> str | None:
    """Why torch's writer of archives failed, in words; None for an error of another kind.

    Where a write is cut short it says at which byte of which of its own files it noticed.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and ("inline_container" in text or "StreamWriter" in text):
        return "the disk is full, or files may not be that large"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or torch's on the CPU, which is of no class."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def write_torch(path: str | os.PathLike[str], value: Any) -> Path:
    """Write what ``torch.save`` takes, whole or not at all.

    Raises:
        OSError: naming the file, which cannot be written, for instance on a full disk.
    """
    import torch

    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:
            reason = torch_reason(error)
            if reason is None:
                raise
            raise OSError(errno.ENOSPC, reason, str(path)) from error
        _sync(temporary)
    return Path(path)


def read_torch(path: str | os.PathLike[str], what: str, *, own: bool = False) -> Any:
    """Read what ``torch.save`` wrote onto the CPU: tensors and plain values, and no code.

    Args:
        what: names its content in an error.
        own: it is of :func:`write_torch`, and the checksums of its parts are compared, which
            ``torch.load`` does not look at. A stranger may have written none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: its content is no such thing, or a bit of it has changed.
        OSError, MemoryError: it could not be read this time, and may be whole.
    """
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        # torch's format from before archives has no checksums
        if own and torch.serialization.get_crc32_options() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is another: {CHANGED}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise anything
        # a seek to a place that no file has is of a damaged one, and no fault of the disk
        of_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_disk or out_of_memory(error):
            raise
        raise ValueError(f"{path} is not a readable {what}: {first_line(error)}") from error


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Add text to the end of a file in UTF-8, all of it or nothing; its folder must be there.

    Raises:
        OSError: naming the file, which has its old length again.
    """
    left = text.encode()
    try:
        with open(path, "ab", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            try:
                while left:  # a disk that fills takes a part
                    left = left[file.write(left) :]
            except BaseException:
                with contextlib.suppress(OSError):  # a device has no length
                    file.truncate(length)
                raise
    except OSError as error:
        raise _naming(error, Path(path)) from error


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make a folder and a file in it, which is removed again.

    Raises:
        OSError: naming the folder, if files cannot be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise _naming(error, folder) from error
    return folder


def check_place(path: str | os.PathLike[str], *, folder: bool = True) -> None:
    """Find out whether a folder, or a file, can be made where a path says, and make none.

    Args:
        path: the folder, or the file.
        folder: whether it is a folder.

    Raises:
        OSError: naming the path; an existing file where the folder should be, for instance.
    """
    target = Path(path)
    place = target if folder else target.parent
    if not folder and target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise _naming(error, target) from error


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, hexadecimal, read a part at a time.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def part_checksum(path: str | os.PathLike[str], first: int = 0, length: int | None = None) -> int:
    """The CRC-32 of a file's bytes from ``first`` on, of all or of so many as there are of them.

    Raises:
        OSError: the file cannot be read.
    """
    found, left = 0, os.path.getsize(path) - first if length is None else length
    with open(path, "rb") as file:
        file.seek(first)
        while left > 0 and (part := file.read(min(left, 2**22))):
            found = zlib.crc32(part, found)
            left -= len(part)
    return found


# -- locks -------------------------------------------------------------------------------------


@contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool, passing: bool = False) -> Iterator[bool]:
    """Hold the lock of a path; it ends with the block, and with the process, however that ends.

    Args:
        path: a folder, or a file, which is made where it is missing.
        wait: whether to wait until no other process has it.
        passing: the path is a file that stands for nothing but the lock: its folder is made too
            where it is missing, and the file is removed by whoever has held it.

    Returns:
        Whether it is held: False where another process has it and ``wait`` is False. True on a
        system, or a file system, without locks.

    Raises:
        OSError: the file cannot be opened.
    """
    while True:
        handle = _open_made(path) if passing else _open(path)
        try:
            held = _lock(handle, wait=wait)
            if passing and held and not _still_at(handle, path):
                continue  # its holder has removed it, and a later one may hold another of the name
            try:
                yield held
            finally:
                if passing and held:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
            return
        finally:
            os.close(handle)


def _open(path: str | os.PathLike[str]) -> int:
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_WRONLY | os.O_CREAT
    return os.open(path, flags, 0o666)


def _open_made(path: str | os.PathLike[str]) -> int:
    """The same of a file in a folder that is made, and that others may remove while it is empty."""
    while True:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return _open(path)


def _lock(handle: int, *, wait: bool) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _still_at(handle: int, path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


# -- folders of results ------------------------------------------------------------------------

# what a run that has not ended leaves in the folder of its results
UNFINISHED = ".unfinished"
_FINISHED = ".finished"


@contextmanager
def publishing(
    folder: str | os.PathLike[str], *, wait: bool = False, fresh: bool = False
) -> Iterator[Path]:
    """Yield a new folder inside ``folder``; put its files in the old ones' stead if all is well.

    Until the block has ended, the files of the last run stay as they are. The new folder, which
    may be a run's from before, is then renamed, its files are moved up one by one, and a process
    that is killed between two moves leaves the rest to the next call of :func:`publishing`. Files
    of ``folder`` that the new folder lacks are left alone. The folder is locked meanwhile.

    Args:
        folder: the folder of the results.
        wait: wait for another process that publishes here, where the block takes little time.
        fresh: begin with an empty folder, where the block does not go on with what a run left.

    Raises:
        BlockingIOError: another process publishes here, and ``wait`` is False.
        OSError: the folder cannot be written.
    """
    folder = check_writable(folder)
    with locked(folder, wait=wait) as held:
        if not held:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another process writes its results there", str(folder)
            )
        _move_up(folder)
        work = folder / UNFINISHED
        if fresh and work.is_dir():
            shutil.rmtree(work)
        check_writable(work)
        yield work
        os.replace(work, folder / _FINISHED)
        _move_up(folder)


def _move_up(folder: Path) -> None:
    finished = folder / _FINISHED
    if not finished.is_dir():
        return
    for path in sorted(finished.iterdir()):
        target = folder / path.name
        # a file takes the place of a file or of a link; what else stands there would refuse it, at
        # the end of a run and of every later one
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif path.is_dir():
            target.unlink(missing_ok=True)
        os.replace(path, target)
    finished.rmdir()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def as_json(value: Any) -> str:
    """JSON as it is written to files, indented and in the order given."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON, indented and in the order given, whole or not at all."""
    return write_text(path, as_json(value))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    try:
        with naming(path):  # of what fails to be read once it is open
            text = Path(path).read_text(encoding="utf-8-sig")  # Windows puts a mark before UTF-8
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    *,
    sums: bool = False,
) -> Path:
    """Write a safetensors file, whole or not at all.

    Args:
        tensors: on the CPU.
        sums: a checksum of each tensor stands in the metadata. Several entries of metadata are
            written in any order, so the same content may give other bytes.

    Raises:
        OSError: the file cannot be written, for instance on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            if sums:
                found = {name: _checksum(tensor) for name, tensor in tensors.items()}
                metadata = {**metadata, _CHECKSUMS: json.dumps(found)}
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # which is no OSError and names no file
            raise OSError(f"{path} cannot be written: {error}") from error
        _sync(temporary)
    return Path(path)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor (into memory) and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, a truncated one, or a tensor of which a bit has changed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    # one read: opening by name twice could meet two files where another process replaces it
    with naming(path):
        data = Path(path).read_bytes()
    return parse_safetensors(data, path)


def parse_safetensors(
    data: bytes, path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the bytes of a safetensors file, which errors name.

    Raises:
        ValueError: not a safetensors file, a truncated one, or a tensor of which a bit has changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {first_line(error)}"
        ) from error
    metadata = header.get("__metadata__") or {}
    _check_sums(tensors, metadata.pop(_CHECKSUMS, "{}"), path)
    return tensors, metadata


def _checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's numbers; some 0.8 s a GiB on one core, where SHA-256 takes twice
    that."""
    import torch

    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:  # of a single number
        flat = flat.clone(memory_format=torch.contiguous_format)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def _check_sums(tensors: dict[str, Tensor], kept: str, path: str | os.PathLike[str]) -> None:
    """Compare tensors with the checksums that a file has of them; older files have none."""
    try:
        sums = json.loads(kept)
        known = {name: sums[name] for name in tensors if name in sums}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds checksums that are no JSON object: {error}") from error
    for name, value in known.items():
        if _checksum(tensors[name]) != value:
            raise ValueError(
                f"{path} is damaged: the checksum of {name} is another than {_CHECKSUMS} in its "
                f"metadata has; {CHANGED}"
            )
