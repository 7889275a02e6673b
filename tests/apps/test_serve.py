"""``bae-fast serve``: the prompt against plain hooks, what the server refuses, the live page."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import threading

import browser as driver
import pytest
import torch
from tiny_lm import save_tiny_study

from bae_fast import SearchedAutoencoder
from bae_fast.baselines import load_autoencoder, make_baseline
from bae_fast.causal import Prompt
from bae_fast.cli import main
from bae_fast.experiments import serve
from bae_fast.experiments.features_page import read_names
from bae_fast.experiments.runs import ConfigError
from bae_fast.interpret.records import FeatureRecord
from bae_fast.lm import load_language_model
from bae_fast.report.browser import browser_page
from bae_fast.report.live import prompt_call
from bae_fast.report.server import PageServer

pytest.importorskip("transformers")

WORDS = ["Yes", "No", *(f"word{i}" for i in range(40))]
TEXT = "word3 word9 word3 word27 word11 word3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_study(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def prompt(folder):
    # not as the processor likes it: a model in bfloat16 rounds what is compared here
    lm = load_language_model(str(folder / "lm"), dtype="float32")
    return Prompt(lm, "model.layers.0", load_autoencoder(folder / "bae"), max_tokens=32)


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- the prompt --------------------------------------------------------------------------------


def plain(prompt, tokens, change=None):
    """Logits ``[n, V]`` and states at the hook, by torch's own hooks; ``change`` of the states."""
    seen = []

    def hook(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states[0].clone())
        if change is None:
            return None
        states = change(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = prompt.lm.model.model.layers[0].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = prompt.lm.model(input_ids=torch.tensor([tokens])).logits[0].double()
    finally:
        handle.remove()
    return logits, seen[0]


def test_features_of_a_prompt_are_those_of_its_states(prompt):
    tokens = prompt.tokenize(TEXT)
    found = prompt.features(tokens)
    assert found.tokens.tolist() == tokens
    assert found.read.tolist() == [False] + [True] * 5  # a harvest drops the first
    states = plain(prompt, tokens)[1][1:]
    model = prompt.model
    margin = (states - model.x_mean) / model.x_scale @ model.W_enc + model.b_enc
    assert torch.allclose(found.values, margin, atol=1e-5)
    assert found.code.to_dense().equal(margin > 0)
    assert 0 < int(found.code.counts().sum()) < found.code.to_dense().numel()


@pytest.mark.parametrize("only_there", [False, True])
def test_setting_features_changes_what_plain_hooks_change(prompt, only_there):
    tokens = prompt.tokenize(TEXT)
    model, settings = prompt.model, {4: 0.0, 17: 3.0, 30: 1.0}
    here = [4] if only_there else [1, 2, 3, 4, 5]

    def change(states):
        states = states.clone()
        bits = model.encode(states[0]).to_dense(torch.float32)
        for feature, value in settings.items():
            step = (value - bits[here, feature])[:, None] * model.W_dec[feature] * model.x_scale
            states[0, here] += step
        return states

    before, after = (plain(prompt, tokens, c)[0].log_softmax(1) for c in (None, change))
    kl = (before.exp() * (before - after)).sum(1) / torch.tensor(2.0).log()
    found = prompt.change(tokens, settings, at=4, only_there=only_there, n_tokens_shown=5)
    assert torch.allclose(found.kl_bits, kl, atol=1e-5)
    assert float(kl.max()) > 1e-3
    assert bool((found.kl_bits[: here[0]] == 0).all())  # no token sees those after it
    for ids, p, q, own in zip(
        found.tokens, found.before, found.after, (before, after), strict=True
    ):
        assert ids.equal(own[4].topk(5).indices)
        assert torch.allclose(p, before[4, ids].exp().float(), atol=1e-6)
        assert torch.allclose(q, after[4, ids].exp().float(), atol=1e-6)


def test_without_settings_nothing_changes_and_no_pass_is_made_twice(prompt, monkeypatch):
    tokens = prompt.tokenize(TEXT)
    prompt.features(tokens)
    monkeypatch.setattr(prompt, "_final", None)  # a pass would call it
    found = prompt.change(tokens, {})
    assert found.kl_bits.tolist() == [0.0] * len(tokens)
    assert found.before.equal(found.after)


def test_a_sparse_autoencoder_shows_its_activations(prompt):
    sae = make_baseline("topk", 16, 32, k=4)
    found = Prompt(prompt.lm, "model.layers.0", sae).features(prompt.tokenize(TEXT))
    assert int(found.code.counts().sum()) == int((found.values > 0).sum()) == 4 * 5


def test_a_module_that_searches_shows_its_searched_bits(prompt):
    tokens = prompt.tokenize(TEXT)
    states = plain(prompt, tokens)[1][1:]
    model = SearchedAutoencoder.of(prompt.model, states.repeat(8, 1), bit_price=0.01)
    found = Prompt(prompt.lm, "model.layers.0", model, max_tokens=32).features(tokens)
    assert found.code.equal(model.encode(states))
    assert not found.code.equal(prompt.features(tokens).code)
    # the values stay the encoder's
    assert torch.allclose(found.values, prompt.features(tokens).values, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.tokenize(""), "text must give 1 to 32 tokens; got 0"),
        (lambda p: p.tokenize("word1 " * 33), "text must give 1 to 32 tokens; got 33"),
        (lambda p: p.change([3], {}, at=1), "at must lie in 0 to 0; got 1"),
        (lambda p: p.change([3], {32: 1.0}), r"settings must name features from 0 to 31; got \[32"),
        (lambda p: p.change([3], {1: float("nan")}), "settings must be finite"),
        (lambda p: Prompt(p.lm, "x", p.model, max_tokens=0), "max_tokens must be an int >= 1"),
        (lambda p: Prompt(p.lm, "x", p.model, max_tokens=513), "max_tokens must have at most 512"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(prompt, call, message):
    with pytest.raises(ValueError, match=message):
        call(prompt)


# -- questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "text must be a string"),
        ({"text": 3}, "text must be a string"),
        ({"text": "a" * 20_001}, "text must have at most 20,000 characters"),
        ({"text": TEXT, "more": 1}, "a question must have"),
        ({"text": TEXT, "feature": 32}, "feature must be a feature from 0 to 31; got 32"),
        ({"text": TEXT, "feature": True}, "feature must be a whole number"),
        ({"text": TEXT, "at": 6}, "at must lie in 0 to 5; got 6"),
        ({"text": TEXT, "at": -1}, "at must be a whole number"),
        ({"text": TEXT, "only_there": 1}, "only_there must be true or false"),
        ({"text": TEXT, "settings": {"1": 2}}, "settings must be a list of at most 64 pairs"),
        ({"text": TEXT, "settings": [[1, 0]] * 65}, "settings must be a list of at most 64 pairs"),
        ({"text": TEXT, "settings": [[1]]}, "settings must hold pairs"),
        ({"text": TEXT, "settings": [[40, 1]]}, "settings must be a feature from 0 to 31; got 40"),
        ({"text": TEXT, "settings": [[1, "x"]]}, "settings must hold numbers"),
        ({"text": TEXT, "settings": [[1, float("nan")]]}, "settings must hold values of at most"),
        ({"text": TEXT, "settings": [[1, 1e9]]}, "settings must hold values of at most"),
    ],
)
def test_a_question_that_is_none_is_named(prompt, question, message):
    with pytest.raises(ValueError, match=message):
        prompt_call(prompt)(question)


