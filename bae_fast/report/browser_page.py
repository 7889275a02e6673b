"""Style and script of the feature browser; data and markup are in :mod:`bae_fast.report.browser`.

The script builds elements and text nodes only: no text of the data is ever read as markup. It is
one function; the map and the live prompt (:mod:`bae_fast.report.browser_map`,
:mod:`bae_fast.report.browser_live`) stand inside it, between its two parts here.
"""

from __future__ import annotations

from bae_fast.report.page import STYLE as _SHARED

STYLE = (
    _SHARED
    + """
:root { --accent: #2459b8; --bar: #7aa2e8; --edge: #7d8798; --row: 3.5rem; }
@media (prefers-color-scheme: dark) {
  :root { --accent: #7db0ff; --bar: #4f79bd; --edge: #76819a; }
}
html, body { height: 100%; }
body { display: flex; flex-direction: column; max-width: none; padding: 0; overflow: hidden; }
header { padding: 0.7rem 1rem 0.6rem; background: var(--surface);
  border-bottom: 1px solid var(--line); }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.9rem; }
h1 { font-size: 1.15rem; margin: 0; }
.subtitle { margin: 0; font-size: 0.875rem; }
#controls { display: flex; flex-wrap: wrap; gap: 0.4rem; margin-top: 0.5rem; align-items: center; }
input, select, button, textarea {
  font: inherit; font-size: 0.875rem; padding: 0.3rem 0.6rem; color: inherit;
  background: var(--page); border: 1px solid var(--edge); border-radius: 0.4rem;
}
summary { cursor: pointer; }
#map, #help { margin-bottom: 1rem; }
.tools { display: flex; flex-wrap: wrap; gap: 0.4rem 1rem; align-items: center;
  font-size: 0.875rem; margin: 0.5rem 0; }
.model { margin: 0 0 0.3rem; color: var(--muted); font-size: 0.875rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 0 1.5rem; align-items: start; }
.pair .columns { grid-template-columns: 1fr; }
.pair > div { min-width: 0; }
#feature:has(.pair) { max-width: none; }
button { cursor: pointer; }
#query { flex: 1 1 14rem; min-width: 0; max-width: 30rem; }
#count { color: var(--muted); font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -1px; }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(17rem, 24rem) 1fr; }
#list { overflow-y: auto; position: relative; border-right: 1px solid var(--line);
  background: var(--surface); contain: strict; }
#spacer { width: 1px; }
.row { position: absolute; left: 0; right: 0; height: var(--row); padding: 0.4rem 0.9rem;
  border-bottom: 1px solid var(--line); cursor: pointer; overflow: hidden; }
.row:hover { background: var(--page); }
.row[aria-selected=true] { background: var(--chip); box-shadow: inset 3px 0 var(--accent); }
.row div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.numbers { display: flex; gap: 0.7em; font-size: 0.8125rem; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.numbers b { color: var(--text); font-weight: 600; }
.numbers span:last-child { margin-left: auto; }
.label { font-size: 0.875rem; }
.label code { margin-right: 0.6em; font-size: 0.8125rem; }
#detail { overflow-y: auto; padding: 1rem; }
#relation a { color: inherit; }
#feature, #help { max-width: 62rem; }
#feature h2 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
#feature h2 small { font-weight: 400; font-size: 1rem; color: var(--muted); margin-right: 0.5em; }
#feature h3 { margin: 0 0 0.6rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; margin: 0.4rem 0 1rem; }
.facts div { font-size: 0.875rem; color: var(--muted); }
.facts b { color: var(--text); font-variant-numeric: tabular-nums; margin-left: 0.1em; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr));
  gap: 0 1rem; align-items: start; }
.tokens { margin: 0; }
.tokens a { color: inherit; text-decoration: none; }
.tokens li:has(a):hover { box-shadow: inset 0 0 0 1px var(--accent); }
.tokens a b { color: var(--accent); font-weight: 600; }
.contexts li { border-top: 1px solid var(--line); padding: 0.4rem 0; color: var(--text); }
.contexts li:first-child { border-top: 0; padding-top: 0; }
.contexts small { float: right; color: var(--muted); margin-left: 0.8em; }
mark.also { background: none; color: inherit; font-weight: 400; padding: 0;
  box-shadow: inset 0 -2px var(--mark); border-radius: 0; }
svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--bar); }
svg rect.on { fill: var(--accent); }
svg line { stroke: var(--muted); }
svg text { fill: var(--muted); font-size: 11px; }
kbd { padding: 0 0.35em; border: 1px solid var(--line); border-radius: 0.3em; font-size: 0.85em;
  background: var(--chip); color: var(--text); }
#help { color: var(--muted); font-size: 0.875rem; }
#back { display: none; margin-bottom: 0.6rem; }
#message { padding: 1rem; color: var(--muted); }
@media (max-width: 46rem) {
  main { grid-template-columns: 1fr; }
  #list { border: 0; }
  #detail { display: none; padding: 0.7rem; }
  body.open #list { display: none; }
  body.open #detail { display: block; }
  body.open #controls { display: none; }
  #back { display: inline-block; }
  #query { flex-basis: 100%; max-width: none; }
}
"""
)

