"""A headless Chromium driven over a pipe, a few lines of the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """Where a Chromium is, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


# every text of the page with its colour and what lies behind it, as the eye sees them: WCAG's ratio
CONTRAST = """(() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g).map(Number), wide = text.startsWith("color(");
    return [...found.slice(0, 3).map(v => wide ? v : v / 255), found[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map(k => top[k] * top[3] + under[k] * (1 - top[3]));
  const behind = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement)
      layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [1, 1, 1]);
  };
  const light = rgb => rgb.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ratio = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility({visibilityProperty: true}) || node.disabled) continue;
    const own = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
    const field = ["INPUT", "SELECT", "TEXTAREA"].includes(node.tagName);
    if (!own && !field) continue;
    const style = getComputedStyle(node), ground = behind(node);
    const fill = parse(node instanceof SVGElement ? style.fill : style.color);
    found.push([ratio(over(fill, ground), ground), node.tagName + "#" + node.id + "." +
      node.getAttribute("class"), "text"]);
    if (field && node.type !== "checkbox") found.push([1.5 * ratio(
      over(parse(style.borderTopColor), behind(node.parentElement)), behind(node.parentElement)),
      node.tagName + "#" + node.id, "edge"]);  // the bound of an edge is 3, of text 4.5
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""


class Browser:
    """One page; ``errors`` collects what its console and its exceptions say.

    ``site`` is the address that pages may ask, beside files.
    """

    site: str | None = None

    def __init__(self, folder: Path) -> None:
        command = [
            find() or "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        take, self._write = os.pipe()
        self._read, give = os.pipe()

        def places() -> None:  # the protocol is read from 3 and written to 4
            high = [os.dup(take), os.dup(give)]
            spare = [os.dup(fd) for fd in high]  # beyond 3 and 4 whatever came first
            spare = [fd if fd > 4 else os.dup(fd) for fd in spare]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self._process = subprocess.Popen(
            command, preexec_fn=places, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(take)
        os.close(give)
        self._number, self._buffer, self._session = 0, b"", None
        self.errors: list[str] = []
        target = next(
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._write)
        os.close(self._read)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 2**20)
            if not data:
                raise RuntimeError("the browser has gone")
            self._buffer += data
        first, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(first)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            found = self._message()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self._event(found)

    def _event(self, event: dict[str, Any]) -> None:
        name, given = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(given["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.errors.append(json.dumps(given["args"]))
        elif name == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            url = given["request"]["url"]
            if not url.startswith(("file://", "about:", *filter(None, [self.site]))):
                self.errors.append(f"request of {url[:80]}")
        elif name == "Page.javascriptDialogOpening":
            self.errors.append("a dialog opened")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30, meanwhile=lambda: None) -> None:
        """Until an expression holds; ``meanwhile`` is called as long as it does not."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} did not come true; errors: {self.errors}")
            meanwhile()
            time.sleep(0.02)

    def open(self, page: Path | str, state: str = "") -> None:
        """Load a file or an address afresh, with a state in it, and wait until all is read."""
        self.call("Page.navigate", url="about:blank")
        address = page if isinstance(page, str) else page.as_uri()
        self.call("Page.navigate", url=address + state)
        self.wait("document.documentElement?.dataset.ready !== undefined")

    def press(self, key: str) -> None:
        """Press and let go."""
        codes = {
            "Escape": 27, "Enter": 13, "Tab": 9, "End": 35, "Home": 36,
            "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
        }  # fmt: skip
        more = {"windowsVirtualKeyCode": codes[key]} if key in codes else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def press_until(self, key: str, condition: str, seconds: float = 60) -> None:
        """Press a key that does no more twice than once, until an expression holds.

        A page whose layout is not done yet, as on a busy machine, scrolls by no key.
        """
        self.wait(condition, seconds, lambda: self.press(key))

    def point(self, left: float, top: float, press: bool = False) -> None:
        """Move the pointer to a point of the window, and press there."""
        at = {"x": left, "y": top}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") * press:
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def nameless(self) -> list[str]:
        """What can be operated and has no name for who cannot see it."""
        self.call("Accessibility.enable")
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        roles = {
            "button", "textbox", "searchbox", "combobox", "listbox", "option", "checkbox",
            "spinbutton", "link", "application", "toolbar", "table", "img", "DisclosureTriangle",
        }  # fmt: skip
        return [
            f"{node['role']['value']} {node.get('backendDOMNodeId')}"
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
            if not node.get("name", {}).get("value", "").strip()
        ]

    def walk(self, n: int) -> list[tuple[str, bool]]:
        """Where n presses of Tab lead: id (or class) of each, and whether its focus is seen."""
        script = """(() => { const a = document.activeElement, s = getComputedStyle(a);
            return [a.id || a.className || a.tagName,
            a === document.body || s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0];
            })()"""
        found = []
        for _ in range(n):
            self.press("Tab")
            where, seen = self.run(script)
            found.append((where, seen))
        return found

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Viewport and colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