# -- the server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    def call(value):
        if "fail" in value:
            raise {"value": ValueError, "other": KeyError}[value["fail"]]("two\nlines")
        return {"same": value, "number": float("nan")} if "nan" in value else {"same": value}

    with running(PageServer("<p>page</p>", {"echo": call}, max_bytes=200)) as found:
        yield found


def ask(server, method="POST", path="/api/echo", body=b"{}", **headers):
    """Status, headers and JSON of an answer (or its text); a header that is None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    given = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.putrequest(method, path, skip_host="Host" in given)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        found = connection.getresponse()
        text = found.read().decode()
    finally:
        connection.close()
    kind = found.getheader("Content-Type", "")
    return found.status, found, json.loads(text) if kind == "application/json" else text


def test_the_page_and_its_calls_are_served(server):
    assert server.address == f"http://127.0.0.1:{server.server_port}/"
    status, headers, text = ask(server, "GET", "/", b"")
    assert (status, text) == (200, "<p>page</p>")
    assert headers.getheader("X-Frame-Options") == "DENY"
    assert headers.getheader("Cache-Control") == "no-store"
    assert headers.getheader("Server") == "bae-fast"
    own = f"localhost:{server.server_port}"
    for more in ({}, {"Host": own, "Origin": f"http://{own}"}, {"Host": "[::1]:80"}):
        assert ask(server, body=b'{"a": 1}', **more)[::2] == (200, {"same": {"a": 1}}), more
    assert ask(server, "HEAD", "/", b"")[::2] == (200, "")
    assert ask(server, "GET", "/favicon.ico", b"")[0] == 204


@pytest.mark.parametrize(
    ("status", "message", "asked"),
    [
        (403, "Host must be", {"Host": "evil.example"}),
        (403, "Host must be", {"Host": "127.0.0.1.evil.example:80"}),
        (403, "Host must be", {"Host": "["}),
        (403, "Host must be", {"Host": "192.168.0.1", "method": "GET", "path": "/"}),
        (403, "Origin must be", {"Origin": "http://evil.example"}),
        (403, "Origin must be", {"Origin": "null"}),
        (403, "Sec-Fetch-Site", {"Sec_Fetch_Site": "cross-site"}),
        (404, "no such page: /etc", {"method": "GET", "path": "/etc/../x"}),
        (404, "no such call: /api/no", {"path": "/api/no"}),
        (404, "no such call: /echo", {"path": "/echo"}),
        (400, "a path on this server; got 'http://['", {"path": "http://[", "Host": "[::1]"}),
        (400, "a path on", {"method": "GET", "path": "http://[", "Host": "[::1]", "body": b""}),
        (405, "must be called with POST", {"method": "GET"}),
        (405, "must be read with GET", {"path": "/"}),
        (501, "Unsupported method", {"method": "DELETE"}),
        (415, "Content-Type must be", {"Content_Type": "text/plain"}),
        (411, "Content-Length must be given", {"Content_Length": None, "body": b""}),
        (400, "Content-Length must be a number", {"Content_Length": "-1", "body": b""}),
        (413, "at most 200 bytes", {"body": b'"' + b"a" * 300 + b'"'}),
        (413, "at most 200 bytes", {"Content_Length": "9" * 30, "body": b""}),
        (400, "a call must be JSON", {"body": b"{"}),
        (400, "a call must be JSON", {"body": b"\xff"}),
        (400, "a call must be JSON", {"body": b"[" * 200}),
        (400, "a call must be an object; got list", {"body": b"[]"}),
        (400, "two lines", {"body": b'{"fail": "value"}'}),
        (500, "KeyError: 'two\\nlines'", {"body": b'{"fail": "other"}'}),
        (500, "the answer is no JSON", {"body": b'{"nan": 1}'}),
    ],
)
def test_a_bad_call_gets_one_line_and_a_status(server, status, message, asked):
    found, _, answer = ask(server, **asked)
    assert found == status
    assert set(answer) == {"error"}
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert ask(server)[0] == 200  # and the server lives


def test_what_is_no_http_gets_a_line_too(server):
    for line in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as one:
            one.sendall(line)
            one.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):  # it does not read the rest
                answer = b"".join(iter(lambda: one.recv(4096), b""))
                assert b'{"error": ' in answer
                assert b"Traceback" not in answer
    assert ask(server)[0] == 200


def test_an_end_waits_for_the_call_that_is_running_and_answers_no_other():
    entered, go_on = threading.Event(), threading.Event()

    def call(_value):
        entered.set()
        assert go_on.wait(30)
        return {"done": True}

    server, answers = PageServer("", {"echo": call}), []
    loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    asker = threading.Thread(target=lambda: answers.append(ask(server)[::2]))
    closer = threading.Thread(target=server.server_close)
    loop.start()
    asker.start()
    assert entered.wait(30)
    server.shutdown()
    loop.join()
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    go_on.set()
    for thread in (closer, asker):
        thread.join(30)
        assert not thread.is_alive()
    assert answers == [(200, {"done": True})]
    assert server.calls == {}
    server.server_close()  # once more does nothing


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", ""])
def test_it_listens_on_this_machine_only(host):
    with pytest.raises(ValueError, match="host must be an address of this machine alone"):
        PageServer("", {}, host=host)
    with pytest.raises(ConfigError, match="host must be an address"):
        serve.listening(serve.Config(folder="x", host=host, port=0))


# -- the command -------------------------------------------------------------------------------


def config(study, **more):
    options = {
        "folder": study / "bae", "text": (str(study / "text.txt"),), "cache": study / "cache",
        "device": "cpu", "progress": False, "port": 0, "max_tokens": 32, "prompt": TEXT,
    }  # fmt: skip
    return serve.Config(**options | more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"folder": None}, "folder must name a saved model"),
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"port": 70_000}, "port must lie in 0 to 65535; got 70000"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder, more, message):
    with pytest.raises(ConfigError, match=message):
        serve.listening(config(folder, **more))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read: No such file"), ("{}", "must hold JSON lines with feature")],
)
def test_names_that_cannot_be_read_are_refused(tmp_path, text, message):
    path = tmp_path / "features.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_names(path, "names")


def test_a_port_that_is_taken_is_named(folder, server):
    with pytest.raises(ConfigError, match=rf"port {server.server_port} cannot be had: .*; 0 takes"):
        serve.listening(config(folder, port=server.server_port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_address_answers_and_ends_at_a_signal(
    folder, number, monkeypatch, capsys
):
    said, found = queue.Queue(), {}
    monkeypatch.setattr(serve, "say", said.put)

    def visit():
        address = said.get(timeout=60).split()[0]  # else the command has ended by itself
        try:
            found["address"] = address
            connection = http.client.HTTPConnection(address.split("/")[2], timeout=30)
            connection.request("POST", "/api/prompt", json.dumps({"text": TEXT, "feature": 3}),
                               {"Content-Type": "application/json"})  # fmt: skip
            found["answer"] = json.loads(connection.getresponse().read())
            connection.close()
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    values = [
        f"--{name.replace('_', '-')}={value[0] if isinstance(value, tuple) else value}"
        for name, value in vars(config(folder)).items()
        if name in ("text", "cache", "device", "port", "max_tokens")
    ]
    # as at a terminal, whoever has started the tests
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(["serve", str(folder / "bae"), *values, "--no-progress", "--json"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 0, capsys.readouterr().err
    thread.join()
    result = json.loads(capsys.readouterr().out)["values"]
    assert (result["calls"], result["address"]) == (1, found["address"])
    assert [one["text"] for one in found["answer"]["tokens"]] == TEXT.split()
    assert said.get_nowait() == "ended"


# -- the page in a browser ---------------------------------------------------------------------


def mixed(prompt) -> int:
    """A feature that is on at some tokens of the text and off at others."""
    n_on = prompt.features(prompt.tokenize(TEXT)).code.counts()
    return int(((n_on > 0) & (n_on < 5)).nonzero()[0])


@pytest.fixture(scope="module")
def tab(folder, prompt, tmp_path_factory):
    if driver.find() is None:
        pytest.skip(f"no browser: none of {', '.join(driver.NAMES)} is on the path")
    names = folder / "features.jsonl"
    names.write_text(json.dumps({"feature": mixed(prompt), "phrase": "a name"}) + "\n")
    with serve.listening(config(folder)) as server:
        serve.publish(config(folder, names=names), server)
        with running(server):
            found = driver.Browser(tmp_path_factory.mktemp("profile"))
            found.size(1200, 900)
            found.site = server.address
            yield found
            found.close()


def answers(tab):
    return int(tab.run("document.documentElement.dataset.answers || 0"))


def after(tab, script):
    """Do something and wait for the server's next answer."""
    before = answers(tab)
    tab.run(script)
    tab.wait(f"Number(document.documentElement.dataset.answers) > {before}")