SCRIPT_START = r"""
"use strict";
(() => {
const $ = id => document.getElementById(id);
const list = $("list"), spacer = $("spacer"), root = document.documentElement;
const state = {q: "", scope: "all", sort: "feature", up: true, feature: null};
let head = null, place = new Map(), order = [], at = -1;
const watchers = [];  // called when the chosen feature or the list has changed
let details = [], texts = [], ready = false, height = 56, asked = 0, given = false;

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);  // strings become text nodes
  return node;
}

async function unpacked(id) {
  const block = $(id), raw = atob(block.textContent);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const value = JSON.parse(await new Response(stream).text());
  block.remove();
  return value;
}

function part(number) {  // a promise of one part's records, read once
  return details[number] ??= unpacked("part" + number);
}

const three = value => value === null || value === undefined ? "\u2013" :
  Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const percent = share => three(100 * share) + " %";
const whole = value => value.toLocaleString("en");
// spaces at the ends of a token are drawn, those inside are not
const token = text => text.replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));

// -- order and search -------------------------------------------------------------------------

function columns() {
  const found = {feature: head.feature, density: head.density};
  if (head.burstiness.some(value => value !== null)) found.burstiness = head.burstiness;
  return Object.assign(found, Object.fromEntries(
    Object.entries(head.scores).map(([name, values]) => ["score " + name, values])));
}

function sorted(places) {
  const values = columns()[state.sort] || head.feature, sign = state.up ? 1 : -1;
  return places.sort((a, b) => {
    const x = values[a], y = values[b];
    if (x === y) return head.feature[a] - head.feature[b];
    if (x === null) return 1;  // none: last in either direction
    if (y === null) return -1;
    return x < y ? -sign : sign;
  });
}

function remember(from, records) {  // what a search looks at, lower case
  records.forEach(([tokens, lens, , , contexts], i) => {
    let words = "";
    for (let j = 0; j < tokens.length; j += 4) words += head.strings[tokens[j]] + "\n";
    for (let j = 0; j < lens.length; j += 2) words += head.strings[lens[j]] + "\n";
    let lines = "";
    for (const context of contexts) {
      for (const piece of context[4]) lines += head.strings[piece];
      lines += "\n";
    }
    texts[from + i] = [words.toLowerCase(), lines.toLowerCase()];
  });
}

function matches(query) {
  const number = /^#?(\d+)$/.exec(query.trim());
  const exact = number ? place.get(Number(number[1])) : undefined;
  if (query.trim().startsWith("#") && number) return exact === undefined ? [] : [exact];
  const text = query.toLowerCase(), scope = state.scope, found = [];
  for (let i = 0; i < head.feature.length; i++) {
    if (i !== exact &&
        ((scope === "all" || scope === "phrase") && head.phrase[i].toLowerCase().includes(text) ||
         (scope === "all" || scope === "tokens") && texts[i] && texts[i][0].includes(text) ||
         (scope === "all" || scope === "contexts") && texts[i] && texts[i][1].includes(text)))
      found.push(i);
  }
  sorted(found);
  return exact === undefined ? found : [exact, ...found];
}

function refresh(follow) {  // to the feature that the address names, else to the top
  const start = performance.now();
  order = state.q.trim() ? matches(state.q) : sorted([...head.feature.keys()]);
  at = order.indexOf(place.get(state.feature));
  spacer.style.height = order.length * height + "px";
  if (at < 0 || !follow) list.scrollTop = 0; else reveal();
  draw();
  const n = head.feature.length;
  const rest = ready || !state.q.trim() ? "" : " (still reading)";
  $("count").textContent = (order.length === n ? "" : whole(order.length) + " of ") +
    whole(n) + " features" + rest;
  root.dataset.refresh = performance.now() - start;
  root.dataset.shown = order.length;
  for (const watcher of watchers) watcher();
}

// -- list -------------------------------------------------------------------------------------

function row(index) {
  const i = order[index], number = head.feature[i];
  const numbers = make("div", {class: "numbers"}, make("b", {}, "#" + number),
    make("span", {}, percent(head.density[i])));
  const values = columns()[state.sort];
  if (state.sort !== "feature" && state.sort !== "density")
    numbers.append(make("span", {}, state.sort.replace(/^score /, "") + " " + three(values[i])));
  const label = make("div", {class: "label"});
  if (head.phrase[i]) label.append(head.phrase[i]);
  else for (const piece of head.label[i])
    label.append(make("code", {}, token(head.strings[piece])));
  const node = make("div", {class: "row", role: "option", id: "row" + number,
    "aria-selected": String(number === state.feature), "aria-posinset": index + 1,
    "aria-setsize": order.length}, numbers, label);
  node.style.top = index * height + "px";
  node.addEventListener("click", () => open(number, true));
  return node;
}

function draw() {
  const first = Math.max(Math.floor(list.scrollTop / height) - 6, 0);
  const last = Math.min(Math.ceil((list.scrollTop + list.clientHeight) / height) + 6, order.length);
  const rows = [];
  for (let i = first; i < last; i++) rows.push(row(i));
  if (!order.length) rows.push(make("div", {id: "message"}, ready ? "Nothing found." : "Reading…"));
  list.replaceChildren(spacer, ...rows);
  if (state.feature !== null) list.setAttribute("aria-activedescendant", "row" + state.feature);
}

function reveal() {
  const top = at * height;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + height > list.scrollTop + list.clientHeight)
    list.scrollTop = top + height - list.clientHeight;
}

function step(by) {
  if (!order.length) return;
  const to = at < 0 ? (by < 0 ? order.length - 1 : 0)
    : Math.min(Math.max(at + by, 0), order.length - 1);
  open(head.feature[order[to]], false);
}

// -- one feature ------------------------------------------------------------------------------

function section(title, note, ...children) {
  const heading = make("h3", {}, title);
  if (note) heading.append(make("span", {}, note));
  return make("section", {}, heading, ...children);
}

function drawing(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function histogram(low, high, counts) {
  const width = 400, tall = 110, base = tall - 18, top = Math.log1p(Math.max(...counts, 1));
  const total = counts.reduce((a, b) => a + b, 0);
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${tall}`, role: "img",
    "aria-label": `${whole(total)} values from ${three(low)} to ${three(high)}`});
  const x = value => (value - low) / (high - low) * width;
  counts.forEach((count, i) => {
    const size = Math.log1p(count) / top * (base - 4), left = i * width / counts.length;
    const middle = low + (i + 0.5) * (high - low) / counts.length;
    const bar = drawing("rect", {x: left + 0.5, y: base - size, height: size,
      width: Math.max(width / counts.length - 1, 0.5), class: middle > 0 ? "on" : "off"});
    const title = drawing("title", {});
    title.textContent = `${three(middle)}: ${whole(count)}`;
    bar.append(title);
    svg.append(bar);
  });
  svg.append(drawing("line", {x1: 0, x2: width, y1: base, y2: base}));
  const ticks = [[low, "start"], [high, "end"]];
  if (x(0) > 30 && x(0) < width - 30) ticks.push([0, "middle"]);
  for (const [value, anchor] of ticks) {
    const text = drawing("text", {x: x(value), y: tall - 4, "text-anchor": anchor});
    text.textContent = three(value);
    svg.append(text);
  }
  return svg;
}

function context([mark, row, score, on, pieces]) {
  const node = make("li", {});
  const notes = [];
  if (score !== null) notes.push(three(score));
  if (notes.length) node.append(make("small", row === null ? {} : {title: "row " + whole(row)},
    ...notes));
  pieces.forEach((piece, i) => {
    const text = head.strings[piece];
    if (i === mark) node.append(make("mark", {}, token(text)));
    else if (on.includes(i)) node.append(make("mark", {class: "also"}, text));
    else node.append(i === 0 ? text.replace(/^ +/, "") : text);
  });
  return node;
}

function called(i) {  // what a feature is called: its name, else its tokens
  return head.phrase[i] || head.label[i].map(s => token(head.strings[s])).join(" ");
}

function neighbour(number, score, linked) {
  const i = linked ? place.get(number) : undefined;
  if (i === undefined) return make("li", {}, "#" + number, " ", make("small", {}, three(score)));
  return make("li", {}, make("a", {href: address({feature: number})}, make("b", {}, "#" + number),
    " ", called(i)), " ", make("small", {}, three(score)));
}

function chips(items) { return make("ul", {class: "tokens"}, ...items); }

function sections([tokens, lens, near, bins, contexts], linked) {
  const first = [], few = [], items = {tokens: [], lens: [], near: []};
  if (contexts.length) first.push(
    section("Contexts", "", make("ul", {class: "contexts"}, ...contexts.map(context))));
  for (let j = 0; j < tokens.length; j += 4)
    items.tokens.push(make("li", {}, make("code", {}, token(head.strings[tokens[j]])), " \u00d7",
      three(tokens[j + 1]), " ",
      make("small", {}, `${whole(tokens[j + 2])}/${whole(tokens[j + 3])}`)));
  for (let j = 0; j < lens.length; j += 2)
    items.lens.push(make("li", {}, make("code", {}, token(head.strings[lens[j]])), " ",
      make("small", {}, three(lens[j + 1]))));
  for (let j = 0; j < near.length; j += 2)
    items.near.push(neighbour(near[j], near[j + 1], linked));
  if (tokens.length) few.push(section("Tokens", "lift, on/all", chips(items.tokens)));
  if (lens.length) few.push(section("Logit lens", head.labels.lens, chips(items.lens)));
  if (near.length) few.push(section("Neighbours", head.labels.neighbours, chips(items.near)));
  if (bins.length) few.push(section("Histogram", head.labels.histogram + ", log scale",
    histogram(bins[0], bins[1], bins.slice(2))));
  return [...first, make("div", {class: "columns"}, ...few)];
}

function heading(model, number, phrase, values) {
  const facts = make("div", {class: "facts"});
  for (const [name, value] of values)
    facts.append(make("div", {}, name, " ", make("b", {}, value)));
  const title = make("h2", {}, make("small", {}, "#" + number), phrase);
  return model ? [make("p", {class: "model"}, model), title, facts] : [title, facts];
}

function both(density, burstiness) {
  const found = [["density", percent(density)]];
  if (burstiness !== null) found.push(["burstiness", three(burstiness)]);
  return found;
}

const KINDS = {same: "the same", subset: "within a feature of the other",
  superset: "contains a feature of the other", unmatched: "no match",
  rare: "too rare to be judged", dead: "never on"};

function pair(number, names, children, other) {  // two models side by side
  const relation = make("div", {class: "facts", id: "relation"}), beside = [];
  if (other === null) beside.push(make("p", {class: "model"}, names[1]),
    make("p", {class: "note"}, "No feature of this model is on where this one is."));
  else {
    const [partner, density, burstiness, phrase, found, [agreement, kind, back, cosine]] = other;
    const values = [["match", KINDS[kind] ?? kind], ["Jaccard index", three(agreement)]];
    if (cosine !== null) values.push(["cosine of the decoder directions", three(cosine)]);
    for (const [name, value] of values)
      relation.append(make("div", {}, name, " ", make("b", {}, value)));
    if (back !== number) relation.append(make("div", {}, `best partner of the other's #${partner} `,
      make("b", {}, make("a", {href: address({feature: back})}, "#" + back))));
    beside.push(...heading(names[1], partner, phrase, both(density, burstiness)),
      ...sections(found, false));
  }
  return [relation, make("div", {class: "pair"},
    make("div", {id: "own", role: "group", "aria-label": names[0]}, ...children),
    make("div", {id: "other", role: "group", "aria-label": names[1]}, ...beside))];
}

async function show() {
  const number = state.feature, i = place.get(number), target = $("feature");
  const turn = ++asked;
  if (i === undefined) {
    target.replaceChildren(make("p", {class: "note"},
      number === null ? "Choose a feature." : `No feature #${number} in this file.`));
    return;
  }
  const block = Math.floor(i / head.part);
  const own = (await part(block))[i - block * head.part], other = own[5];
  if (turn !== asked) return;  // another was asked for meanwhile
  const values = both(head.density[i], head.burstiness[i]);
  for (const [name, scores] of Object.entries(head.scores))
    if (scores[i] !== null) values.push([name, three(scores[i])]);
  const names = head.labels.models;
  const children = [...heading(names[0], number, head.phrase[i], values), ...sections(own, true)];
  if (!names[1]) target.replaceChildren(...children);
  else target.replaceChildren(...pair(number, names, children, other));
  const pane = $("detail");
  const gap = target.getBoundingClientRect().top - pane.getBoundingClientRect().top;
  if (gap < 0) pane.scrollTop += gap - 8;  // what is read begins at its heading
  root.dataset.feature = number;
}

// -- state, which the address holds -----------------------------------------------------------

function address(change) {
  const s = {...state, ...change}, found = new URLSearchParams();
  if (s.q) found.set("q", s.q);
  if (s.scope !== "all") found.set("in", s.scope);
  if (s.sort !== "feature" || !s.up) found.set("sort", s.sort);
  if (!s.up) found.set("down", "1");
  if (s.feature !== null && (given || "feature" in change)) found.set("f", s.feature);
  return "#" + found;
}

function keep() { history.replaceState(null, "", address({})); }

function open(number, enter, byKey) {
  state.feature = number;
  given = true;
  at = order.indexOf(place.get(number));
  if (at >= 0) reveal();
  keep();
  draw();
  show();
  for (const watcher of watchers) watcher();
  if (enter) {
    document.body.classList.add("open");
    if (byKey || getComputedStyle($("back")).display !== "none") $("detail").focus();
  }
}

function close() {
  document.body.classList.remove("open");
  draw();
  list.focus();
}

function read() {  // the address -> the page
  const values = new URLSearchParams(location.hash.slice(1));
  state.q = values.get("q") || "";
  const scope = values.get("in") || "all";
  state.scope = ["all", "phrase", "tokens", "contexts"].includes(scope) ? scope : "all";
  const sort = values.get("sort") || "feature";
  state.sort = Object.hasOwn(columns(), sort) ? sort : "feature";
  state.up = values.get("down") !== "1";
  const number = values.get("f");
  state.feature = number !== null && /^\d+$/.test(number) ? Number(number) : null;
  $("query").value = state.q;
  given = state.feature !== null;
  controls();
  refresh(true);
  document.body.classList.toggle("open", given);
  preview();
}

function preview() {  // where none was chosen, the first of the list
  if (!given) {
    state.feature = order.length ? head.feature[order[0]] : null;
    at = order.length ? 0 : -1;
    draw();
    for (const watcher of watchers) watcher();
  }
  show();
}

function controls() {
  $("scope").value = state.scope;
  $("sort").value = state.sort;
  $("direction").textContent = state.up ? "↑ rising" : "↓ falling";
  $("direction").setAttribute("aria-label", "Order: " + (state.up ? "rising" : "falling"));
}

function change(values) {
  Object.assign(state, values);
  controls();
  keep();
  refresh(false);
  if (!given) preview();
}

function turnTo(name) { change({sort: name, up: name === "feature"}); }

"""

