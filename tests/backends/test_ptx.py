"""Kernels run without a device: their PTX, interpreted, and the faults that only a device shows.

``tests/support/ptx`` runs what is asynchronous at the latest moment that is allowed and watches
shared memory and registers. Small programs show that each kind of fault is found; the kernels of
Triton and nvcc show that there is none in them, and one more for each that is planted. What an
interpreter cannot show is in ``test_triton_gpu.py``. The rest of the kernels is ``long``.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from count_digits import count_digits, from_digits
from triton_process import cache_of_run, printed

from bae_fast.ops import registry
from bae_fast.packing import columns_to_features, pack_rows, rows_to_columns, unpack_rows

ROOT = Path(__file__).resolve().parents[2]
TRITON, CUDA = registry.BACKENDS["triton"], registry.BACKENDS["cuda"]

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry program(.param .u64 source, .param .u64 target)
.reqntid 64
{
.reg .pred %p<4>;
.reg .b16 %h<4>;
.reg .b32 %r<40>;
.reg .b64 %rd<8>;
ld.param.u64 %rd0, [source];
ld.param.u64 %rd1, [target];
mov.u32 %r0, %tid.x;
mov.u32 %r1, memory;
mul.wide.u32 %rd2, %r0, 16;
add.s64 %rd3, %rd0, %rd2;
mul.wide.u32 %rd4, %r0, 4;
add.s64 %rd5, %rd1, %rd4;
shl.b32 %r2, %r0, 2;
add.s32 %r3, %r1, %r2;
sub.s32 %r4, 252, %r2;
add.s32 %r5, %r1, %r4;
shl.b32 %r6, %r0, 4;
add.s32 %r7, %r1, %r6;
"""
# every thread hands a number to the thread that mirrors it
MIRROR = """
ld.global.b32 %r8, [%rd3];
st.shared.b32 [%r3], %r8;
bar.sync 0;
ld.shared.b32 %r9, [%r5];
st.global.b32 [%rd5], %r9;
ret;
}
"""
# two stages of copies; every thread reads its neighbour's of each
COPIES = """
cp.async.cg.shared.global [%r7], [%rd3], 16;
cp.async.commit_group;
cp.async.cg.shared.global [%r7+1024], [%rd3], 16;
cp.async.commit_group;
xor.b32 %r10, %r6, 16;
add.s32 %r11, %r1, %r10;
cp.async.wait_group 1;
bar.sync 0;
ld.shared.b32 %r12, [%r11];
bar.sync 0;
cp.async.ca.shared.global [%r7], [%rd3+4], 4;
cp.async.commit_group;
cp.async.wait_group 1;
bar.sync 0;
ld.shared.b32 %r13, [%r11+1024];
add.s32 %r14, %r12, %r13;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.b32 %r15, [%r11];
add.s32 %r14, %r14, %r15;
st.global.b32 [%rd5], %r14;
ret;
}
"""


STAGE = """
and.b32 %r22, %r20, 1;
shr.u32 %r23, %r20, 1;
and.b32 %r24, %r23, 1;
xor.b32 %r25, %r24, 1;
shl.b32 %r26, %r22, 3;
add.s32 %r27, %r1, %r26;
shl.b32 %r28, %r22, 7;
add.s32 %r29, %r1, %r28;
"""
# thread 0 copies eight tiles through two stages, the second warp sums them
PIPELINE = f"""
setp.ne.u32 %p0, %r0, 0;
@%p0 bra ready;
mbarrier.init.shared::cta.b64 [%r1+512], 1;
mbarrier.init.shared::cta.b64 [%r1+520], 1;
mbarrier.init.shared::cta.b64 [%r1+528], 32;
mbarrier.init.shared::cta.b64 [%r1+536], 32;
fence.mbarrier_init.release.cluster;
ready:
bar.sync 0;
mov.u32 %r20, 0;
mov.u32 %r21, 0;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra consumer;
@%p0 bra end;
producer:
{STAGE}
free:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r27+528], %r25;
@!%p2 bra free;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r27+512], 128;
mul.wide.u32 %rd6, %r20, 128;
add.s64 %rd7, %rd0, %rd6;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r29], [%rd7], 128, [%r27+512];
add.s32 %r20, %r20, 1;
setp.lt.u32 %p3, %r20, 8;
@%p3 bra producer;
bra.uni end;
consumer:
{STAGE}
full:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r27+512], %r24;
@!%p2 bra full;
sub.s32 %r30, %r2, 128;
add.s32 %r31, %r29, %r30;
ld.shared.b32 %r32, [%r31];
add.s32 %r21, %r21, %r32;
mbarrier.arrive.shared::cta.b64 _, [%r27+528];
add.s32 %r20, %r20, 1;
setp.lt.u32 %p3, %r20, 8;
@%p3 bra consumer;
st.global.b32 [%rd5], %r21;
end:
ret;
}}
"""
FREE = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r27+528], %r25;\n@!%p2 bra free;\n"
FULL = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r27+512], %r24;\n@!%p2 bra full;\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r27+528];\n"


