"""What a later command goes on with."""

from __future__ import annotations

from typing import Any

from bench.device.deadlines import cut_short, is_time_up


def resumed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured on the same device, to go on with.

    Cases that time cut short or left out are run again, and so are their sides.

    Raises:
        ValueError: another device, other versions or another schema.
    """

    def of(result: dict[str, Any]) -> dict[str, Any]:
        own = result["environment"]["device"]
        return {
            "schema": result.get("schema"),
            "torch": result["environment"].get("torch"),
            **{key: own.get(key) for key in ("name", "triton", "driver_version")},
        }

    old, new = of(before), of(now)
    if old != new:
        raise ValueError(f"device.json must be of {new}; got {old}")
    if before["impls"] != now["impls"]:
        raise ValueError(f"device.json must be of {now['impls']}; got {before['impls']}")
    rows = [row for row in before["rows"] if not cut_short(row)]
    ended = {
        case: {name: side for name, side in sides.items() if not is_time_up(side)}
        for case, sides in before["ended"].items()
    }
    again = {"rows": rows, "ended": ended, "skipped": [], "running": None, "complete": False}
    return {**before, **again}
