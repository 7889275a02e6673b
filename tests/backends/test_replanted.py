"""Faults that reading and compiling once found in the GPU code, put back: each is found again.

A fault is a change of a text in a second checkout (``tests/support/shadow.py``). There its
test has to fail, and to say what the fault is: a test that passes with its fault planted would hold
nothing. Faults of the machine code are compiled and inspected as
``test_triton_compile.py`` and ``test_cuda_compile.py`` do. Those of the interpreter of PTX are
planted in ``test_ptx.py``, and those of the emulation in ``test_cuda.py``.
"""

import re

import pytest
import shadow
import test_cuda_compile
import test_triton_compile
from triton_process import printed

from bae_fast.ops import registry

TRITON, CUDA = registry.BACKENDS["triton"], registry.BACKENDS["cuda"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        TRITON.unavailable is not None, reason=f"impl='triton' cannot run: {TRITON.unavailable}"
    ),
    pytest.mark.skipif(
        CUDA.unavailable is not None, reason=f"impl='cuda' cannot run: {CUDA.unavailable}"
    ),
]

LAUNCH, BITS, BODIES = "kernels/triton/launch.py", "kernels/triton/bits.py", "kernels/triton/bodies"
ENCODE, GRADIENT = "kernels/triton/encode.py", "kernels/triton/gradient.py"
CONFIGS, DRIVER = "kernels/triton/configs.py", "kernels/cuda/driver.py"
INTERPRETED = "tests/backends/interpreted/"
IN_CUDA, IN_BENCH = "tests/backends/test_cuda.py::", "bench/device/"