def program(text, **options):
    """Faults of a small program of 64 threads, and what it wrote."""
    store = ptx.Global()
    source, target = np.arange(256, dtype=np.int32), np.zeros(64, np.int32)
    values = [store.add(source), store.add(target)]
    kernel = ptx.parse(HEAD + text)
    found = ptx.run(kernel, (1,), values, store, threads=64, shared_bytes=2048, **options)
    return [fault.what for fault in found], target


MODES = pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
ORDERS = pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])


@MODES
@ORDERS
def test_programs_without_a_fault(late, apart):
    threads = np.arange(64)
    found, target = program(MIRROR, late=late, apart=apart)
    assert found == []
    assert (target == 4 * (63 - threads)).all()
    found, target = program(COPIES, late=late, apart=apart)
    assert found == []
    neighbour = 4 * (threads ^ 1)
    assert (target == 3 * neighbour + 1).all()
    found, target = program(PIPELINE, late=late, apart=apart)
    assert found == []
    assert (target[32:] == np.arange(256).reshape(8, 32).sum(0)).all()


@MODES
@ORDERS
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (MIRROR.replace("bar.sync 0;\n", ""), "without a barrier behind the write"),
        (MIRROR.replace("bar.sync 0;", "bar.warp.sync -1;"), "without a barrier behind the write"),
        (MIRROR.replace("[%r3], %r8", "[%r1], %r8"), "two threads write one place"),
        (MIRROR.replace("[%r5];", "[%r5+1024];"), "nothing has written"),
        # a wait one short, none at all, and a stage that is used again before it is read
        (COPIES.replace("wait_group 0", "wait_group 1"), "asynchronous copy still writes"),
        (re.sub(r"cp.async.wait_group \d;\n", "", COPIES), "asynchronous copy still writes"),
        (
            COPIES.replace("bar.sync 0;\ncp.async.ca", "cp.async.ca"),
            "without a barrier behind a read",
        ),
        (COPIES.replace("cp.async.wait_group 1;\nbar", "cp.async.wait_group 1;\n//"), "barrier"),
        # bulk copies: a stage that is used again too early, read too early, handed on too early
        (PIPELINE.replace(FREE, ""), "write to shared memory|more threads arrive"),
        (PIPELINE.replace(FULL, ""), "read of shared memory"),
        (
            PIPELINE.replace(ARRIVE, "").replace(FULL, FULL + ARRIVE),
            "without a barrier behind a read",
        ),
        (PIPELINE.replace("bar.sync 0;\n", ""), "mbarrier"),
    ],
    ids=[
        "barrier", "warps", "place", "nothing", "short", "none", "stage", "behind",
        "free", "full", "handed", "started",
    ],
)  # fmt: skip
def test_a_fault_is_found(text, what, late, apart):
    assert text not in (MIRROR, COPIES, PIPELINE)
    try:
        found = program(text, late=late, apart=apart)[0]
    except ptx.PtxError as error:  # where no fault came before
        found = [str(error)]
    assert any(re.search(what, each) for each in found)


