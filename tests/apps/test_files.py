"""Files that appear whole or not at all, on a full disk and after a kill too."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from bae_fast import files
from bae_fast.compression import CompressedCode
from bae_fast.files import (
    check_writable,
    publishing,
    replacing,
    write_json,
    write_safetensors,
    write_text,
    write_torch,
)
from bae_fast.lm import read_text


def test_results_take_the_old_ones_place_together(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "kept.txt", "kept")
    (tmp_path / "model").mkdir()
    write_text(tmp_path / "model" / "old", "old")

    def fail():
        with publishing(tmp_path) as folder:
            write_text(folder / "a.txt", "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    with publishing(tmp_path) as folder:
        write_text(folder / "a.txt", "new")
        write_text(folder / "model" / "new", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "kept.txt", "model"]


def test_a_move_that_was_cut_short_is_finished_by_the_next_run(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 4:  # a.txt, b.txt, the folder, then the first of the two
            raise SystemExit
        replace(source, target)

    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "b.txt", "old")

    def publish():
        with publishing(tmp_path) as folder:
            for name in "ab":
                write_text(folder / f"{name}.txt", "new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            publish()
    assert (tmp_path / "b.txt").read_text() == "old"
    with publishing(tmp_path):
        assert {(tmp_path / f"{name}.txt").read_text() for name in "ab"} == {"new"}


@pytest.mark.parametrize("write", [
    lambda path: write_torch(path, {"x": torch.ones(3)}),
    lambda path: write_safetensors(path, {"x": torch.ones(3)}, {}),
])  # fmt: skip
def test_checkpoints_and_weights_are_on_the_disk_before_they_replace_others(
    tmp_path, monkeypatch, write
):
    path, on_disk = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        on_disk.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def replaced(source, target):
        state = os.stat(source)
        assert (state.st_ino, state.st_size) in on_disk
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    assert write(path).stat().st_size > 0


def test_results_take_the_place_of_what_is_of_another_kind(tmp_path):
    (tmp_path / "far").mkdir()
    write_text(tmp_path / "far" / "kept", "kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(tmp_path / "far")  # a folder of results
    (tmp_path / "out" / "table.md").mkdir()
    write_text(tmp_path / "out" / "names", "a file")
    (tmp_path / "out" / "plot.png").symlink_to(tmp_path / "nowhere")
    with publishing(tmp_path / "out") as folder:
        for name in ("model/cfg.json", "table.md", "names/a", "plot.png"):
            write_text(folder / name, "new")
    for name in ("model/cfg.json", "table.md", "names/a", "plot.png"):
        assert (tmp_path / "out" / name).read_text() == "new"
    assert (tmp_path / "far" / "kept").read_text() == "kept"
    assert not (tmp_path / "out" / ".finished").exists()


def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"a\.json"), replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    file = write_text(tmp_path / "file", "")
    with pytest.raises(OSError, match="file"):
        write_json(file / "below.json", {})
    with pytest.raises(OSError, match="file"):
        check_writable(file / "below")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    for name in ("there", "not yet"):
        link, real = tmp_path / f"link to {name}", tmp_path / "far" / name
        link.symlink_to(real)
        write_text(link, name)
        assert link.is_symlink()
        assert real.read_text() == name
        write_text(link, "again")
        assert real.read_text() == "again"
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["not yet", "there"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_devices_pipes_folders_and_protected_files_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "protected", "kept").chmod(0o444)
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    for name, why in (
        ("pipe", "must be a file"), ("folder", "directory"), ("protected", "write-protected"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=f"{why}.*{name}"):
            write_text(tmp_path / name, "new")
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before
    assert (tmp_path / "protected").read_text() == "kept"


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    file = write_text(tmp_path / "private", "old")
    file.chmod(0o640)
    assert stat.S_IMODE(write_text(file, "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "\u00fc" * 127, "\U0001f600" * 63])
def test_a_name_may_be_as_long_as_the_system_has_it(tmp_path, name):
    assert write_text(tmp_path / name, "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system names no machine")
def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_stays(tmp_path):
    program = (
        "import sys, bae_fast.files as files\n"
        "with files.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print(temporary, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / name)], **pipes)
        for name in ("killed", "living")
    ]
    try:
        killed, living = (Path(writer.stdout.readline().strip()) for writer in writers)
        writers[0].kill()
        writers[0].wait()
        # of a process with the same number elsewhere, and of nobody known
        elsewhere = killed.with_name(killed.name.replace(files._machine(), "0" * 8))
        older = tmp_path / ".killed.0123abcd.tmp"
        for path in (elsewhere, older):
            path.write_text("kept")
        write_text(tmp_path / "new", "a")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"new", living.name, elsewhere.name, older.name}
    finally:
        for writer in writers:
            writer.stdin.close()
            writer.wait()
            writer.stdout.close()
    assert writers[1].returncode == 0
    assert (tmp_path / "living").read_text() == "half"


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    program = (
        "import resource, signal, sys, bae_fast as bf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try: bf.BinaryAutoencoder(64, 512).save_pretrained(sys.argv[1])\n"
        "except OSError as error: print(error)\n"
    )
    done = processes.run("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sae_weights.safetensors" in done.stdout
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_checkpoint_on_a_full_disk_is_named_and_says_no_place_in_an_archive(tmp_path):
    program = (
        "import resource, signal, sys, torch\n"
        "from bae_fast.files import append_text, write_torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "for write in (lambda: write_torch(sys.argv[1] + '/state.pt', torch.zeros(10_000)),\n"
        "              lambda: append_text(sys.argv[1] + '/log.jsonl', 30_000 * 'a')):\n"
        "    try: write()\n"
        "    except OSError as error: print(error)\n"
    )
    done = processes.run("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint, log = done.stdout.splitlines()
    assert "the disk is full" in checkpoint
    assert "state.pt" in checkpoint
    assert "inline_container" not in checkpoint
    assert "log.jsonl" in log
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_text_that_cannot_be_added_whole_is_not_added(tmp_path):
    program = (
        "import resource, signal, sys\n"
        "from bae_fast.files import append_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "append_text(sys.argv[1] + '/log.jsonl', 'first \\u00e9\\n')\n"
        "try: append_text(sys.argv[1] + '/log.jsonl', 30_000 * 'a')\n"
        "except OSError as error: print(error)\n"
        "append_text(sys.argv[1] + '/log.jsonl', 'last\\n')\n"
    )
    done = processes.run("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "log.jsonl" in done.stdout
    assert (tmp_path / "log.jsonl").read_bytes() == "first \u00e9\nlast\n".encode()


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file that cannot be read")
def test_a_file_that_fails_while_it_is_read_is_named():
    for read_it in (files.read_json, files.read_safetensors, CompressedCode.open, read_text):
        with pytest.raises(OSError, match="error: '/proc/self/mem'"):
            read_it(Path("/proc/self/mem"))