WORD = "document.getElementById('words').children"


def test_a_reader_sees_tokens_and_what_switching_features_changes(tab, prompt):
    tab.errors.clear()
    chosen = mixed(prompt)
    tab.open(tab.site, f"#f={chosen}")
    tab.wait("document.documentElement.dataset.answers > 0")
    assert tab.run(f"[...{WORD}].map(word => word.textContent)") == TEXT.split()
    found = prompt.features(prompt.tokenize(TEXT))
    labels = tab.run(f"[...{WORD}].map(word => word.getAttribute('aria-label'))")
    assert labels[0] == "word3, left out"
    for label, value in zip(labels[1:], found.values[:, chosen].tolist(), strict=True):
        assert f", #{chosen} {'on' if value > 0 else 'off'}, margin " in label
        assert float(label.rsplit(" ", 1)[1]) == pytest.approx(value, abs=1e-2)
    shades = tab.run(f"[...{WORD}].map(word => word.style.background)")
    assert shades[0] == ""
    assert all("color-mix" in shade for shade in shades[1:])
    on = ["var(--accent)" in shade for shade in shades[1:]]
    assert on == (found.values[:, chosen] > 0).tolist()
    # the features on at the last token, the name among them where it is on
    on = tab.run(
        "[...document.querySelectorAll('#onhere b')].map(b => Number(b.textContent.slice(1)))"
    )
    dense = found.code.to_dense()[-1].nonzero()[:, 0]
    assert on == dense[found.values[-1, dense].argsort(descending=True)].tolist()
    # without settings both columns agree
    rows = """[...document.querySelectorAll('#next tbody tr')]
        .map(row => [...row.cells].map(cell => cell.textContent))"""
    table = tab.run(rows)
    assert len(table) == 10
    assert all(before == changed for _, before, changed in table)
    # set on, and off again
    after(tab, "document.getElementById('on').click()")
    assert "KL(as it is | changed)" in tab.run("document.getElementById('said').textContent")
    changed = prompt.change(prompt.tokenize(TEXT), {chosen: 1.0})
    table = {row[0]: row[1:] for row in tab.run(rows)}
    assert len(table) >= 10
    decode = prompt.lm.tokenizer.decode
    for token, value in zip(changed.tokens[1].tolist(), changed.after[1].tolist(), strict=True):
        assert float(table[decode([token])][1].split()[0]) == pytest.approx(100 * value, rel=1e-2)
    after(tab, "document.getElementById('off').click()")
    assert tab.run("document.querySelector('#set input').value") == "0"
    assert "a name" in tab.run("document.getElementById('set').textContent")
    after(tab, "document.querySelector('#set li button').click()")
    assert tab.run("document.getElementById('set').children.length") == 0
    assert tab.errors == []