@ORDERS
def test_writes_of_one_value_need_no_order(apart):
    text = MIRROR.replace("bar.sync 0;", "st.shared.b32 [%r1+1024], 7;\nbar.sync 0;")
    assert program(text, apart=apart)[0] == []
    lane = text.replace("[%r1+1024], 7", "[%r1+1024], %r0")
    assert program(lane, apart=apart)[0] != []


def test_what_is_not_known_is_refused_by_name():
    line = HEAD.count("\n") + 1
    with pytest.raises(
        ptx.PtxError, match=rf"line {line}: the opcode tanh\.approx\.f32 is not known"
    ):
        program("tanh.approx.f32 %r1, %r2;\n" + MIRROR)
    with pytest.raises(ptx.PtxError, match=r"the opcode add\.sat\.s32 is not known"):
        program("add.sat.s32 %r1, %r2, %r3;\n" + MIRROR)
    with pytest.raises(ptx.PtxError, match="%r99 is not declared"):
        program("mov.b32 %r99, 0;\n" + MIRROR)
    with pytest.raises(ptx.PtxError, match="kernel must be one of"):
        ptx.parse(HEAD + MIRROR, "another")


def test_what_no_device_runs_is_refused():
    with pytest.raises(ptx.PtxError, match="global memory outside of every argument"):
        program(MIRROR.replace("[%rd5], %r9", "[%rd5+4], %r9"))
    with pytest.raises(ptx.PtxError, match="not a multiple of 4"):
        program(MIRROR.replace("[%r3], %r8", "[%r3+2], %r8"))
    with pytest.raises(ptx.PtxError, match="shared memory of 2048 bytes is left"):
        program(MIRROR.replace("[%r5];", "[%r5+4096];"))
    half = "setp.lt.u32 %p0, %r0, 32;\n"
    found, _ = program(half + MIRROR.replace("bar.sync 0", "@%p0 bar.sync 0, 64"))
    assert "wait for ever: barrier 0" in found[-1]
    with pytest.raises(ptx.PtxError, match="wait for ever: mbarrier"):
        program(PIPELINE.replace(ARRIVE, ""))
    with pytest.raises(ptx.PtxError, match="wait for ever: mbarrier"):
        program(PIPELINE.replace("_, [%r27+512], 128", "_, [%r27+512], 144"))
    lanes = "setp.lt.u32 %p0, %r0, 40;\n"
    with pytest.raises(ptx.PtxError, match="part of a warp"):
        program(lanes + MIRROR.replace("bar.sync 0", "@%p0 bar.sync 0"))


# -- Triton ---------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    TRITON.unavailable is not None, reason=f"impl='triton' cannot run: {TRITON.unavailable}"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What one case has compiled, others read."""
    return cache_of_run(tmp_path_factory, "ptx")


def worker(*arguments, folder, oldest=False):
    """What the worker prints, by the installed triton or by the oldest one."""
    return printed("ptx_worker.py", *arguments, folder=folder, oldest=oldest)["runs"]


def check(runs, *started):
    """As it is, a case is right and without a fault; with each that is planted it has one."""
    planted = []
    for run in runs:
        if run["planted"]:
            assert run["faults"], run["planted"]
            planted.append(run["planted"])
        else:
            assert run["wrong"] == run["faults"] == []
            assert set(run["started"]) >= set(started)
    assert len(planted) < len(runs)
    return planted


@needs_triton
@pytest.mark.slow
def test_encode_is_right_and_planted_faults_are_found(cache):
    assert len(check(worker("sm_80", "encode", "late", folder=cache), "encode_kernel")) == 2


@needs_triton
@pytest.mark.slow
def test_the_packed_product_of_triton_3_6_races_on_sm_90(cache):
    """Why decode unpacks there: the next bits are written while products in flight read these.

    Run at the latest moment the numbers are wrong, at the earliest they are right by chance.
    """
    runs = worker("sm_90", "packed", "late", "early", folder=cache, oldest=True)
    assert [run["mode"] for run in runs] == ["late", "early"]
    for run in runs:
        assert (run["wrong"] != []) == (run["mode"] == "late")
        assert run["faults"]
        assert all("write to a register of a product in flight" in each for each in run["faults"])


