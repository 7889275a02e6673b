"""The package on a CUDA device in name: no operator meets tensors of the device and of the host.

A CPU holds all of them and would not notice. ``tests/support/fake_cuda.py`` keeps count of which
tensor is where, and refuses what torch refuses on a device. Programs run in processes of their own,
for the device is there for good.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import sys, tempfile
import torch
import bae_fast as bf
import fake_cuda
from bae_fast.baselines import METHODS, make_baseline
from bae_fast.training import SparseConfig, Trainer, TrainingConfig
fake_cuda.use()
torch.manual_seed(0)
rows = torch.randn(300, 12)
there = rows.to("cuda")

def module():
    bae = bf.BinaryAutoencoder(12, 40, impl="triton", device="cuda")
    return bae.fit_normalization_(rows).init_density_(there, 0.2)
"""
LAYER = """
bae = module()
out = bae(there, mask=torch.arange(300, device="cuda") % 3 != 0)
(out.recon.sum() + out.entropy).backward()
assert bae.W_enc.grad.is_cuda
code = bae.encode(there)
stats = code.statistics(covariance=True)
for given in ({"stats": stats}, {"past": stats}):
    bae(there[:99], covariance=True, **given).covariance.backward()
assert bae.decode(code).is_cuda and code.counts().is_cuda
code[3:9], code[torch.arange(5, device="cuda")], code[there[:, 0] > 0]
with tempfile.TemporaryDirectory() as folder:
    bae.save_pretrained(folder)
    again = bf.BinaryAutoencoder.from_pretrained(folder, device="cuda", impl="triton")
    assert torch.equal(again(there).recon, bae(there).recon)
    code.save(folder + "/code.safetensors")
"""
TRAINING = """
from bae_fast.analysis import description_length, evaluate
everything = {"bank_batches": 3, "revive_every": 5, "entropy_from": 0.5, "refit": True}
for more in ({}, everything, {"cuda_graph": True, "bank_batches": 2}, {"precision": "bfloat16"}):
    for given in (rows, there):
        bae = module()
        Trainer(bae, given, TrainingConfig(steps=9, batch_size=64, **more)).fit(log_every=3)
evaluate(bae, there, training_rows=rows)
code = bae.encode(there)
description_length(code, "columns", fitted_to=code)
for method in METHODS:
    more = {"d_out": 12} if method == "transcoder" else {}
    sae = make_baseline(method, 12, 40, k=4, device="cuda", **more)
    targets = [there] * bool(more)
    sae.fit_normalization_(there, *targets)
    config = SparseConfig(steps=6, batch_size=64)
    Trainer(sae, there, config, **({"targets": there} if more else {})).fit(log_every=3)
    evaluate(sae.eval(), there, *targets, training_rows=there)
"""
SEARCH = """
from bae_fast.analysis import evaluate
from bae_fast.baselines import PursuedAutoencoder
from bae_fast.training import fit_search_
model = fit_search_(bf.SearchedAutoencoder.of(module(), rows, bit_price=1e-3), there)
assert model.encode(there, mask=there[:, 0] > 0).words.is_cuda
evaluate(model, rows)
model.train()(there).recon.sum().backward()
sae = make_baseline("topk", 12, 40, k=4, device="cuda").fit_normalization_(there)
evaluate(PursuedAutoencoder(sae.eval(), 4).fit_(rows).eval(), there, training_rows=rows)
"""
PROGRAMS = {"the layer": LAYER, "training": TRAINING, "searched codes": SEARCH}


def run(text):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEAD + text], env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "the layer",
        "searched codes",
        pytest.param("training", marks=[pytest.mark.long, pytest.mark.slow]),
    ],
)
def test_tensors_of_a_device_and_of_the_host_never_meet(program):
    status, said = run(PROGRAMS[program])
    assert status == 0, said


MIXED = """
for wrong in (lambda: module()(rows), lambda: there + rows):
    try:
        wrong()
    except (ValueError, fake_cuda.MixedDevicesError) as error:
        print(error)
"""


def test_tensors_that_meet_are_found():
    _, said = run(MIXED)
    assert "x must be on the module's device cuda:0; got cpu" in said, said
    assert "add: expected all tensors on one device" in said, said