def test_the_prompt_is_operated_by_keys_and_says_what_is_wrong(tab):
    tab.errors.clear()
    tab.open(tab.site)
    tab.wait("document.documentElement.dataset.answers > 0")
    tab.run(f"{WORD}[5].focus()")
    before = answers(tab)
    tab.press("ArrowLeft")
    tab.wait(f"Number(document.documentElement.dataset.answers) > {before}")
    assert tab.run(f"[...{WORD}].indexOf(document.activeElement)") == 4
    assert tab.run("document.getElementById('nexttitle').textContent").endswith("after word11")
    pressed = f"[...{WORD}].map(word => word.getAttribute('aria-pressed'))"
    assert tab.run(pressed) == ["false"] * 4 + ["true", "false"]
    # keys of the list do nothing while a text is typed
    tab.run("document.getElementById('text').focus()")
    for key in ("j", "s", "r"):
        tab.press(key)
    assert tab.run("location.hash") in ("", "#")
    assert tab.run("document.getElementById('text').value").endswith("jsr")
    long = "'word1 '.repeat(40)"
    after(tab, f"document.getElementById('text').value = {long};"
               "document.getElementById('read').click()")  # fmt: skip
    said = tab.run("document.getElementById('said').textContent")
    assert said == "text must give 1 to 32 tokens; got 40"
    tab.errors.clear()  # the browser notes a status of 400


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_can_be_read_and_operated_by_everybody(tab, dark):
    tab.errors.clear()
    tab.size(1200, 900, dark)
    tab.open(tab.site, "#f=5")
    tab.wait("document.documentElement.dataset.answers > 0")
    tab.run("for (const d of document.querySelectorAll('details')) d.open = true")
    after(tab, "document.getElementById('on').click()")
    worst = tab.run(driver.CONTRAST)
    assert len(worst) > 100
    assert [one for one in worst if one[0] < 4.5] == []
    assert tab.nameless() == []
    steps = tab.walk(30)
    assert {"query", "sort", "list", "text", "shade", "off", "on", "plane", "hue"} <= {
        where for where, _ in steps
    }
    assert [where for where, seen in steps if not seen] == []
    assert tab.errors == []


def test_a_second_model_stands_beside_the_first_and_the_prompt_is_the_first_s(folder, prompt, tab):
    with serve.listening(config(folder, beside=folder / "bae")) as server:
        serve.publish(config(folder, beside=folder / "bae"), server)
        with running(server):
            before, tab.site = tab.site, server.address
            try:
                tab.errors.clear()
                tab.open(tab.site, "#f=5")
                tab.wait("document.documentElement.dataset.answers > 0")
                tab.wait("document.documentElement.dataset.feature === '5'")
                relation = tab.run("document.getElementById('relation').textContent")
                assert "match the same" in relation
                assert "Jaccard index 1" in relation
                assert tab.run("document.querySelector('#other h2').textContent") == "#5"
                assert [one for one in tab.run(driver.CONTRAST) if one[0] < 4.5] == []
                assert tab.errors == []
            finally:
                tab.site = before


def test_a_page_without_a_server_asks_nobody():
    record = FeatureRecord(0, 0.5)
    assert "connect-src" not in browser_page([record], title="t")
    assert "connect-src 'self'" in browser_page([record], title="t", live={"usual": [1.0]})