KERNELS = {
    "encode": ["encode_kernel"],
    "packed": ["bits_product_kernel"],
    "covariance": [
        "transpose_kernel",
        "covariance_kernel",
        "sign_operands_kernel",
        "sign_product_kernel",
        "from_digits_kernel",
    ],
    "step": [
        "encode_kernel",
        "covariance_kernel",
        "entropy_kernel",
        "totals_kernel",
        "slopes_kernel",
        "sign_product_kernel",
        "gradient_kernel",
    ],
}


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(
    ("chip", "oldest", "case", "modes"),
    [
        ("sm_80", False, "step", ["late"]),
        ("sm_80", False, "encode", ["early", "apart"]),
        ("sm_80", False, "packed", ["late", "apart"]),
        ("sm_90", False, "encode", ["late"]),
        ("sm_90", False, "covariance", ["early", "apart"]),
        pytest.param("sm_90", True, "step", ["late"], marks=pytest.mark.matrix),
    ],
)
def test_kernels_are_right_at_the_latest_moment(chip, oldest, case, modes, cache):
    planted = check(worker(chip, case, *modes, folder=cache, oldest=oldest), *KERNELS[case])
    assert bool(planted) == (case == "encode")


@needs_triton
@pytest.mark.long
def test_kernels_of_lists_are_right_warp_after_warp_and_planted_faults_are_found(cache):
    """Counters lie in global memory, whose hazards show in the numbers alone."""
    right, forgetful, unordered = worker("sm_90", "lists", "late", "apart", folder=cache)
    check(
        [right],
        "length_kernel",
        "list_kernel",
        "serve_kernel",
        "pairs_kernel",
        "settle_kernel",
        "signs_kernel",
    )
    assert forgetful["planted"] == "counters keep what was counted"
    assert "total" in forgetful["wrong"]
    assert unordered["faults"] or unordered["wrong"]


# -- nvcc -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: PTX of one of the CUDA sources by nvcc, as it is or changed."""
    if CUDA.unavailable is not None:
        pytest.skip(f"impl='cuda' cannot run: {CUDA.unavailable}")
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")

    @functools.cache
    def text(name, changes=()):
        folder = tmp_path_factory.mktemp("nvcc")
        target, source = folder / f"{name}.ptx", ROOT / "csrc" / "cuda" / name
        if changes:  # of the source, each of which must be found
            changed = source.read_text()
            for old, new in changes:
                assert changed.count(old) == 1, old
                changed = changed.replace(old, new)
            source = folder / name
            source.write_text(changed)
        headers = f"-I{ROOT}/csrc/cuda"
        chip = "compute_90a" if name.endswith("panels.cu") else "compute_80"
        command = ["nvcc", "-std=c++17", "-ptx", f"-arch={chip}", headers, source, "-o", target]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target.read_text()

    return text


@pytest.fixture
def interpreted(compiled, monkeypatch):
    """The launchers of impl="cuda" start the interpreter; what it found, and a change of PTX."""
    from bae_fast.kernels_cuda import covariance as kernels
    from bae_fast.kernels_cuda import driver

    state = {"faults": [], "change": lambda text: text, "changes": (), "options": {}}

    def start(kernel, blocks, *args):
        values = [value.value or 0 for value in driver.pack(kernel, args)]
        store = ptx.Global()
        for arg in args:
            if isinstance(arg, torch.Tensor):
                store.add(arg)
        parsed = ptx.parse(state["change"](compiled(kernel.source, state["changes"])), kernel.name)
        state["faults"] += ptx.run(
            parsed, (blocks,), values, store, threads=kernel.threads,
            shared_bytes=kernel.shared_bytes, **state["options"],
        )  # fmt: skip

    monkeypatch.setattr(driver, "start", start)
    monkeypatch.setattr(kernels, "from_digits", from_digits)  # no kernel of CUDA's
    return state


