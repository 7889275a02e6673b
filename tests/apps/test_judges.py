"""Judges and the file of their answers: what is asked twice, what is kept, what is told."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import logging
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import processes
import pytest
import torch
from tiny_lm import save_tiny_model

from bae_fast.interpret.answers import Answers, Asker, Prices, request_key
from bae_fast.interpret.judges import (
    Answer,
    JudgeError,
    OpenAIJudge,
    Request,
    RuleJudge,
    TransformersJudge,
)

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-a-secret-that-must-not-be-seen-0123456789"


def judgments(n):
    return [Request("judge", f"question {i}", phrase="a", tokens=("a",)) for i in range(n)]


class Counting(RuleJudge):
    """Remembers every question."""

    def __init__(self, fail=lambda i: None):
        self.asked = []
        self.fail = fail

    def answer(self, requests, done):
        for i, request in enumerate(requests):
            self.asked.append(request)
            error = self.fail(len(self.asked))
            done(i, error or Answer(self._say(request), 10, 2))


# -- the rule ----------------------------------------------------------------------------------


def test_the_rule_names_by_the_commonest_token_and_agrees_where_it_is_the_phrase():
    say = RuleJudge._say
    assert say(Request("name", "", tokens=(" The", "cat", "the", "cat"))) == "the"
    assert say(Request("judge", "", phrase="the", tokens=(" The",))) == "Yes"
    assert say(Request("judge", "", phrase="the", tokens=("then",))) == "No"


# -- answers on disk ---------------------------------------------------------------------------


def test_nothing_is_asked_twice_and_order_is_kept(tmp_path):
    judge = Counting()
    with Answers(tmp_path / "a.sqlite") as answers:
        first = Asker(answers).ask(judge, judgments(5))
        asker = Asker(answers)
        again = asker.ask(judge, judgments(8)[::-1] + judgments(2))
    assert len(judge.asked) == 8
    assert again[-2:] == first[:2]
    assert all(answer is not None for answer in again)
    # ten requests, eight different: five on disk, three asked
    assert (asker.usage.calls, asker.usage.cached) == (3, 5)
    assert (asker.usage.prompt_tokens, asker.usage.completion_tokens) == (30, 6)


def test_another_judge_or_draw_is_another_question():
    request = judgments(1)[0]
    keys = {
        request_key("a", request),
        request_key("b", request),
        request_key("a", Request("judge", request.prompt, draw=1)),
        request_key("a", Request("name", request.prompt)),
    }
    assert len(keys) == 4
    # what only repeats the prompt is no part of it
    assert request_key("a", request) == request_key("a", Request("judge", request.prompt))


def test_the_budget_bounds_questions_and_the_rest_is_none(tmp_path):
    judge = Counting()
    with Answers(tmp_path / "a.sqlite") as answers:
        asker = Asker(answers, budget_calls=3)
        found = asker.ask(judge, judgments(5))
        assert [answer is None for answer in found] == [False] * 3 + [True] * 2
        assert asker.spent
        more = Asker(answers, budget_calls=2)
        assert None not in more.ask(judge, judgments(5))
        assert not more.spent
    assert len(judge.asked) == 5


def test_one_failure_is_left_out_and_five_in_a_row_end_it():
    judge = Counting(fail=lambda n: JudgeError("no") if n == 2 else None)
    asker = Asker()
    assert [answer is None for answer in asker.ask(judge, judgments(4))] == [
        False, True, False, False,
    ]  # fmt: skip
    assert asker.usage.failed == 1
    judge = Counting(fail=lambda n: JudgeError("no") if n > 2 else None)
    with pytest.raises(JudgeError, match="no"):
        Asker().ask(judge, judgments(20))
    assert len(judge.asked) == 7


def test_a_fatal_error_ends_it_at_once_and_keeps_what_was_answered():
    judge = Counting(fail=lambda n: JudgeError("refused", fatal=True) if n == 4 else None)
    answers = Answers()
    with pytest.raises(JudgeError, match="refused"):
        Asker(answers).ask(judge, judgments(20))
    assert (len(judge.asked), len(answers)) == (4, 3)


def test_cost_is_known_only_with_both_prices():
    assert Prices(2.0, 10.0).cost(1_000_000, 100_000) == 3.0
    assert Prices(2.0).cost(10, 10) is None


def test_a_file_that_fails_later_is_named(tmp_path):
    answers = Answers(tmp_path / "a.sqlite")
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute("PRAGMA writable_schema = 1")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'p_yes', 'p_no')")
    with pytest.raises(OSError, match=r"a\.sqlite cannot be used: .*p_yes"):
        Answers(tmp_path / "a.sqlite").get(["key"])
    answers.close()


@pytest.mark.parametrize("kind", ["text", "other database", "newer"])
def test_a_foreign_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "a.sqlite"
    if kind == "text":
        path.write_text("no database at all " * 100)
    elif kind == "other database":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE cats (name TEXT)")
    else:
        Answers(path).close()
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.sqlite is not a file of answers") as caught:
        Answers(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


CHILD = """
import os, sys, time
from bae_fast.interpret.answers import Answers, Asker
from bae_fast.interpret.judges import Answer, Request

