"""The live prompt of the page of features: a text, coloured by a feature, and what edits change.

Part of the script of :mod:`bae_fast.report.browser_page`, whose names it uses. It asks the server
that the page came from, see :mod:`bae_fast.report.live`.
"""

from __future__ import annotations

LIVE_MARKUP = """<section id=live hidden aria-labelledby=livetitle>
<h2 id=livetitle>Live prompt</h2>
<form id=ask>
<label for=text>Text that the language model reads</label>
<textarea id=text rows=3 spellcheck=false></textarea>
<div class=tools><button id=read type=submit>Read</button>
<label>Colour by <select id=shade><option value=value></option>
<option value=on>on or off</option><option value=kl>KL of the change</option></select></label>
</div></form>
<p id=said class=note role=status></p>
<div id=words role=toolbar aria-label="Tokens of the text"></div>
<fieldset id=settings><legend>Features set by hand</legend>
<div class=tools><button id=off type=button>Switch off</button>
<button id=on type=button>Set on</button>
<label><input id=there type=checkbox> at the chosen token only</label>
<button id=clear type=button>As it was</button></div>
<ul id=set class=tokens></ul></fieldset>
<div class=columns>
<section><h3 id=ontitle></h3><ul id=onhere class=tokens></ul></section>
<section><h3 id=nexttitle></h3><table id=next aria-labelledby=nexttitle></table></section>
</div></section>
"""

LIVE_STYLE = """
#live { max-width: 62rem; }
#ask label[for=text] { display: block; font-size: 0.875rem; margin-bottom: 0.3rem; }
textarea { width: 100%; resize: vertical; }
#words { display: flex; flex-wrap: wrap; gap: 0.15rem; margin: 0.6rem 0; }
#words button { padding: 0.1rem 0.25rem; border-color: transparent; border-radius: 0.25rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
#words button[aria-pressed=true] { border-color: var(--edge); box-shadow: 0 0 0 1px var(--edge); }
#words button.unread { color: var(--muted); font-style: italic; }
#settings { border: 1px solid var(--line); border-radius: 0.4rem; margin: 0 0 1rem; }
#settings legend { font-size: 0.875rem; }
#set input { width: 5.5rem; padding: 0 0.3rem; }
#set button { padding: 0 0.4rem; }
#live section { margin: 0; }
#next td, #next th { padding: 0.15rem 0.6rem 0.15rem 0; font-size: 0.875rem; }
#next td:not(:first-child), #next th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; }
#onhere a { color: inherit; text-decoration: none; }
"""