def codes(n, k):
    torch.manual_seed(0)
    dense = torch.rand(n, k) < torch.rand(k)
    dense[:, 5] = dense[:, 6]
    b = dense.double()
    v = n * b.t() @ b - torch.outer(b.sum(0), b.sum(0))  # below 2^53: exact
    v.fill_diagonal_(0)
    features = columns_to_features(rows_to_columns(pack_rows(dense), k))
    return dense, features, v


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "late"),
    [(100, True), *(pytest.param(200, late, marks=pytest.mark.long) for late in (True, False))],
)
def test_covariance_by_nvcc_is_exact(k, late, interpreted):
    from bae_fast.kernels_cuda import covariance as kernels

    dense, features, v = codes(1100, k)
    interpreted["options"] = {"late": late, "apart": not late}
    counts, n_rows = dense.sum(0), torch.tensor(len(dense))
    total, signs = kernels.covariance(features, counts, n_rows, True, len(dense))
    assert interpreted["faults"] == []
    assert int(total) == int(v.abs().sum())
    above, below = unpack_rows(signs, k, torch.int8)
    assert torch.equal((above - below).double(), v.sign())


PLANTED = {
    "a wait one short": lambda text: text.replace("wait_group 1;", "wait_group 2;"),
    "no barrier": lambda text: re.sub(r"bar\.sync\s+0;", "", text),
    "a stage used again too early": lambda text: re.sub(
        r"(cp\.async\.wait_group 1;[^@]*?)bar\.sync\s+0;", r"\1", text
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_planted_faults_of_nvcc_are_found(planted, interpreted, compiled):
    from bae_fast.kernels_cuda import covariance as kernels

    text = compiled("cooccurrence.cu")
    assert PLANTED[planted](text) != text
    dense, features, _ = codes(1100, 100)
    interpreted["change"] = PLANTED[planted]
    kernels.covariance(features, dense.sum(0), torch.tensor(len(dense)), True, len(dense))
    assert interpreted["faults"]


@pytest.mark.long
@pytest.mark.parametrize("n_bound", [300, 50_000])
@pytest.mark.parametrize("aligned", [False, True])
def test_slabs_and_products_by_nvcc_are_exact(n_bound, aligned, interpreted):
    from bae_fast.kernels_cuda import covariance as kernels

    n, k = 300, 200
    dense, features, v = codes(n, k)
    counts, n_rows = dense.sum(0), torch.tensor(n)
    signs = kernels.sign_slab(features, counts, n_rows, 40, 190, n_bound)
    above, below = unpack_rows(signs, k, torch.int8)
    assert torch.equal((above - below).double(), v.sign()[40:190])
    words, digits = pack_rows(dense), count_digits(counts, n)
    if aligned:  # rows of 8 words
        pad = lambda t: torch.nn.functional.pad(t, (0, 1)).contiguous()  # noqa: E731
        words, signs, digits = pad(words), pad(signs), pad(digits)
    product = kernels.sign_product(words, signs, digits, n_rows, torch.tensor(0.5))
    b, s = dense.double(), v.sign()[:, 40:190]
    assert torch.equal(product, (n * (b @ s) - b.sum(0) @ s).float() * 0.5)
    assert interpreted["faults"] == []


# -- asynchronous products of packed bits ---------------------------------------------------------


@pytest.fixture
def by_panels(interpreted, monkeypatch):
    """A function: what the covariance by panels makes of a code, on a number of multiprocessors."""
    from bae_fast.kernels_cuda import covariance as kernels
    from bae_fast.kernels_cuda import driver

    monkeypatch.setenv("BAE_FAST_CUDA_PAIRS", "wgmma")
    monkeypatch.setattr(driver, "arch", lambda device: "sm_90")

    def made(dense, features, processors, keep_signs=True):
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)
        counts, n_rows = dense.sum(0), torch.tensor(len(dense))
        return kernels.covariance(features, counts, n_rows, keep_signs, len(dense))

    return made


def check_panels(by_panels, n, k, processors):
    dense, features, v = codes(n, k)
    total, signs = by_panels(dense, features, processors)
    assert int(total) == int(v.abs().sum())
    words = unpack_rows(signs, 32 * signs.shape[2], torch.int8)
    assert torch.equal((words[0] - words[1])[:, :k].double(), v.sign())
    assert not words[..., k:].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "processors", "late", "apart"),
    [
        (1100, 200, 1, True, False),
        # few features, one tile, a stage more than bits, all stages and as few as there are
        pytest.param(2, 7, 132, True, True, marks=pytest.mark.long),
        pytest.param(1100, 300, 1, False, True, marks=pytest.mark.long),
        pytest.param(1024, 128, 132, False, True, marks=pytest.mark.long),
        pytest.param(1025, 129, 2, True, True, marks=pytest.mark.long),
        pytest.param(4096, 520, 2, True, False, marks=pytest.mark.long),
        pytest.param(4096, 520, 4, False, True, marks=pytest.mark.long),
        pytest.param(8192, 385, 1, True, True, marks=pytest.mark.long),
        pytest.param(6000, 300, 3, False, False, marks=pytest.mark.long),
    ],
)
def test_covariance_by_panels_is_exact(n, k, processors, late, apart, interpreted, by_panels):
    """Blocks of several tiles change their left panel between the turns of two warpgroups."""
    interpreted["options"] = {"late": late, "apart": apart}
    check_panels(by_panels, n, k, processors)
    assert interpreted["faults"] == []


