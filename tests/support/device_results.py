"""Cases and results of ``python -m bench device`` in its tests, and what results must hold."""

from bench.device import cases, command

SMALL = cases.TINY._replace(checked=[(66, 24, 331)], more=[(32, 24, 256)])


def case(kind, **more):
    return {"kind": kind, **more, **dict(zip("ndf", SMALL.head, strict=True))}


STEP = case("step", objective="paper")
DECODE = case("operator", operator="decode", density=0.5)
LAYER = {"kind": "layer", "impl": "torch", "dtype": "bf16"}
CHECK = case("check", operator="decode", density=0.5)

NUMBER = (int, float)
# keys of device.json, those that must be there and those that may be, and their types
SCHEMA = {
    "schema": int, "environment": dict, "impls": dict, "seconds": NUMBER, "complete": bool,
    "running": (dict, type(None)), "rows": list, "skipped": list, "ended": dict,
}  # fmt: skip
MORE = {
    "ceilings": dict, "compiled_seconds": NUMBER, "spent": NUMBER, "clocks_after": dict,
    "error": str,
}  # fmt: skip
ROW = {"case": dict, "sides": dict, "wall_seconds": NUMBER}
MORE_OF_ROW = {"work": dict, "marked": list, "kernels": list, "unavailable": str}
# of a side: one of these says what became of it
SIDE = {"seconds": NUMBER, "checked": (int, str), "refused": str, "unavailable": str}
MORE_OF_SIDE = {
    "first_seconds": NUMBER, "least": NUMBER, "most": NUMBER, "rounds": int, "peak_bytes": int,
    "ratio": NUMBER, "failed": list, "host_seconds": NUMBER, "cold_seconds": NUMBER,
    "warm_seconds": NUMBER,
}  # fmt: skip


def check_schema(result):
    """Tables, later commands and readers of committed results go by these keys."""

    def check(found, needed, more):
        assert needed.keys() <= found.keys(), found
        for key, value in found.items():
            rate = key.endswith(("_per_second", "_share", "floor_seconds"))
            assert isinstance(value, NUMBER if rate else (needed | more)[key]), (key, value)

    check(result, SCHEMA, MORE)
    assert result["schema"] == command.SCHEMA
    for row in result["rows"]:
        check(row, ROW, MORE_OF_ROW)
        for side in row["sides"].values():
            check(side, {}, SIDE | MORE_OF_SIDE)
            assert {"first_seconds", "warm_seconds", *SIDE} & side.keys(), side


def sample():
    """Rows of every kind as an H200 might give them, in the keys that SCHEMA has."""

    def timed(seconds, **more):
        found = {"seconds": seconds, "least": seconds, "most": 2 * seconds, "rounds": 9}
        return {"first_seconds": 1.0, **found, **more}

    def row(case, sides, **more):
        return {"case": case, "sides": sides, "wall_seconds": 1.0, **more}

    floor = {"floor_seconds": 3e-3, "floor_share": 0.6, "ratio": 2.0, "peak_bytes": 3 * 2**20}
    step = {"autocast": timed(10e-3, ratio=1.0), "triton bf16": timed(5e-3, **floor)}
    step["cuda bf16"] = {"refused": "grad is off"}
    off = {"cuda bf16": {"refused": "recon is off"}, "triton bf16": {"first_seconds": 0.1}}
    off["triton bf16"]["checked"] = 1
    return {
        "schema": command.SCHEMA,
        "environment": {
            "torch": "2.11",
            "device": {"name": "H200", "triton": "3.6.0", "driver_version": "580"},
        },
        "impls": {"triton": "available", "cuda": "no nvrtc"},
        "seconds": 540.0,
        "complete": False,
        "running": None,
        "rows": [
            row(LAYER | {"impl": "triton"}, {"triton bf16": {"checked": 18}}),
            row(CHECK, off),
            row({"kind": "ceilings"}, {}),
            row(STEP, step, marked=["triton bf16"], work={"flops": 1.0}),
            row(
                case("profile", impl="triton"),
                {"triton": {"checked": 1}},
                kernels=[["a_kernel", 2, 750.0], ["copy", 1, 250.0]],
            ),
            row(case("graph", objective="paper"), {"triton bf16": timed(4e-3, **floor)}),
            row(DECODE, {"autocast": timed(2e-3, ratio=1.0), "triton bf16": timed(1e-3, **floor)}),
            row(
                case("pairs", density=0.5),
                {"int8": timed(3e-3, ratio=1.0), "triton": {"unavailable": "out of memory"}},
            ),
            row(case("pairs", density=0.1), {}, unavailable="out of memory"),
            row(
                {"kind": "warmup", "impl": "triton"},
                {"triton": {"cold_seconds": 90.0, "warm_seconds": 6.0}},
            ),
            row({"kind": "tests"}, {"pytest": {"refused": "2 failed", "failed": ["a", "b"]}}),
        ],
        "skipped": [{"case": STEP | {"objective": "rectangle"}, "reason": "1 s left"}],
        "ended": {},
        "ceilings": {
            "copy": 4.3e12, "gemm_float32": 5e13, "gemm_bfloat16": 7.9e14,
            "bit_macs": {"int8": 1e15, "b1": 4e15},
        },
        "spent": 500.0,
    }  # fmt: skip
