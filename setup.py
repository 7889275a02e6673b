"""Builds the C++ backend where a compiler is at hand; metadata is in pyproject.toml.

torch is neither fetched nor read: ``csrc/torch_abi.h`` declares what is used of its stable C
interface, and the extension is linked to an empty library of the same name. The torch that is
loaded when the backend is used resolves it. Without a compiler, or with ``BAE_FAST_BUILD_EXT=0``,
the package installs without the backend and says so at its first use; its wheel is then one for any
machine.

Tests import this file for its flags.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The machine that is built for. Where the compiler is a cross compiler, _PYTHON_HOST_PLATFORM names
# it, for instance linux-aarch64, and Python and setuptools read that name too.
MACHINE = platform.machine().lower()
if sys.platform == "linux":
    MACHINE = sysconfig.get_platform().rpartition("-")[2]

# One file an instruction set, and flags for that file alone: with them on the whole target the
# compiler would put wide instructions into the code that every CPU runs.
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vbmi",
    "-mavx512vnni",
    "-mavx512vpopcntdq",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",  # gcc's own headers
]
SIMD_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mfma"],
    "kernels_avx512": AVX512_FLAGS,
    "kernels_amx": [
        *AVX512_FLAGS,
        "-mavx512bf16",
        "-mprfchw",
        "-mamx-tile",
        "-mamx-int8",
        "-mamx-bf16",
    ],
}
KERNELS = ["dispatch", "kernels_scalar"]
if MACHINE in ("x86_64", "amd64"):
    KERNELS += ["kernels_avx2", "kernels_avx512", "kernels_amx"]
elif MACHINE in ("aarch64", "arm64"):
    KERNELS += ["kernels_neon"]
SOURCES = [
    "operators",
    "layouts",
    "salient",
    "search",
    "covariance",
    "pair_lists",
    "pair_counts",
    "products",
    "backward",
    "sparse_backward",
    "losses",
    "gradients",
    *KERNELS,
]

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",
]

# the library of torch that holds its stable C interface, as the loader knows it
TORCH_LIBRARY = "libtorch_cpu.so"
PYTHON_TARGET_VERSION = "0x030A0000"


def find_ninja():
    """The path of a ninja that runs here, of the Python package or on PATH; None without one.

    Where a cross compiler builds, pip brings the ninja of the machine that is built for.
    """
    paths = [None]
    try:
        import ninja
    except ImportError:
        pass
    else:
        paths.insert(0, ninja.BIN_DIR)
    for path in paths:
        found = shutil.which("ninja", path=path)
        try:
            if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
                return found
        except OSError:
            pass
    return None


def run_ninja(ninja, commands, folder):
    """Run commands (object, source, words of the command) side by side.

    ninja keeps the headers of each object, so a second build in the same folder compiles only what
    has changed. Raises CompileError where a command fails; ninja has printed its output by then.
    """

    def escape(path):
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        f"builddir = {escape(folder)}",
        "rule compile",
        "  command = $words",
        "  depfile = $out.d",
        "  deps = gcc",
        "",
    ]
    for target, source, words in commands:
        line = shlex.join([*words, "-MMD", "-MF", f"{target}.d"]).replace("$", "$$")
        lines += [f"build {escape(target)}: compile {escape(source)}", f"  words = {line}", ""]
    plan = Path(folder) / "build.ninja"
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text("\n".join(lines))
    try:
        subprocess.run([ninja, "-f", str(plan)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(str(error)) from error


class BuildExtension(build_ext):
    """Flags by file; side by side where ninja is at hand, one after another elsewhere."""

    def finalize_options(self):
        # Objects stay between builds where ninja can tell which of them are old. pip would have
        # them in a folder that it removes.
        if self.build_temp is None and find_ninja() is not None:
            self.build_temp = os.path.join("build", f"objects-{sys.implementation.cache_tag}")
        super().finalize_options()

    def make_empty_torch(self):
        """A folder with an empty library of the name of torch's, to be linked to."""
        folder = Path(self.build_temp) / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "empty.cpp"
        source.write_text("")
        words = [*self.compiler.compiler_so_cxx, "-shared", "-fPIC", "-nostdlib"]
        words += [f"-Wl,-soname,{TORCH_LIBRARY}", str(source), "-o", str(folder / TORCH_LIBRARY)]
        try:
            subprocess.run(words, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error
        return str(folder)

    def build_extension(self, ext):
        compiler, ninja, commands = self.compiler, find_ninja(), []
        if sys.platform == "linux":
            ext.library_dirs = [*ext.library_dirs, self.make_empty_torch()]
        compile_one, compile_all = compiler._compile, compiler.compile

        def compile_with_flags(obj, src, ext_, cc_args, extra, pp_opts):
            extra = [*extra, *SIMD_FLAGS.get(Path(src).stem, [])]
            if ninja is None:
                compile_one(obj, src, ext_, cc_args, extra, pp_opts)
            else:
                words = [*compiler.compiler_so_cxx, *cc_args, src, "-o", obj, *extra]
                commands.append((obj, src, words))

        def compile_together(*args, **options):
            objects = compile_all(*args, **options)
            if commands:
                run_ninja(ninja, commands, self.build_temp)
            return objects

        compiler._compile, compiler.compile = compile_with_flags, compile_together
        try:
            super().build_extension(ext)
        finally:
            compiler._compile, compiler.compile = compile_one, compile_all


class BuildWheel(bdist_wheel):
    """A wheel without the extension is one for any Python and any machine."""

    def run(self):
        if not self.skip_build:
            self.run_command("build")
        outputs = self.get_finalized_command("build_ext").get_outputs()
        if not all(map(os.path.exists, outputs)):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def extensions():
    """The extension, or nothing and a warning that says why."""
    if os.environ.get("BAE_FAST_BUILD_EXT", "1") == "0":
        return []
    if sys.platform == "win32":
        warnings.warn("bae_fast's C++ backend is not built on Windows", stacklevel=1)
        return []
    # needed though the empty library defines nothing
    linked = {"extra_link_args": ["-Wl,--no-as-needed", "-ltorch_cpu"]}
    if sys.platform != "linux":  # linkers that ask the library what it defines
        try:
            import torch
        except ImportError as error:
            warnings.warn(f"bae_fast is installed without its C++ backend: {error}", stacklevel=1)
            return []
        folder = str(Path(torch.__file__).parent / "lib")
        linked = {"library_dirs": [folder], "libraries": ["torch_cpu"]}
    return [
        Extension(
            "bae_fast._C",
            sources=[f"csrc/{name}.cpp" for name in SOURCES],
            depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")],
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", PYTHON_TARGET_VERSION)],
            # messages of failed checks name files
            extra_compile_args=[*FLAGS, f"-ffile-prefix-map={ROOT}=."],
            **linked,
            # a failure is a warning, but where the kernels of a machine were asked for by name
            optional="_PYTHON_HOST_PLATFORM" not in os.environ,
            py_limited_api=True,
        )
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