EMPTY = "wait_for_phase(barriers.empty(place.stage), place.parity ^ 1);"
FULL_STAGE = "wait_for_phase(barriers.full(place.stage), place.parity);"
READ = "synchronize_warpgroup(1 + me);  // counts are here"
STARTED = "publish_barriers();\n  }\n"
ZERO = "memory[thread_index()] = 0;"
# changes of asynchronous products and their barriers, and what each is found by
FAULTS_OF_PRODUCTS = {
    "no fence before the products": ([("fence_products();", "")], "no fence between a product"),
    "a wait one short": (
        [("wait_products<1>", "wait_products<2>")],
        "that an asynchronous product still reads",
    ),
    "sums read too early": (
        [("wait_products<0>", "wait_products<1>")],
        "read of a register of a product in flight",
    ),
    "barriers not published": ([("publish_barriers();", "")], "no fence has published"),
    "barriers used before they start": (
        [(STARTED + "  synchronize();", STARTED)],
        "mbarrier",
    ),
}
# those of panels.cu
FAULTS_OF_PANELS = {
    **FAULTS_OF_PRODUCTS,
    "a stage used again too early": ([(EMPTY, "")], "write to shared memory|more threads arrive"),
    "a stage read too early": ([(FULL_STAGE, "")], "read of shared memory"),
    "a panel changed too early": (
        [("wait_for_phase(barriers.panel_empty(), parity);", "")],
        "write to shared memory|still writes|more threads arrive",
    ),
    "a warp hands on what others still read": (
        [
            ("barriers.empty(stage), 4);", "barriers.empty(stage), 1);"),
            ("barriers.panel_empty(), 4 * kConsumers", "barriers.panel_empty(), kConsumers"),
            ("barriers.turn(who), 4);", "barriers.turn(who), 1);"),
            ("if (lane == 0) arrive(barrier);", "if (thread == 0) arrive(barrier);"),
        ],
        "without a barrier behind a read",
    ),
    "counts read before they are here": (
        [(READ, READ.partition(";")[2])],
        "shared memory without a barrier|nothing has written",
    ),
    "no proxy fence behind ordinary writes": (
        [(STARTED, STARTED + ZERO)],
        "a bulk copy to what was written without a proxy fence",
    ),
}
# as the last, and right
FENCED = [(STARTED, STARTED + ZERO + 'asm volatile("fence.proxy.async;" ::: "memory");')]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("no ") else pytest.param(name, marks=pytest.mark.long)
        for name in FAULTS_OF_PANELS
    ],
)
def test_planted_faults_of_panels_are_found(name, interpreted, by_panels):
    changes, what = FAULTS_OF_PANELS[name]
    interpreted["changes"] = tuple(changes)
    shape = (40, 130) if name.startswith("no ") else (1100, 300)
    if name == "a wait one short":  # a stage is used again within one product
        shape = (8192, 130)
    dense, features, _ = codes(*shape)
    try:
        by_panels(dense, features, 1, keep_signs=False)
        found = [fault.what for fault in interpreted["faults"]]
    except ptx.PtxError as error:  # where no fault came before
        found = [str(error)]
    assert any(re.search(what, each) for each in found), found