class Slow:
    identity = "slow"
    def answer(self, requests, done):
        for i, request in enumerate(requests):
            with open(sys.argv[2], "a") as log:  # a paid call
                log.write(request.prompt + "\\n")
            time.sleep(float(sys.argv[4]))
            done(i, Answer("Yes", 7, 1))

requests = [Request("judge", f"question {i}") for i in range(int(sys.argv[3]))]
with Answers(sys.argv[1]) as answers:
    found = Asker(answers).ask(Slow(), requests)
assert all(found)
"""


NUMBERS = itertools.count()


def child(*arguments):
    """A process, and the file of its errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = Path(f"{arguments[1]}.{next(NUMBERS)}")
    return processes.start("-c", CHILD, *arguments, errors=errors, env=environment), errors


def test_killed_in_the_middle_and_run_again_nothing_is_paid_twice(tmp_path):
    path, log, n = tmp_path / "a.sqlite", tmp_path / "log", 200
    process, errors = child(path, log, n, 0.05)
    try:
        processes.wait_until(
            lambda: log.is_file() and len(log.read_text().splitlines()) >= 12, process, errors
        )
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    finally:
        process.kill()
    with Answers(path) as answers:
        kept = len(answers)
    asked = log.read_text().splitlines()
    # the one under way when it was killed is the only one that can be lost
    assert 11 <= kept < n
    assert len(asked) - kept in (0, 1)
    again, errors = child(path, log, n, 0)
    assert again.wait(60) == 0, errors.read_text()
    later = log.read_text().splitlines()[len(asked) :]
    assert len(later) == n - kept
    assert len(set(later) & set(asked)) == len(asked) - kept
    with Answers(path) as answers:
        assert len(answers) == n


def test_two_processes_share_a_file_and_lose_nothing(tmp_path):
    path, log, n = tmp_path / "a.sqlite", tmp_path / "log", 150
    both = [child(path, log, n, 0.001), child(path, log, n, 0.001)]
    for process, errors in both:
        assert process.wait(90) == 0, errors.read_text()
    with Answers(path) as answers:
        assert len(answers) == n
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- a local model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    pytest.importorskip("transformers")
    words = ["Yes", "No", "Answer", ":", *(f"word{i}" for i in range(60))]
    folder = save_tiny_model(tmp_path_factory.mktemp("judge"), words)
    return TransformersJudge(str(folder), dtype="float32")


def collect(judge, requests):
    found = {}
    judge.answer(requests, lambda i, answer: found.setdefault(i, answer))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def passages(n, prefix):
    g = torch.Generator().manual_seed(1)
    ends = [torch.randint(60, (3 + i % 5,), generator=g).tolist() for i in range(n)]
    return [Request("judge", " ".join(f"word{j}" for j in [*prefix, *end])) for end in ends]


def test_shared_beginnings_change_no_probability(local):
    requests = passages(9, range(20)) + passages(7, range(30, 55)) + passages(2, [1])
    together = collect(local, requests)
    for request, answer in zip(requests, together, strict=True):
        ids = torch.tensor([local.encode(request.prompt)])
        yes, no = local.verdict_tokens()
        with torch.no_grad():
            logits = local.lm.model(input_ids=ids).logits[0, -1]
        expected = float(logits[[yes, no]].double().softmax(0)[0])
        assert answer.p_yes == pytest.approx(expected, abs=1e-6)
        assert answer.text == ("Yes" if expected >= 0.5 else "No")
        assert (answer.prompt_tokens, answer.completion_tokens) == (ids.shape[1], 1)