LIVE_SCRIPT = r"""
// -- live prompt ------------------------------------------------------------------------------

let startLive = () => {};
(() => {
const settings = new Map();  // value by feature
let answer = null, at = null, turn = 0, busy = false, again = false;

startLive = () => {
  if (!head.live) return;
  $("live").hidden = false;
  $("shade").options[0].textContent = head.live.value;
  $("text").value = head.live.text;
  $("text").maxLength = head.live.max_characters;
  $("ask").addEventListener("submit", event => { event.preventDefault(); at = null; send(); });
  $("text").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { at = null; send(); }
  });
  $("shade").addEventListener("change", () => answer && words());
  $("off").addEventListener("click", () => set(state.feature, 0));
  $("on").addEventListener("click", () => set(state.feature, head.live.usual[index()]));
  $("there").addEventListener("change", send);
  $("clear").addEventListener("click", () => { settings.clear(); listSettings(); send(); });
  $("words").addEventListener("keydown", move);
  watchers.push(() => { listSettings(); if (!answer || shown !== state.feature) send(); });
};

let shown = null;  // the feature that the answer tells of
const index = () => place.get(state.feature);

function set(feature, value) {
  if (feature === null || place.get(feature) === undefined) return;
  settings.set(feature, value);
  listSettings();
  send();
}

function listSettings() {
  const known = index() !== undefined;
  $("off").disabled = $("on").disabled = !known;
  $("off").textContent = known ? `Switch #${state.feature} off` : "Switch off";
  $("on").textContent = known ? `Set #${state.feature} on` : "Set on";
  $("set").replaceChildren(...[...settings].map(([feature, value]) => {
    const box = make("input", {type: "number", step: "any", value: String(value),
      "aria-label": `Value of feature ${feature}`});
    box.addEventListener("change", () => {
      if (Number.isFinite(box.valueAsNumber)) set(feature, box.valueAsNumber);
      else box.value = String(value);
    });
    const away = make("button", {type: "button", "aria-label": `Leave feature ${feature} as it is`},
      "\u00d7");
    away.addEventListener("click", () => { settings.delete(feature); listSettings(); send(); });
    return make("li", {}, make("b", {}, "#" + feature), " ", called(place.get(feature)), " = ",
      box, " ", away);
  }));
}

async function send() {  // one question at a time, of several that wait the last
  if (busy) { again = true; return; }
  busy = true;
  $("said").textContent = "Reading\u2026";
  do {
    again = false;
    turn += 1;
    const feature = index() === undefined ? null : state.feature;
    try {
      const reply = await fetch("/api/prompt", {method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify({text: $("text").value, feature, at,
          settings: [...settings], only_there: $("there").checked})});
      const found = await reply.json();
      if (!reply.ok) throw new Error(found.error);
      answer = found;
      at = found.at;
      shown = feature;
      draw();
    } catch (error) {
      $("said").textContent = error.message;
    }
  } while (again);
  busy = false;
  root.dataset.answers = turn;
}

function draw() {
  const kl = answer.kl, mean = kl.reduce((a, b) => a + b, 0) / kl.length;
  $("said").textContent = `${whole(answer.tokens.length)} tokens.` + (settings.size
    ? ` KL(as it is | changed): ${three(kl[at])} bits at the chosen token, ` +
      `${three(mean)} on average.` : "");
  words();
  const here = answer.tokens[at];
  $("ontitle").textContent = `On at ${token(here.text)}`;
  $("ontitle").append(make("span", {}, here.read
    ? `${whole(here.n_on)} features, ${head.live.value}` : "left out, as in a harvest"));
  $("onhere").replaceChildren(...here.on.map(([number, value]) => neighbour(number, value, true)));
  $("nexttitle").textContent = "Next token";
  $("nexttitle").append(make("span", {}, `after ${token(here.text)}`));
  const rows = new Map();
  for (const [text, id, before, after] of [...answer.next.before, ...answer.next.after])
    rows.set(id, make("tr", {}, make("td", {}, make("code", {}, token(text))),
      make("td", {}, percent(before)), make("td", {}, percent(after))));
  $("next").replaceChildren(make("thead", {}, make("tr", {},
    ...["token", "as it is", "changed"].map(name => make("th", {scope: "col"}, name)))),
    make("tbody", {}, ...rows.values()));
}

function words() {
  const by = $("shade").value, own = answer.feature;
  const values = by === "kl" ? answer.kl : own === null ? null : by === "on" ? own.on : own.values;
  const most = values === null ? 0 : values.reduce((a, v) => Math.max(a, Math.abs(v ?? 0)), 0);
  const held = $("words").contains(document.activeElement);
  $("words").replaceChildren(...answer.tokens.map((one, i) => {
    const value = values === null ? null : values[i];
    let note = one.read ? "" : ", left out";
    if (own !== null && one.read)
      note = `, #${shown} ${own.on[i] ? "on" : "off"}, ${head.live.value} ${three(own.values[i])}`;
    if (settings.size) note += `, KL ${three(answer.kl[i])} bits`;
    const node = make("button", {type: "button", "aria-pressed": String(i === at),
      tabindex: i === at ? "0" : "-1", "aria-label": token(one.text) + note,
      title: token(one.text) + note, class: one.read ? "word" : "word unread"}, token(one.text));
    if (value !== null && most > 0) {
      const share = Math.round(45 * Math.abs(value) / most);
      const colour = value > 0 ? "var(--accent)" : "var(--mark)";
      node.style.background = `color-mix(in srgb, ${colour} ${share}%, transparent)`;
    }
    node.addEventListener("click", () => choose(i));
    return node;
  }));
  if (held) $("words").children[at].focus();  // the buttons are new ones
}

function choose(i) {
  at = i;
  words();
  send();
}

function move(event) {
  const last = answer === null ? -1 : answer.tokens.length - 1;
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to >= 0 && to <= last) choose(to);
}
})();
"""