@pytest.mark.long
def test_ordinary_writes_behind_a_proxy_fence_are_no_fault(interpreted, by_panels):
    interpreted["changes"] = tuple(FENCED)
    check_panels(by_panels, 1100, 300, 1)
    assert interpreted["faults"] == []


@pytest.mark.long
def test_a_panel_without_the_swizzle_is_wrong(interpreted, by_panels):
    """Chunks that lie in another order than products read meet those of other bits."""
    interpreted["changes"] = (("to + tile_chunk_at(row, chunk)", "to + at * kChunkWords"),)
    dense, features, v = codes(1100, 100)
    total, _ = by_panels(dense, features, 1, keep_signs=False)
    assert int(total) != int(v.abs().sum())


# -- asynchronous products with the signs ---------------------------------------------------------


def bits_and_signs(n, columns, k):
    """Bits and signs, N beyond int32's products, n^T S of other rows, and N (B S) - n^T S."""
    torch.manual_seed(n + columns + k)
    dense, s = torch.rand(n, k) < torch.rand(k), torch.randint(-1, 2, (columns, k))
    n_rows, of_counts = 2**24, torch.randint(0, 2**24, (k,)) @ s.t()
    return dense, s, torch.tensor(n_rows), of_counts, n_rows * (dense.long() @ s.t()) - of_counts


@pytest.fixture
def by_sign_panels(interpreted, monkeypatch):
    """A function: the product with the signs, and what it has to be."""
    from bae_fast.kernels_cuda import covariance as kernels

    def made(n, columns, k, processors, padding=0):
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)
        dense, s, n_rows, of_counts, exact = bits_and_signs(n, columns, k)
        words, planes = pack_rows(dense), torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
        if padding:  # words behind the width, all ones, which are not to be read
            pad = lambda t: torch.nn.functional.pad(t, (0, padding), value=-1)  # noqa: E731
            words, planes = (pad(t)[..., : t.shape[-1]] for t in (words, planes))
        scale, out = torch.tensor(1 / 3), torch.full((n, columns), torch.nan)
        got = kernels.panel_sign_product(words, planes, of_counts, n_rows, scale, out)
        return got, exact.float() * scale

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "columns", "k", "processors", "padding", "late", "apart"),
    [
        (70, 41, 1100, 1, 0, True, False),
        # one of everything; edges of words, of tiles and of 1024 bits; a stage more than there are;
        # blocks that take several results; lines that start on 16 bytes, with a width that does not
        pytest.param(1, 1, 1, 132, 0, True, True, marks=pytest.mark.long),
        pytest.param(256, 128, 1024, 132, 0, False, True, marks=pytest.mark.long),
        pytest.param(257, 129, 1025, 3, 0, True, True, marks=pytest.mark.long),
        pytest.param(300, 130, 1100, 1, 1, False, False, marks=pytest.mark.long),
        pytest.param(40, 60, 4100, 1, 0, True, True, marks=pytest.mark.long),
        pytest.param(257, 20, 2100, 2, 2, True, False, marks=pytest.mark.long),
    ],
)
def test_the_product_by_sign_panels_is_exact(
    n, columns, k, processors, padding, late, apart, interpreted, by_sign_panels
):
    interpreted["options"] = {"late": late, "apart": apart}
    got, exact = by_sign_panels(n, columns, k, processors, padding)
    assert interpreted["faults"] == []
    assert torch.equal(got, exact)