def test_beginnings_are_really_shared(local, monkeypatch):
    base, seen = local.lm.model.base_model, []

    def watched(*arguments, **options):
        seen.append(options["input_ids"].numel())
        return type(base).forward(base, *arguments, **options)

    monkeypatch.setattr(base, "forward", watched)
    requests = passages(16, range(60))
    collect(local, requests)
    assert sum(seen) < sum(len(local.encode(r.prompt)) for r in requests) / 3


def test_phrases_are_the_greedy_continuation_however_they_are_batched(local):
    requests = [Request("name", r.prompt) for r in passages(6, range(4))]
    together = collect(local, requests)
    for request, answer in zip(requests, together, strict=True):
        assert collect(local, [request]) == [answer]
        ids = local.encode(request.prompt)
        with torch.no_grad():
            for _ in range(3):
                logits = local.lm.model(input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        expected = local.lm.tokenizer.decode(ids[-3:], skip_special_tokens=True)
        assert answer.text.startswith(expected)


def test_later_draws_say_yes_with_the_probability(local):
    prompt = passages(1, range(10))[0].prompt
    draws = [Request("judge", prompt, draw=i) for i in range(1, 401)]
    found = collect(local, draws)
    p = found[0].p_yes
    share = sum(answer.text == "Yes" for answer in found) / len(found)
    assert abs(share - p) < 4 * (p * (1 - p) / len(found)) ** 0.5
    assert collect(local, draws[:20]) == found[:20]


def test_a_model_that_cannot_tell_yes_from_no_is_refused(tmp_path):
    pytest.importorskip("transformers")
    judge = TransformersJudge(str(save_tiny_model(tmp_path, ["word"])))
    with pytest.raises(ValueError, match="its words Yes and No begin with one token"):
        collect(judge, [Request("judge", "word")])


# -- a server ----------------------------------------------------------------------------------


class Server:
    """Chat completions on loopback that answer by a script of (status, body, seconds)."""

    def __init__(self, script=()):
        self.script = list(script)
        self.bodies, self.headers = [], []
        self.together = None  # a barrier that every request waits at
        lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.bodies.append(body)
                    server.headers.append(self.headers)
                    status, reply, seconds = server.script.pop(0) if server.script else OK
                if server.together is not None:
                    server.together.wait()
                time.sleep(seconds)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("Retry-After-Ms", "1")
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client gave up

            def log_message(self, *_arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def message(text):
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
        }],
        "usage": {"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12},
    }  # fmt: skip


OK = (200, message("Yes."), 0)


def error(status, text="out of order"):
    return (status, {"error": {"message": text, "type": "x", "code": None}}, 0)