SCRIPT_END = r"""
// -- start ------------------------------------------------------------------------------------

$("controls").addEventListener("submit", event => event.preventDefault());
$("query").addEventListener("input", () => change({q: $("query").value}));
$("scope").addEventListener("change", () => change({scope: $("scope").value}));
$("sort").addEventListener("change", () => turnTo($("sort").value));
$("direction").addEventListener("click", () => change({up: !state.up}));
$("back").addEventListener("click", close);
let drawn = false;
list.addEventListener("scroll", () => {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => { drawn = false; draw(); });
});
addEventListener("resize", () => head && draw());
addEventListener("hashchange", () => head && read());
addEventListener("keydown", event => {
  if (!head || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, key = event.key;
  if (target.tagName === "SELECT" || target.closest("#live, #plane")) return;  // keys of their own
  const typing = target === $("query");
  const scrolls = ["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End"].includes(key);
  if (scrolls && target.closest("#detail")) return;  // what is open is scrolled
  const page = Math.max(Math.floor(list.clientHeight / height) - 1, 1);
  const far = head.feature.length;
  const moves = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page};
  if (key === "Escape") {
    if (typing && state.q) { $("query").value = ""; change({q: ""}); }
    else if (typing) list.focus();
    else close();
  } else if (key in moves) step(moves[key]);
  else if (key === "Enter") {
    if (target.tagName === "BUTTON" || target.tagName === "A" || target.tagName === "SUMMARY")
      return;
    if (at < 0) step(1);
    if (state.feature !== null) open(state.feature, true, true);
  }
  else if (typing) return;
  else if (key === "Home") step(-far);
  else if (key === "End") step(far);
  else if (key === "j") step(1);
  else if (key === "k") step(-1);
  else if (key === "/") { document.body.classList.remove("open"); $("query").focus(); }
  else if (key === "r") change({up: !state.up});
  else if (key === "s") {
    const names = Object.keys(columns());
    turnTo(names[(names.indexOf(state.sort) + 1) % names.length]);
  }
  else return;
  event.preventDefault();
});

async function begin() {
  if (typeof DecompressionStream === "undefined")
    throw new Error("this browser is too old: DecompressionStream is missing");
  head = await unpacked("head");
  head.feature.forEach((number, i) => place.set(number, i));
  for (const name of Object.keys(columns()))
    $("sort").append(make("option", {value: name},
      "by " + (name === "feature" ? "number" : name.replace(/^score /, ""))));
  height = 3.5 * parseFloat(getComputedStyle(root).fontSize);
  startMap();
  startLive();
  read();
  await new Promise(requestAnimationFrame);
  root.dataset.first = performance.now();
  const parts = Math.ceil(head.feature.length / head.part);
  for (let number = 0; number < parts; number++) {
    remember(number * head.part, await part(number));
    if (number % 8 === 7) await new Promise(done => setTimeout(done));  // input comes first
  }
  ready = true;
  if (state.q.trim()) { refresh(true); if (!given) preview(); }
  root.dataset.ready = performance.now();
}
begin().catch(error => {
  spacer.after(make("div", {id: "message"}, "The data cannot be read: " + error.message));
  throw error;
});
})();
"""