@pytest.mark.long
def test_tiles_of_planes_are_made_for_some_columns_at_a_time(
    interpreted, by_sign_panels, monkeypatch
):
    from bae_fast.kernels_cuda import covariance as kernels

    monkeypatch.setattr(kernels, "TILES_BYTES", 2 * 2**15)  # two panels of 300 bits a line
    got, exact = by_sign_panels(20, 300, 300, 2)
    assert interpreted["faults"] == []
    assert torch.equal(got, exact)


@pytest.mark.long
def test_both_forms_of_the_product_are_one_to_the_last_bit(interpreted, monkeypatch):
    from bae_fast.kernels_cuda import covariance as kernels
    from bae_fast.kernels_cuda import driver

    monkeypatch.setattr(driver, "arch", lambda device: "sm_90")
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 2)
    dense, features, _ = codes(70, 100)
    counts, n_rows = dense.sum(0), torch.tensor(70)
    signs = kernels.sign_slab(features, counts, n_rows, 30, 90, 70)
    given = (pack_rows(dense), signs, count_digits(counts, 70), n_rows, torch.tensor(0.1))
    found = []
    for form in ("mma", "wgmma"):
        monkeypatch.setenv("BAE_FAST_CUDA_SIGNS", form)
        found.append(kernels.sign_product(*given))
    assert interpreted["faults"] == []
    assert found[0].any()
    assert torch.equal(*found)


# those of sign_panels.cu
FAULTS_OF_SIGN_PANELS = {
    **FAULTS_OF_PRODUCTS,
    "a stage used again too early": (
        [("wait_for_phase(ring.empty(place.stage), place.parity ^ 1);", "")],
        "write to shared memory|more threads arrive",
    ),
    "a stage read too early": (
        [("wait_for_phase(ring.full(place.stage), place.parity);", "")],
        "read of shared memory",
    ),
    "a stage of which only the rows are waited for": (
        [("ring.full(place.stage), kLineStageBytes", "ring.full(place.stage), kLineTileBytes")],
        "read of shared memory",
    ),
    "a warp hands on what others still read": (
        [
            ("ring.empty(stage), 4 * kConsumers", "ring.empty(stage), kConsumers"),
            ("if (lane == 0) arrive(", "if (thread == 0) arrive("),
        ],
        "without a barrier behind a read",
    ),
    "no proxy fence behind ordinary writes": (
        [(STARTED, STARTED + "shared_memory()[300 + thread_index()] = 0;")],
        "a bulk copy to what was written without a proxy fence",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("no fence") else pytest.param(name, marks=pytest.mark.long)
        for name in FAULTS_OF_SIGN_PANELS
    ],
)
def test_planted_faults_of_sign_panels_are_found(name, interpreted, by_sign_panels):
    changes, what = FAULTS_OF_SIGN_PANELS[name]
    interpreted["changes"] = tuple(changes)
    try:  # stages are used again within one result where bits are many
        by_sign_panels(40, 20, 70 if name.startswith("no ") else 3100, 1)
        found = [fault.what for fault in interpreted["faults"]]
    except ptx.PtxError as error:  # where no fault came before
        found = [str(error)]
    assert any(re.search(what, each) for each in found), found


# changes of sign_panels.cu that make other numbers
WRONG_SIGN_PANELS = {
    "no swizzle": ("tile_chunk_at(line, at % kTileChunks)", "at % kTileChunks * 4 + line * 32"),
    "a plane is not complemented": ("-plane, line", "0, line"),
    "ones of one lane": ("count += shuffle_xor(count, mask)", "count += 0"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", WRONG_SIGN_PANELS)
def test_other_tiles_make_other_numbers(name, interpreted, by_sign_panels):
    """What lies in tiles is held by the numbers alone."""
    interpreted["changes"] = (WRONG_SIGN_PANELS[name],)
    got, exact = by_sign_panels(40, 20, 300, 1)
    assert not torch.equal(got, exact)
