"""The map of the page of features: one point a feature, drawn on a canvas.

Part of the script of :mod:`bae_fast.report.browser_page`, whose names it uses.
"""

from __future__ import annotations

MAP_STYLE = """
:root { --low: #b9cdf3; --high: #10295e; --low-text: #1d2330; }
@media (prefers-color-scheme: dark) { :root { --low: #29406b; --high: #d6e4ff; } }
#plane { display: block; width: 100%; height: min(28rem, 60vh); background: var(--surface);
  border: 1px solid var(--edge); border-radius: 0.4rem; cursor: crosshair; touch-action: none; }
#under { min-height: 1.5em; margin: 0.4rem 0 0; }
#mapnote { margin: 0.2rem 0 0; max-width: 62rem; }
#legend { display: inline-flex; gap: 0.5em; align-items: center; color: var(--muted);
  font-variant-numeric: tabular-nums; }
#legend i { width: 8rem; height: 0.7rem; border: 1px solid var(--edge);
  background: linear-gradient(to right, var(--low), var(--high)); }
"""

MAP_SCRIPT = r"""
// -- map --------------------------------------------------------------------------------------

let startMap = () => {};
(() => {
const plane = $("plane"), under = $("under");
// the square of the map that is seen: its middle and the length of its side
const seen = {x: 0.5, y: 0.5, side: 1.08};
let points = [], hue = "density", hovered = null, drawing = false;

startMap = () => {
  if (!head.places) return;
  const known = head.places.filter(p => p !== null);
  const low = [0, 1].map(k => known.reduce((a, p) => Math.min(a, p[k]), Infinity));
  const high = [0, 1].map(k => known.reduce((a, p) => Math.max(a, p[k]), -Infinity));
  points = head.places.map(p => p === null ? null
    : [0, 1].map(k => high[k] > low[k] ? (p[k] - low[k]) / (high[k] - low[k]) : 0.5));
  $("map").hidden = false;
  $("maplabel").textContent = head.labels.map;
  for (const name of Object.keys(columns())) if (name !== "feature")
    $("hue").append(make("option", {value: name}, name.replace(/^score /, "")));
  $("hue").addEventListener("change", () => { hue = $("hue").value; soon(); });
  $("map").addEventListener("toggle", soon);
  addEventListener("resize", soon);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
  plane.addEventListener("pointermove", event => {
    const found = nearest(event);
    if (found !== hovered) { hovered = found; tell(); soon(); }
  });
  plane.addEventListener("pointerleave", () => { hovered = null; tell(); soon(); });
  plane.addEventListener("click", event => {
    const found = nearest(event);
    if (found !== null) open(head.feature[found], false);
  });
  plane.addEventListener("wheel", event => {
    event.preventDefault();
    const box = plane.getBoundingClientRect();
    zoom(Math.exp(event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
  }, {passive: false});
  plane.addEventListener("keydown", key);
  watchers.push(() => { tell(); soon(); });
};

function soon() {
  if (drawing || !$("map").open) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; paint(); });
}

const size = () => [plane.clientWidth, plane.clientHeight];
const scale = () => Math.min(...size()) / seen.side;

function onScreen(i) {
  const [wide, tall] = size(), s = scale();
  return [wide / 2 + (points[i][0] - seen.x) * s, tall / 2 - (points[i][1] - seen.y) * s];
}

function zoom(by, left, top) {  // the place under a point of the screen stays there
  const [wide, tall] = size(), before = scale();
  const x = seen.x + (left - wide / 2) / before, y = seen.y - (top - tall / 2) / before;
  seen.side = Math.min(Math.max(seen.side * by, 0.002), 1.5);
  seen.x = x - (left - wide / 2) / scale();
  seen.y = y + (top - tall / 2) / scale();
  soon();
}

// a value's place between the lowest and the highest; shares of rows by their logarithm
function shades() {
  const raw = columns()[hue], log = hue === "density";
  const values = raw.map(v => v === null || (log && v <= 0) ? null : log ? Math.log(v) : v);
  const known = values.filter(v => v !== null);
  const low = known.reduce((a, v) => Math.min(a, v), Infinity);
  const high = known.reduce((a, v) => Math.max(a, v), -Infinity);
  const said = v => log ? percent(Math.exp(v)) : three(v);
  $("legend").replaceChildren(...known.length ? [said(low), make("i", {}), said(high)] : []);
  return values.map(v => v === null ? null : high > low ? (v - low) / (high - low) : 1);
}

function numbers(name) {  // "#rrggbb" of a custom property
  const text = getComputedStyle(root).getPropertyValue(name).trim();
  return [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16));
}

function paint() {
  const [wide, tall] = size(), dense = devicePixelRatio || 1;
  plane.width = wide * dense;
  plane.height = tall * dense;
  const pen = plane.getContext("2d"), style = getComputedStyle(root);
  pen.scale(dense, dense);
  const low = numbers("--low"), high = numbers("--high"), values = shades();
  const listed = new Uint8Array(points.length);
  for (const i of order) listed[i] = 1;
  const radius = Math.min(Math.max(60 / Math.sqrt(points.length) / seen.side, 1.6), 7);
  let drawn = 0;
  for (const turn of [0, 1])  // those of the list lie above the others
    for (let i = 0; i < points.length; i++) {
      if (points[i] === null || listed[i] !== turn) continue;
      const [x, y] = onScreen(i);
      if (x < -9 || y < -9 || x > wide + 9 || y > tall + 9) continue;
      const t = values[i];
      pen.fillStyle = t === null ? style.getPropertyValue("--muted")
        : `rgb(${low.map((a, k) => Math.round(a + t * (high[k] - a))).join()})`;
      pen.globalAlpha = turn ? 1 : 0.15;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.fill();
      drawn += 1;
    }
  pen.globalAlpha = 1;
  pen.strokeStyle = style.getPropertyValue("--accent");
  for (const [i, width] of [[place.get(state.feature), 3], [hovered, 1.5]]) {
    if (i === undefined || i === null || points[i] === null) continue;
    pen.lineWidth = width;
    pen.beginPath();
    pen.arc(...onScreen(i), radius + 4, 0, 7);
    pen.stroke();
  }
  root.dataset.points = drawn;
}

function nearest(event) {
  const box = plane.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let found = null, best = 14 ** 2;  // pixels
  for (let i = 0; i < points.length; i++) {
    if (points[i] === null) continue;
    const [a, b] = onScreen(i), far = (a - x) ** 2 + (b - y) ** 2;
    if (far < best) { best = far; found = i; }
  }
  return found;
}

function tell() {  // the feature under the pointer, else the chosen one
  const i = hovered === null ? place.get(state.feature) : hovered;
  const text = i === undefined ? "" :
    `#${head.feature[i]} ${called(i)} \u00b7 ${percent(head.density[i])} of the rows`;
  if (under.textContent !== text) under.textContent = text;
}

const SIDES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [wide, tall] = size(), i = place.get(state.feature);
  const middle = i === undefined || points[i] === null ? [wide / 2, tall / 2] : onScreen(i);
  if (event.key in SIDES) aside(...SIDES[event.key]);
  else if (event.key === "+" || event.key === "=") zoom(0.7, ...middle);
  else if (event.key === "-") zoom(1 / 0.7, ...middle);
  else if (event.key === "0") { Object.assign(seen, {x: 0.5, y: 0.5, side: 1.08}); soon(); }
  else if (event.key === "Enter" && i !== undefined) open(state.feature, true, true);
  else return;
  event.preventDefault();
}

function aside(right, up) {  // to the nearest feature in the quarter on one side
  const from = points[place.get(state.feature)] || [seen.x, seen.y];
  let found = null, best = Infinity;
  for (let i = 0; i < points.length; i++) {
    if (points[i] === null) continue;
    const dx = points[i][0] - from[0], dy = points[i][1] - from[1];
    const along = dx * right + dy * up, across = Math.abs(dx * up) + Math.abs(dy * right);
    if (along <= 0 || across > along) continue;
    const far = along + 2 * across;
    if (far < best) { best = far; found = i; }
  }
  if (found === null) return;
  const [x, y] = onScreen(found), [wide, tall] = size();
  if (x < 0 || y < 0 || x > wide || y > tall)
    Object.assign(seen, {x: points[found][0], y: points[found][1]});
  open(head.feature[found], false);
}
})();
"""