@pytest.fixture
def serve(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(*script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_request_is_tried_again_after_429_and_500(serve):
    server = serve(error(429), error(500), error(503))
    judge = OpenAIJudge("m", base_url=server.url)
    assert collect(judge, judgments(1)) == [Answer("Yes.", 11, 1)]
    assert len(server.bodies) == 4
    sent = server.bodies[-1]
    assert sent["messages"] == [{"role": "user", "content": "question 0"}]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("m", 0.0, 4)
    assert "seed" not in sent


def test_draws_are_sampled_and_a_server_may_choose_its_own_temperature(serve):
    server = serve()
    judge = OpenAIJudge("m", base_url=server.url, max_tokens=500)
    collect(judge, [Request("judge", "q", draw=2)])
    assert (server.bodies[-1]["seed"], server.bodies[-1]["temperature"]) == (2, 1.0)
    assert server.bodies[-1]["max_tokens"] == 500
    other = OpenAIJudge("m", base_url=server.url, temperature=None)
    collect(other, [Request("name", "q")])
    assert "temperature" not in server.bodies[-1]
    assert judge.identity != other.identity


@pytest.mark.parametrize(
    ("reply", "expected", "fatal"),
    [
        (error(401, f"wrong key {KEY}"), "AuthenticationError", True),
        (error(404, "no such model"), "NotFoundError", True),
        (error(500), "InternalServerError", False),
        (error(400, "too long"), "BadRequestError", False),
        ((200, b"{half a body", 0), "m", False),
        ((200, b"[]", 0), "the server's answer has no message", False),
        ((200, {"choices": []}, 0), "the server's answer has no message", False),
        ((200, message(None), 0), "the server's answer has no text", False),
        ((200, message("Yes"), 1.0), "APITimeoutError", False),
    ],
)
def test_a_failure_is_one_line_without_the_key(serve, reply, expected, fatal):
    server = serve(reply)
    judge = OpenAIJudge("m", base_url=server.url, max_retries=0, timeout=0.3)
    (found,) = collect(judge, judgments(1))
    assert isinstance(found, JudgeError)
    assert expected in str(found)
    assert found.fatal is fatal
    assert "\n" not in str(found)
    assert KEY not in str(found) + repr(found)


def test_a_server_that_is_not_there_ends_it(serve):
    server = serve()
    server.close()
    judge = OpenAIJudge("m", base_url=server.url, max_retries=0, concurrency=1)
    with pytest.raises(JudgeError, match="APIConnectionError"):
        Asker().ask(judge, judgments(50))


def test_requests_go_out_side_by_side_and_come_back_in_order(serve):
    server = serve(*[(200, message(f"Yes {i}"), 0) for i in range(8)])
    server.together = threading.Barrier(8, timeout=60)  # nobody is answered before all have asked
    judge = OpenAIJudge("m", base_url=server.url, concurrency=8, max_retries=0)
    requests = judgments(8)
    answers = collect(judge, requests)
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    given = {text: f"Yes {i}" for i, text in enumerate(asked)}
    assert len(given) == 8
    assert [answer.text for answer in answers] == [given[r.prompt] for r in requests]


def test_an_interrupt_keeps_what_is_under_way(serve, tmp_path):
    server = serve(*[(200, message("Yes"), 0.2)] * 40)
    judge = OpenAIJudge("m", base_url=server.url, concurrency=4)
    with Answers(tmp_path / "a.sqlite") as answers:
        put, count = answers.put, []

        def interrupted(*arguments):
            put(*arguments)
            count.append(1)
            if len(count) == 6:
                raise KeyboardInterrupt

        answers.put = interrupted
        with pytest.raises(KeyboardInterrupt):
            Asker(answers).ask(judge, judgments(40))
        # every call that the server answered was paid for, and is kept
        assert len(answers) == len(server.bodies) < 20
        answers.put = put
        Asker(answers).ask(judge, judgments(40))
        assert len(answers) == len(server.bodies) == 40


@pytest.fixture
def logged(monkeypatch):
    """All that libraries log."""
    written = io.StringIO()
    root, handler = logging.getLogger(), logging.StreamHandler(written)
    monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
    level = root.level
    root.setLevel(logging.DEBUG)
    yield written
    root.setLevel(level)


def test_the_key_is_in_no_file_log_or_name(serve, tmp_path, logged):
    server = serve(error(429, f"slow down, {KEY}"), (200, message(f"Yes, {KEY}"), 0))
    judge = OpenAIJudge("m", base_url=server.url)
    with Answers(tmp_path / "a.sqlite") as answers:
        Asker(answers).ask(judge, judgments(3))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in repr(judge) + judge.identity
    # the server's own words apart, which other libraries may log
    assert len(logged.getvalue().splitlines()) > 1
    assert f"Bearer {KEY}" not in logged.getvalue()


def test_the_key_comes_from_the_variable_that_is_named(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("OTHER_KEY", "another-key-42")
    collect(OpenAIJudge("m", base_url=server.url, api_key_env="OTHER_KEY"), judgments(1))
    assert server.headers[0]["Authorization"] == "Bearer another-key-42"
    with pytest.raises(ValueError, match="NO_SUCH_KEY must hold the key"):
        OpenAIJudge("m", base_url="https://example.org/v1", api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model must name"),
        ({"base_url": "localhost:80"}, r"base_url must be http\(s\)"),
        ({"base_url": "http://me:word@localhost/v1"}, "neither user, password nor query"),
        ({"timeout": 0}, "timeout must be above 0; got 0"),
        ({"concurrency": 0}, "concurrency must be above 0; got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_bad_options_are_named(serve, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIJudge(**{"model": "m", "base_url": "http://localhost/v1", **options})
    assert "word" not in str(caught.value).replace("password", "")
