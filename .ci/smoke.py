"""An installed wheel computes what the definition does: python smoke.py (kernels | any)"""

import sys
from pathlib import Path

import torch

import bae_fast as bf

wanted = {"kernels": "cpp", "any": "torch"}[sys.argv[1]]
checkout = Path(__file__).resolve().parents[1]
if checkout in Path(bf.__file__).resolve().parents:
    sys.exit(f"bae_fast must be the installed one; got {bf.__file__}")
backends = bf.info()["backends"]
if backends[wanted] != "available":
    sys.exit(f"backend {wanted} must be available; it is {backends[wanted]}")
if wanted == "torch" and not backends["cpp"].startswith("not compiled"):
    sys.exit(f"a wheel for any machine must hold no kernels; cpp is {backends['cpp']}")

torch.manual_seed(0)
x = torch.randn(200, 24)
bae = bf.BinaryAutoencoder(24, 96, preset="paper").fit_normalization_(x)
found = {}
for impl in ("reference", wanted):
    bae.impl = impl
    bae.zero_grad()
    out = bae(x)
    (bae.mse(out, x) + out.entropy + out.covariance).backward()
    gradients = [parameter.grad for parameter in bae.parameters()]
    found[impl] = [out.recon, out.entropy, out.covariance, *gradients]
for dense, packed in zip(*found.values(), strict=True):
    torch.testing.assert_close(packed, dense, rtol=1e-3, atol=1e-3)
print(f"bae_fast {bf.__version__} with torch {torch.__version__}: {wanted} equals the definition")
