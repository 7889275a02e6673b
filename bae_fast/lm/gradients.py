"""How much the language model's next-token distribution depends on each dimension at a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bae_fast.lm.hooks import (
    find_module,
    first_part,
    frozen,
    in_own_dtype,
    running,
    with_first_part,
)
from bae_fast.progress import progress_bar

if TYPE_CHECKING:
    from bae_fast.lm.loading import LanguageModel


def sensitivity(
    lm: LanguageModel,
    windows: Tensor,
    hook: str,
    *,
    drop_positions: int = 1,
    max_norm_ratio: float | None = 5.0,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Mean squared gradient of the log-likelihood at a module's output: float64 ``[d]``.

    The diagonal of :func:`fisher`, which has the arguments and errors; to second order the mean KL
    divergence of an error e is sum_i F_ii e_i^2 / 2 nats, cross terms left out.
    """
    return _moments(
        lm,
        windows,
        hook,
        lambda g: g.square().sum(0),
        drop_positions,
        max_norm_ratio,
        seed,
        progress,
    )


def fisher(
    lm: LanguageModel,
    windows: Tensor,
    hook: str,
    *,
    drop_positions: int = 1,
    max_norm_ratio: float | None = 5.0,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Second moments of the log-likelihood's gradient at a module's output: float64 ``[d, d]``.

    The Fisher information of the hidden states: next tokens are drawn from the model's own
    distribution, so to second order the mean KL divergence that an error e at one state causes,
    summed over all later tokens, is e F e^T / 2 nats.

    Args:
        lm: the model; one window at a time runs forward and, from the hook on, backward.
        windows: token ids ``[n, length]``, of the text that is trained on. Its rank is at most
            their number of tokens.
        hook: the module's path.
        drop_positions, max_norm_ratio: states that are left out, as in :func:`bae_fast.lm.harvest`.
        seed: the seed of the tokens that are drawn.

    Raises:
        ValueError: windows of another shape, no such module, or no state that is looked at.
        RuntimeError: the model finished without calling the module.
    """
    return _moments(
        lm, windows, hook, lambda g: g.T @ g, drop_positions, max_norm_ratio, seed, progress
    )


def _moments(
    lm: LanguageModel,
    windows: Tensor,
    hook: str,
    summed: Callable[[Tensor], Tensor],
    drop_positions: int,
    max_norm_ratio: float | None,
    seed: int,
    progress: bool,
) -> Tensor:
    """Mean over states of what ``summed`` makes of gradients ``[n, d]`` in float64."""
    if windows.dim() != 2 or not windows.numel() or windows.shape[1] <= drop_positions:
        raise ValueError(
            f"windows must be [n, length], length above drop_positions={drop_positions}; "
            f"got {list(windows.shape)}"
        )
    module = find_module(lm.model, hook)
    found: list[Tensor] = []

    def leaf(_module: Any, _arguments: Any, output: Any) -> Any:
        state = first_part(output).detach().requires_grad_()
        found.append(state)
        # some models add to a module's output in its place (Falcon's MLP), which no leaf allows
        return with_first_part(output, state.clone())

    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    n_states = 0
    handle = module.register_forward_hook(leaf)
    try:
        with (
            running(lm.model),
            in_own_dtype(lm.device),
            frozen(lm.model),
            torch.enable_grad(),
            progress_bar(
                windows.numel(), what="gradients at the hook", unit="tok", show=progress
            ) as bar,
        ):
            for window in windows:
                found.clear()
                out = lm.model(input_ids=window[None].to(lm.device), use_cache=False)
                if not found:
                    raise RuntimeError(f"the model finished without calling {hook}")
                logits = (out[0] if isinstance(out, tuple) else out.logits)[0].float()
                log_p = logits.log_softmax(-1)
                # on the CPU, so that every device draws the same
                with torch.no_grad():
                    drawn = torch.multinomial(log_p.exp().cpu(), 1, generator=generator)
                chosen = log_p.gather(1, drawn.to(log_p.device)).sum()
                (gradient,) = torch.autograd.grad(chosen, found[0])
                state = found[0].detach().flatten(0, -2).float()
                norms = torch.linalg.vector_norm(state, dim=-1)
                keep = torch.arange(len(norms), device=norms.device) >= drop_positions
                if max_norm_ratio is not None:
                    keep &= norms <= max_norm_ratio * norms.median()
                part = summed(gradient.flatten(0, -2)[keep].double()).cpu()
                total = part if total is None else total + part
                n_states += int(keep.sum())
                bar.update(len(window))
    finally:
        handle.remove()
    if total is None or n_states == 0:
        raise ValueError("windows must hold a state that is looked at; all were left out")
    return total / n_states