# (what is changed, the test, what it says)
FAULTS = {
    "tuning adds the counts of its trials": (
        [
            (ENCODE, "    counts.zero_()  # here", "    # here"),
            (
                f"{BODIES}/encode.py",
                "        counts.zero_()  # blocks of rows add to them\n",
                "        pass\n",
            ),
            (f"{BODIES}/encode.py", "counts = torch.empty(k,", "counts = torch.zeros(k,"),
        ],
        INTERPRETED + "tile_sizes.py::test_tuning_changes_no_result",
        r"assert torch\.equal\(code\.counts\(\), right\.counts\(\)\)",
    ),
    "tuning meets tiles that do not run": (
        [
            (
                LAUNCH,
                "(triton.runtime.errors.TritonError, triton.compiler.CompilationError, "
                "RuntimeError)",
                "triton.runtime.errors.OutOfResources",
            )
        ],
        INTERPRETED + "tile_sizes.py::test_tiles_that_do_not_run_are_left_out",
        "RuntimeError: invalid argument",
    ),
    "tuning times a warm cache and the host": (
        [
            (
                LAUNCH,
                'return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="min"))',
                "return 0.0 * bool(call())",
            )
        ],
        INTERPRETED + "tile_sizes.py::test_tiles_are_timed_with_a_cold_cache",
        r"assert 0\.0 == 2\.5",
    ),
    "tuning is timed on another device than the tensors'": (
        [(LAUNCH, "with current(device):", "with contextlib.nullcontext():")],
        INTERPRETED + "tile_sizes.py::test_tuning_is_timed_on_the_device_of_the_tensors",
        r"assert \[0, 0, 0\] == \[1, 1, 1\]",
    ),
    "ranks that tune apart": (
        [(LAUNCH, "if _entry is None and _alone():", "if _entry is None:")],
        INTERPRETED + "tile_sizes.py::test_ranks_do_not_tune_apart",
        r"== default",
    ),
    "small tiles where large ones end first": (
        [
            (
                LAUNCH,
                "return min(entries, key=lambda c: (cost(c, rows, columns, processors), "
                "-c.m * c.n))",
                "return entries[0 if rows <= 512 else -1]",
            )
        ],
        INTERPRETED + "tile_sizes.py::test_the_tile_is_that_which_ends_first",
        r"assert 64 == 128",
    ),
    "more digits of the counts than rows need": (
        [
            (
                "kernels/triton/counts.py",
                "DIGITS if n_bound is None else max(n_bound.bit_length(), 1)",
                "DIGITS",
            )
        ],
        INTERPRETED + "single_kernels.py::test_binary_digits_of_counts",
        "63",
    ),
    "a capture in one thread refuses what other threads compile": (
        [(LAUNCH, "class _Capture(threading.local):", "class _Capture:")],
        INTERPRETED + "tile_sizes.py::test_a_first_call_under_capture_says_to_warm_up",
        r"assert 0 == 1",
    ),
    "a compilation while a CUDA graph is captured": (
        [(LAUNCH, "    if _capture.going:\n        raise", "    if False:\n        raise")],
        INTERPRETED + "tile_sizes.py::test_a_first_call_under_capture_says_to_warm_up",
        "DID NOT RAISE",
    ),
    "a grid higher than a device starts": (
        [
            (
                BITS,
                "(launch.cdiv(n, config.m) * launch.cdiv(width, config.n),),",
                "(launch.cdiv(n, config.m), launch.cdiv(width, config.n)),",
            )
        ],
        INTERPRETED + "tile_sizes.py::test_no_grid_is_higher_than_a_device_starts",
        r"assert \(?2 ?\*\* ?16\)? <",
    ),
    "kernels are not found in a plain checkout": (
        [("bench/__init__.py", "checkout.use()", "")],
        "bench/test_checkout.py::test_kernels_are_found_in_a_plain_checkout",
        "kernels are not installed",
    ),
    "one refused check costs the times of its side": (
        [
            (
                "bench/device/parts.py",
                "    again = {ENV_SIGN_PLANES",
                "    for name in spoiled(job.result['rows'], job.case) & set(comparison.sides):\n"
                "        del comparison.sides[name]\n"
                "    again = {ENV_SIGN_PLANES",
            )
        ],
        IN_BENCH + "test_parts.py::test_what_the_checks_refuse_is_timed_and_marked",
        "KeyError: 'torch bf16'",
    ),
    "a fault that shows while a result is checked is nobody's": (
        [
            (
                "bench/timing.py",
                "    except WrongResultError:\n        raise\n    except Exception as error:\n",
                "    except ArithmeticError as error:\n",
            )
        ],
        IN_BENCH
        + "test_worker.py::test_a_fault_that_shows_while_a_result_is_checked_is_the_sides_own",
        "KeyError",
    ),
    "a check that ended its process is made again": (
        [("bench/device/parts.py", 'job.sides and job.case["kind"] not in COMPARED', "False")],
        IN_BENCH + "test_worker.py::test_a_check_that_ends_its_process_is_not_made_again",
        r"assert \(0, 2\) == \(0, 1\)",
    ),
    "a step of many starts is timed with the host": (
        [("bench/device/machine.py", "SLEEP_SHARE * CYCLES * min(starting, default=0.0)", "0.0")],
        IN_BENCH + "test_machine.py::test_the_host_is_ahead_of_what_is_timed",
        r"1000000.*1000000",
    ),
    "a pointer of another dtype": (
        [(DRIVER, "arg.dtype != _POINTERS[letter]:", "False:")],
        IN_CUDA + "test_pointers_of_another_dtype_or_device_are_refused",
        "DID NOT RAISE",
    ),
    "a pointer of another device": (
        [(DRIVER, "arg.device != first.device:", "False:")],
        IN_CUDA + "test_pointers_of_another_dtype_or_device_are_refused",
        "DID NOT RAISE",
    ),
    "the capability of another device than the tensor's": (
        [
            (
                "bae_fast/ops/nvidia.py",
                "torch.cuda.get_device_capability(request.device_index)",
                "torch.cuda.get_device_capability()",
            )
        ],
        IN_CUDA + "test_the_capability_is_that_of_the_tensors_device",
        r"compute capability 8\.0; got 7\.5",
    ),
    "NVRTC does not find its second library": (
        [
            (
                "kernels/cuda/nvrtc.py",
                "                    ctypes.CDLL(str(other))\n",
                "                    pass\n",
            )
        ],
        IN_CUDA + "test_what_nvrtc_opens_by_name_is_loaded_before",
        "assert",
    ),
    "a context other than the caller's": (
        [(DRIVER, "    if context.value is None:\n", "    if True:\n")],
        IN_CUDA + "test_a_context_that_the_caller_has_made_current_stays",
        "assert",
    ),
    "sign planes made again though they fit": (
        [
            (
                "bae_fast/codes.py",
                "return max(total // _SIGN_PLANES_SHARE // 2**20, _SIGN_PLANES_MB)",
                "return _SIGN_PLANES_MB",
            )
        ],
        "tests/layer/test_memory.py::test_the_sign_planes_of_a_gpu_may_take_a_share_of_its_memory",
        "assert",
    ),
    "an operator of a step that waits for the device": (
        [
            (
                f"{BODIES}/covariance.py",
                "    k, n = counts.shape[0], words.shape[0]\n",
                "    k, n = counts.shape[0], words.shape[0]\n    int(n_rows)\n",
            )
        ],
        "bench/test_launches.py::test_no_operator_of_a_step_waits_for_the_device",
        "WaitsForDeviceError",
    ),
    "the backward pass of autograd's own operators is not watched for what waits": (
        [
            (
                "bench/launches.py",
                '{"meta" if t.is_meta else t.device.type for t in',
                "{t.device.type for t in",
            )
        ],
        "bench/test_launches.py::test_what_autograd_itself_starts_is_counted",
        r"assert \{'ones_like': 1\} == \{",
    ),
    "a step is captured on another device than its parameters'": (
        [("bae_fast/training/graph.py", "with current(self._device):", "if True:")],
        "tests/training/test_graph.py::test_a_step_is_captured_on_the_device_of_its_parameters",
        r"assert \[0, 0, 0, 0\] == \[1, 1, 1, 1\]",
    ),
    "a capture on a stream of another device": (
        [("bae_fast/training/graph.py", "stream=self._streams[here], ", "")],
        "tests/training/test_graph.py::test_cuda_graphs_are_captured_in_torchs_order",
        "'NoneType' object has no attribute 'device'",
    ),
    "a capture refuses what other threads do on the device": (
        [("bae_fast/training/graph.py", ', capture_error_mode="thread_local"', "")],
        "tests/training/test_graph.py::test_cuda_graphs_are_captured_in_torchs_order",
        "on 0, global",
    ),
}


