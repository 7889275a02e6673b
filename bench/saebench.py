"""SAEBench's core evaluation of autoencoders trained here: python -m bench.saebench

SmolLM2-135M after block 12, text of Python's standard library; the last tenth of the windows is
what SAEBench evaluates on. The Binary Autoencoder goes there as a folder that SAELens loads, TopK
as SAELens' own class with the tensors of ours. One trainer trains both on the same rows.

It needs an environment with SAEBench, SAELens and datasets; ``make saebench`` makes it. Then
``python -m bench --tables`` writes the table into the documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast import BinaryAutoencoder
from bae_fast.baselines import TRAINING, SparseAutoencoder, make_baseline
from bae_fast.baselines.formats import save_sparsify
from bae_fast.files import read_safetensors, write_json
from bae_fast.lm import harvest, load_language_model, standard_library_text, windows
from bae_fast.training import PRESETS, Trainer
from bench import tables

RESULTS = Path(__file__).resolve().parent / "results"
HOOK = "model.layers.11"
CONTEXT = 128
EXPANSION = 4
TOPK = (16, 32)
BATCH = 8
# of SAEBench's figures, these are shown
SHOWN = {
    "L0": ("sparsity", "l0", ".1f"),
    "explained variance": ("reconstruction_quality", "explained_variance", ".3f"),
    "explained variance, older formula": (
        "reconstruction_quality",
        "explained_variance_legacy",
        ".3f",
    ),
    "cosine": ("reconstruction_quality", "cossim", ".3f"),
    "norm, out / in": ("shrinkage", "l2_ratio", ".3f"),
    "KL, nats": ("model_behavior_preservation", "kl_div_with_sae", ".3f"),
    "KL score": ("model_behavior_preservation", "kl_div_score", ".4f"),
    "loss": ("model_performance_preservation", "ce_loss_with_sae", ".3f"),
    "loss score": ("model_performance_preservation", "ce_loss_score", ".4f"),
}


def trained(name: str, rows: Tensor, steps: int) -> BinaryAutoencoder | SparseAutoencoder:
    """One autoencoder by this package's trainer: ``binary`` or ``topk-K``."""
    torch.manual_seed(0)
    d = rows.shape[1]
    if name == "binary":
        bae = BinaryAutoencoder(d, EXPANSION * d, preset="sparse").fit_normalization_(rows)
        Trainer(bae, rows, dataclasses.replace(PRESETS["sparse"], steps=steps)).fit()
        return bae.eval()
    sae = make_baseline("topk", d, EXPANSION * d, k=int(name.split("-")[1]))
    sae.fit_normalization_(rows)
    Trainer(sae, rows, dataclasses.replace(TRAINING, steps=steps)).fit()
    return sae.eval()


def in_sae_lens(model: BinaryAutoencoder | SparseAutoencoder, folder: Path) -> Any:
    """The module as one of SAELens', for raw rows; ``folder`` has the name of its kind."""
    from sae_lens import SAE, TopKSAE, TopKSAEConfig

    import bae_fast.saelens  # noqa: F401  registers the architecture

    if folder.name == "binary":
        model.save_pretrained(folder)
        return SAE.load_from_disk(folder)
    k = int(folder.name.split("-")[1])
    saved, _ = read_safetensors(save_sparsify(model, folder) / "sae.safetensors")
    sae = TopKSAE(TopKSAEConfig(d_in=model.d_in, d_sae=model.d_sae, k=k))
    sae.load_state_dict(
        {
            "W_enc": saved["encoder.weight"].T,
            "b_enc": saved["encoder.bias"],
            "W_dec": saved["W_dec"],
            "b_dec": saved["b_dec"],
        }
    )
    return sae


def evaluated(sae: Any, model: Any, held_out: Tensor) -> dict[str, Any]:
    """SAEBench's core evaluation on whole windows of tokens ``[n, CONTEXT]``."""
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens.training.activations_store import ActivationsStore

    metadata = sae.cfg.metadata
    metadata.model_name = "SmolLM2-135M-Instruct"
    metadata.hook_name = HOOK
    metadata.context_size, metadata.prepend_bos = CONTEXT, True
    _, sae, _ = load_and_format_sae("bae_fast", sae, "cpu")
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"tokens": held_out.tolist()}),
        context_size=CONTEXT,
        streaming=False,
        store_batch_size_prompts=BATCH,
    )
    batches = len(held_out) // BATCH
    config = CoreEvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        context_size=CONTEXT,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    tokenizer = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    found, features = run_evals(sae, store, model, config, ignore_tokens=ignored)
    density = torch.tensor(features["feature_density"])
    found["features"] = {"dead": float((density == 0).double().mean())}
    return found


def run(tokens: int, steps: int) -> dict[str, Any]:
    """Train, carry over, evaluate.

    Raises:
        RuntimeError: SAEBench's model has other hidden states than the one that was trained on.
    """
    from importlib.metadata import version

    from sae_lens.load_model import HookedProxyLM

    lm = load_language_model(dtype="float32")
    all_windows = windows(
        lm.tokenizer, standard_library_text(), CONTEXT, n_tokens=tokens, prepend_bos=True
    )
    n_train = len(all_windows) * 9 // 10
    held_out = all_windows[n_train:]
    held_out = held_out[: len(held_out) // BATCH * BATCH]
    rows = harvest(lm, all_windows[:n_train], HOOK).rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # TransformerLens has a fixed list of models; this is SAELens' way to any of transformers
        model = HookedProxyLM(lm.model, lm.tokenizer, hook_names=[HOOK])
        _, cache = model.run_with_cache(all_windows[:1], names_filter=[HOOK])
        theirs, ours = cache[HOOK][0, 1:], torch.as_tensor(rows[: CONTEXT - 1]).float()
        gap = float((theirs - ours).norm() / ours.norm())
        if not gap < 1e-3:
            raise RuntimeError(f"hidden states must be the same in both models; they differ {gap}")
        found = []
        for name in ("binary", *(f"topk-{k}" for k in TOPK)):
            sae = in_sae_lens(trained(name, rows, steps), folder / name)
            found.append({"name": name, **evaluated(sae, model, held_out)})
            print(table({"rows": found[-1:]}), flush=True)
    return {
        "rows": found,
        "steps": steps,
        "training_rows": len(rows),
        "held_out_windows": len(held_out),
        "versions": {name: version(name) for name in ("sae-bench", "sae-lens")},
    }


def table(result: dict[str, Any]) -> str:
    """SAEBench's figures, one autoencoder a line."""
    lines = [
        [
            row["name"].replace("topk-", "TopK, k = "),
            *(f"{row[group][key]:{form}}" for group, key, form in SHOWN.values()),
            f"{row['features']['dead']:.1%}",
        ]
        for row in result["rows"]
    ]
    return tables.markdown(["autoencoder", *SHOWN, "dead"], lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.saebench", description=__doc__)
    parser.add_argument("--tokens", type=int, default=110_000, help="tokens of text (110000)")
    parser.add_argument("--steps", type=int, default=2000, help="steps of training (2000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "saebench.json")
    options = parser.parse_args(arguments)
    write_json(options.out, run(options.tokens, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
