"""``python -m bench device`` without a GPU: on tiny sizes, by the host's clock."""

import time

import pytest
from device_results import SMALL

from bae_fast.files import read_json, write_json
from bench.checkout import ROOT
from bench.device import worker


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """Some cases in this process; returns the result."""

    def run(*wanted, impls=("torch",), until=None, rows=(), ended=None, only=()):
        path = tmp_path / "device.json"
        blank = {"environment": {"torch": "", "device": {"name": "none"}}, "impls": {}}
        lists = {"rows": list(rows), "skipped": [], "ended": ended or {}}
        write_json(path, {**blank, **lists, "running": None, "complete": False})
        monkeypatch.setattr(worker, "cases", lambda plan, impls, kind: list(wanted))
        status = worker.work(
            path, list(impls), "cpu", SMALL, time.time() + 100 if until is None else until, only
        )
        return status, read_json(path)

    return run
