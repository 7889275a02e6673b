"""Every Triton kernel compiled ahead of time for real chips, without a GPU.

What is compiled is what the backend starts, with every default tile size of the chip. A build that
lost its matrix instructions or spilled would be many times slower and pass every other test; one
that writes a register which an asynchronous instruction still reads would be wrong now and then.
The default run compiles one small variant a kernel for one chip. The long proofs take every chip,
by the oldest triton that is supported or by the newest, and of each kernel the largest tile, and
for one chip what an assembler once spilled. All variants of all chips by both versions take most
of an hour: ``make test-matrix``.
"""

import machine_code
import pytest
from triton_process import OLDEST, cache_of_run, printed

from bae_fast.ops import registry

TRITON = registry.BACKENDS["triton"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        TRITON.unavailable is not None, reason=f"impl='triton' cannot run: {TRITON.unavailable}"
    ),
]

# kernels that hold a product, by the dtype of its operands
HALF = {"encode_kernel", "bits_product_kernel", "gradient_kernel"}
INTEGER = {"covariance_kernel", "sign_product_kernel"}
LISTS = {"length_kernel", "list_kernel", "serve_kernel", "pairs_kernel", "settle_kernel",
         "signs_kernel"}  # fmt: skip
# what follows from the counts of the columns
COUNTS = {"entropy_kernel", "totals_kernel", "slopes_kernel", "sign_operands_kernel",
          "from_digits_kernel"}  # fmt: skip
# barriers between the counting of a feature and what is read, forgotten and counted next
BARRIERS = {"pairs_kernel": 2, "signs_kernel": 3}
# of a kernel at sm_90: the gradient's with all terms has 7,904 and 8,000 by the two versions, and
# 10,800 with terms and surrogate chosen at run time
INSTRUCTIONS = 9000
# the instruction that each chip's products must become
INSTRUCTION = {
    "sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"
}  # fmt: skip
EVERY = [(chip, dtype) for chip in INSTRUCTION for dtype in ("bfloat16", "float16", "float32")]
VERSIONS = pytest.mark.parametrize("oldest", [False, True], ids=["newest", OLDEST])