def together():
    """Faults that one checkout may have: of each test one, with Triton's interpreter or without."""
    groups = {}
    for fault, (_, test, _) in FAULTS.items():
        interpreted, turn = test.startswith(INTERPRETED), 0
        while any(FAULTS[other][1] == test for other in groups.get((interpreted, turn), ())):
            turn += 1
        groups.setdefault((interpreted, turn), []).append(fault)
    return groups


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the test of a fault says, by the fault: each group is run when it is first asked for."""
    said = {}

    def of(fault):
        if fault not in said:
            ((interpreted, _), faults), *_ = (g for g in together().items() if fault in g[1])
            changes = [change for each in faults for change in FAULTS[each][0]]
            root = shadow.checkout(tmp_path_factory.mktemp("planted") / "checkout", changes)
            variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
            tests = {each: FAULTS[each][1] for each in faults}
            texts = shadow.failures(root, tests.values(), **variables)
            for each, test in tests.items():
                said[each] = texts[test.partition("::")[2]]
        return said[fault]

    return of


@pytest.mark.long
@pytest.mark.xdist_group("replanted")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_fails_its_test(fault, found):
    assert re.search(FAULTS[fault][2], found(fault)), found(fault)


# -- machine code --------------------------------------------------------------------------------


def refused(inspect, said):
    """An inspection fails by an assertion, in the line or with the numbers that are asked for."""
    with pytest.raises(AssertionError) as error:
        inspect()
    place = str(error.traceback[-1].statement)
    assert re.search(said, f"{error.value}\n{place}"), f"{error.value}\n{place}"


# terms and surrogate of the gradient as numbers that a kernel reads
AT_RUN_TIME = [
    (GRADIENT, '"n_bits", "stride_words"]', '"n_bits", "TERMS", "SURROGATE", "stride_words"]'),
    (GRADIENT, "    TERMS: tl.constexpr,\n    SURROGATE: tl.constexpr,\n", ""),
    (
        GRADIENT,
        "    n_bits,\n    width,\n    stride_G",
        "    n_bits,\n    TERMS,\n    SURROGATE,\n    width,\n    stride_G",
    ),
    (
        GRADIENT,
        "        n_bits,\n        width,\n",
        "        n_bits,\n        terms,\n        NUMBERS[surrogate],\n        width,\n",
    ),
    (GRADIENT, "        TERMS=terms,\n        SURROGATE=NUMBERS[surrogate],\n", ""),
]
# (what is changed, what the worker compiles, whether by the oldest triton, what is refused)
COMPILED = {
    "bits are an operand in registers": (
        [(f"{BODIES}/decode.py", '_UNPACKED = ("sm_90",)', "_UNPACKED = ()")],
        ("sm_90", "bfloat16", "small", "bits_product_kernel"),
        True,
        r"may read R\d+",
    ),
    "numbers are an operand in registers": (
        [
            (
                ENCODE,
                "tl.dot(operand(x), operand(W), pre)",
                "tl.dot(operand(x + x), operand(W), pre)",
            )
        ],
        ("sm_90", "bfloat16", "small", "encode_kernel"),
        True,
        r"may read R\d+",
    ),
    "a stride that is 1": (
        [(BITS, "return tl.cast(number, tl.int64)", "return number.to(tl.int64)")],
        ("sm_90", "float16", "ones", "encode_kernel"),
        False,
        r"has no attribute 'to'|W_at \+= wide",
    ),
    "terms and surrogate are chosen at run time": (
        AT_RUN_TIME,
        ("sm_90", "bfloat16", "few", "gradient_kernel"),
        False,
        r"assert 1\d{4} <= 9000",
    ),
    "an epilogue that spills": (
        [(GRADIENT, "part = 32  #", "part = 64  #")],
        ("sm_90", "bfloat16", "few", "gradient_kernel"),
        True,
        r"assert [1-9]\d* == 0",
    ),
    "a product is serialised for want of registers": (
        [
            (
                CONFIGS,
                "_HOPPER = _table(\n    Config(128, 256, 64, 8, 3)",
                "_HOPPER = _table(\n    Config(128, 256, 64, 4, 3)",
            )
        ],
        ("sm_90", "bfloat16", "few", "encode_kernel"),
        False,
        r"notes == \[\]",
    ),
    "int8 products of sm_100 become the instruction of older chips": (
        [
            (
                CONFIGS,
                '"sm_100": _HOPPER,',
                '"sm_100": {**_HOPPER, "sign_product": (Config(32, 128, 128, 4, 3),)},',
            )
        ],
        ("sm_100", "bfloat16", "small", "sign_product_kernel"),
        False,
        r"row\[made\] > 0",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", COMPILED)
def test_a_fault_of_the_machine_code_that_is_put_back_is_refused(fault, tmp_path):
    changes, arguments, oldest, said = COMPILED[fault]
    root, cache = shadow.checkout(tmp_path / "checkout", changes), tmp_path / "cache"
    cache.mkdir()

    def inspect():
        made = printed(
            "triton_compile_worker.py", *arguments, folder=cache, oldest=oldest, root=root
        )
        for row in made["kernels"]:
            test_triton_compile.check_row(arguments[0], row, oldest)

    refused(inspect, said)


PRODUCT = "product.cuh"
# (what is changed, what is refused) of the kernels with 1-bit instructions
OF_CUDA = {
    "addresses of fragments are made in the loop": (
        [
            (
                PRODUCT,
                "load_matrices(a[m], a_at + m * 16 * kStageWords);",
                "load_matrices(a[m], lefts + chunk_at(m * 16 + left_row(lane), "
                "left_chunk(slice, lane)));",
            ),
            (
                PRODUCT,
                "load_matrices(b, b_at + (plane * S::kColumns + n * 8) * kStageWords);",
                "load_matrices(b, rights + chunk_at(plane * S::kColumns + n * 8 + "
                "right_row(lane), right_chunk(slice, lane)));",
            ),
        ],
        r"assert \d+ <= 185",
    ),
    "addresses of copies are made in the loop": (
        [
            (
                PRODUCT,
                "    const int* source = from;\n",
                "    const int* source = from;\n"
                "    const int row = thread_index() / kStageChunks;\n"
                "    const long long stride = step / kApart, word = from - first - row * stride;\n",
            ),
            (
                PRODUCT,
                "      source += step;\n",
                "      source = first + (row + (part + 1) * kApart) * stride + word;\n",
            ),
        ],
        r"assert \d+ <= 185",
    ),
    "three blocks of a multiprocessor spill": (
        [("tiles.cuh", "constexpr int kPairBlocks = 2;", "constexpr int kPairBlocks = 3;")],
        r"assert (32|40) == 0",
    ),
}


@pytest.mark.parametrize("fault", OF_CUDA)
def test_a_fault_of_nvcc_that_is_put_back_is_refused(fault, tmp_path):
    from bae_fast.kernels_cuda import nvrtc

    if nvrtc.missing() is not None:
        pytest.skip(nvrtc.missing())
    changes, said = OF_CUDA[fault]
    source = "cooccurrence.cu"
    text, headers = nvrtc.read_sources(source)
    for name, before, after in changes:
        assert headers[name].count(before) == 1, name
        headers[name] = headers[name].replace(before, after)
    cubin = tmp_path / "planted.cubin"
    cubin.write_bytes(nvrtc.compile_cubin(source, text, headers, "sm_90"))
    rows = test_cuda_compile.kernels_of(cubin)

    def inspect():
        test_cuda_compile.check(rows, len(rows), "sm_90")
        for name, row in rows.items():
            test_cuda_compile.check_loop(name, row["sass"])

    refused(inspect, said)