def instruction(chip, kernel, oldest):
    """What the products of a kernel must become."""
    # Triton 3.6 knows tcgen05 for floating products only, and takes the instruction of older chips
    older = chip == "sm_100" and oldest and kernel in INTEGER
    return "mma" if older else INSTRUCTION[chip]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Empty at first, so that everything is compiled, but once."""
    return cache_of_run(tmp_path_factory, "compiled")


def worker(*arguments, folder, oldest=False):
    """What the worker prints, by the installed triton or by the oldest one."""
    found = printed("triton_compile_worker.py", *arguments, folder=folder, oldest=oldest)
    return found if isinstance(found, list) else found["kernels"]


def check(chip, dtype, rows, oldest=False):
    kernels = {row["kernel"] for row in rows}
    if dtype == "float32":
        expected = {"threshold_kernel", "gradient_kernel", "transpose_kernel"} | INTEGER
    elif chip == "sm_90":
        # bits in registers of an asynchronous product: see bodies/decode.py
        others = {"transpose_kernel", "unpack_kernel"}
        expected = (HALF - {"bits_product_kernel"}) | INTEGER | others
    else:
        expected = HALF | INTEGER | {"transpose_kernel"}
    assert kernels == expected | LISTS | COUNTS
    for row in rows:
        check_row(chip, row, oldest)


def check_row(chip, row, oldest=False):
    """The machine code of one kernel."""
    from bae_fast.kernels.configs import SHARED_MEMORY  # needs no triton

    # rectangle and official in the tile of 256 columns, by Triton 3.6's assembler: it waits for
    # each product, with parts of 16 columns behind the product as with 32; slower, not wrong
    crowded = oldest and row["kernel"] == "gradient_kernel"
    notes = [x for x in row["serialized"] if not (crowded and x.startswith("(C7515)"))]
    assert notes == [], row
    assert row["stack"] == row["local"] == row["spills"] == row["ptx_local"] == 0, row
    assert row["shared"] <= SHARED_MEMORY[chip], row
    assert row["registers"] <= 255, row
    assert row["float_atomics"] == 0, row
    assert row["rewritten"] == [], row
    if chip == "sm_90":
        assert row["instructions"] <= INSTRUCTIONS, row
    product = row["kernel"] in HALF | INTEGER and row["constants"].get("PRODUCT") != "False"
    if product:
        made = instruction(chip, row["kernel"], oldest)
        assert row[made] > 0, row
        assert row["tcgen05"] == 0 or made == "tcgen05", row
        assert row["cp_async"] > 0, row
    else:
        assert row["mma"] == row["wgmma"] == row["tcgen05"] == 0, row
    assert row["barriers"] >= BARRIERS.get(row["kernel"], 0), row
    if row["kernel"] == "unpack_kernel":
        assert row["wide_global_stores"] > 0, row
    if row["kernel"] in INTEGER:
        # unpacked bits reach shared memory by the word or wider, never byte by byte
        assert row["byte_stores"] == 0, row
        assert row["imma"] > 0 or made == "tcgen05", row


def test_every_kernel_compiles_to_matrix_instructions_without_spills(cache):
    check("sm_90", "bfloat16", worker("sm_90", "bfloat16", "small", folder=cache))


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        pytest.param("sm_80", "bfloat16", marks=pytest.mark.matrix),
        pytest.param("sm_90", "float16", marks=pytest.mark.long),
    ],
)
def test_one_feature_one_column_and_two_rows_compile(chip, dtype, cache):
    """Sizes and strides that are 1 reach a kernel as constants."""
    rows = worker(chip, dtype, "ones", folder=cache)
    products = {"bits_product_kernel"} if chip == "sm_80" else set()
    assert {row["kernel"] for row in rows} >= {"encode_kernel", "gradient_kernel"} | products


# each chip by one version, and the one that the tiles were made for with what was once spilled
LONG = [
    ("sm_80", "newest", "few"), ("sm_86", OLDEST, "few"), ("sm_90", "newest", "hard"),
    ("sm_100", "newest", "few"), ("sm_120", OLDEST, "few"),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("chip", "version", "amount"), LONG)
def test_every_kernel_compiles_for_every_chip(chip, version, amount, cache):
    oldest = version == OLDEST
    check(chip, "bfloat16", worker(chip, "bfloat16", amount, folder=cache, oldest=oldest), oldest)


@pytest.mark.matrix
@VERSIONS
@pytest.mark.parametrize(("chip", "dtype"), EVERY)
def test_every_variant_of_every_chip(chip, dtype, oldest, cache):
    check(chip, dtype, worker(chip, dtype, "all", folder=cache, oldest=oldest), oldest)


@pytest.mark.matrix
@VERSIONS
def test_no_tile_that_tuning_may_take_is_rewritten_in_flight(oldest, cache):
    """Tuning would keep one that is fast and now and then wrong."""
    rows = worker("sm_90", "bfloat16", "candidates", folder=cache, oldest=oldest)
    assert {row["kernel"] for row in rows} == (HALF - {"bits_product_kernel"}) | INTEGER
    assert len(rows) >= 40
    assert [row for row in rows if row["rewritten"]] == []


@pytest.mark.long
def test_warmup_starts_every_kernel_that_a_step_starts(cache):
    """For d and K in multiples of 16: a CUDA graph may then be captured."""
    assert worker("sm_90", "uncovered", folder=cache) == []


@pytest.mark.long
def test_operands_of_packed_products_are_rewritten_in_flight_on_sm_90(cache):
    """Why decode unpacks there: the check finds what Triton 3.6 makes of the packed product."""
    rows = worker("sm_90", "bfloat16", "packed", folder=cache, oldest=True)
    assert rows
    for row in rows:
        assert row["kernel"] == "bits_product_kernel"
        assert row["in_registers"] > 0
        assert len(row["rewritten"]) > 10


# one warpgroup: a product whose left operand is in R8 to R11
PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0"
NEXT = PRODUCT.replace("R8,", "R12,")
ONE_LEFT, NONE_LEFT = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (1, 0))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ([PRODUCT, NONE_LEFT, "MOV R8, R3"], 0),
        ([PRODUCT, "MOV R8, R3", NONE_LEFT], 1),
        # one group may still be in flight: the first is not
        ([PRODUCT, NEXT, ONE_LEFT, "MOV R8, R3"], 0),
        ([PRODUCT, NEXT, ONE_LEFT, "MOV R13, R3"], 1),
        # four registers at once, the last of which is read
        ([PRODUCT, "LDS.128 R4, [R2]", "LDS.128 R11, [R2]"], 1),
        ([PRODUCT, "LDSM.16.M88.2 R10, [R2]", "IMAD.WIDE R7, R2, R3, R4"], 3),
        # what only reads, and a predicate before the register that is written
        ([PRODUCT, "STS.128 [R2], R8", "ISETP.GE.AND P0, PT, R8, R3, PT", "R2UR UR4, R8"], 0),
        ([PRODUCT, "SHFL.BFLY PT, R9, R3, 0x1, 0x1f"], 1),
        # in memory: no register is read
        ([PRODUCT.replace("R8", "gdesc[UR4]"), "MOV R8, R3"], 0),
        # over the back of a loop, and only there
        ([".L_x_1:", "MOV R8, R3", PRODUCT, ONE_LEFT, "@P0 BRA `(.L_x_1)",
          NONE_LEFT], 1),
        ([".L_x_1:", "MOV R8, R3", PRODUCT, NONE_LEFT, "@P0 BRA `(.L_x_1)"], 0),
        # behind a jump that is always taken nothing runs
        ([PRODUCT, "BRA `(.L_x_2)", "MOV R8, R3", ".L_x_2:", "EXIT"], 0),
    ],
)  # fmt: skip
def test_what_writes_an_operand_in_flight_is_found(code, found):
    lines = (c if c.endswith(":") else f"  /*{i:04x}*/  {c} ;" for i, c in enumerate(code))
    writes = machine_code.rewritten_operands("\n".join(lines))
    registers = {(text.split(":")[0], text.split()[-1]) for text in writes}
    assert len(registers) == found, writes


def test_notes_of_the_assembler_are_found():
    log = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources\nptxas info    : Used 168 registers\n"
        "ptxas info    : (C7508) Ignored\nptxas info    : (C7520) Potential Performance Loss"
    )
    notes = machine_code.serialized(log)
    assert [note[:7] for note in notes] == ["(C7510)", "(C7520)"]


def test_the_checks_can_fail():
    """One row that spills, or lost its instruction, is refused."""
    good = {
        "kernel": "encode_kernel", "constants": {}, "stack": 0, "local": 0, "spills": 0,
        "ptx_local": 0, "shared": 1, "registers": 9, "float_atomics": 0, "wgmma": 1, "mma": 0,
        "tcgen05": 0, "cp_async": 1, "imma": 1, "byte_stores": 0, "rewritten": [],
        "serialized": [], "wide_global_stores": 1, "barriers": 3, "instructions": 9,
    }  # fmt: skip
    names = ("encode_kernel", "gradient_kernel", *INTEGER)
    rows = [{**good, "kernel": name} for name in names]
    passes = ("transpose_kernel", *LISTS, *COUNTS, "unpack_kernel")
    rows += [{**good, "kernel": name, "wgmma": 0} for name in passes]
    check("sm_90", "bfloat16", rows)
    for change in (
        {"spills": 1}, {"wgmma": 0}, {"tcgen05": 1}, {"shared": 10**6}, {"float_atomics": 1},
        {"rewritten": ["MOV R8"]}, {"serialized": ["(C7510)"]}, {"instructions": 10_800},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check("sm_90", "bfloat16", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises(AssertionError):
        check("sm_90", "bfloat16", [*rows[:-1], {**rows[-1], "wide_global_stores": 0}])
