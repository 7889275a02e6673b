"""A language model's own logits: its body and its head, run apart from each other.

The body gives final states, the head makes logits of them. What a head does differs: a product
with the output embedding alone, a scale (Cohere, Granite), a soft cap (Gemma 2), a transform before
it (BERT's decoder), a bias. None of it is written again here: the model's own forward runs, with a
body that hands over the states it is given in the place of the real one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from bae_fast.lm.hooks import first_part, in_own_dtype, running
from bae_fast.lm.identity import own_hooks

# logits held at a time: 128 MiB in fp32; fewer tokens would read the output embedding too often
_BLOCK_ELEMENTS = 32 * 2**20


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside a compiled one or one with adapters of peft; else itself.

    Raises:
        ValueError: an adapter that lengthens the input, such as prompt tuning: its tokens have no
            place in the text.
    """
    inner: Any = getattr(model, "_orig_mod", model)  # torch.compile
    if hasattr(inner, "get_base_model"):  # peft: adapters are inside the layers of the base model
        active = getattr(inner, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise ValueError(
                "model must not have an adapter that adds tokens (prompt, prefix or p-tuning): "
                "their positions belong to no token of the text; merge it or leave it out"
            )
        inner = inner.get_base_model()
    return inner


def under_head(model: nn.Module) -> Any:
    """What a causal language model has under its head; itself where it names no such part."""
    inner = causal_model(model)
    found = getattr(inner, "base_model", inner)
    # Llama 4's text model has it under another name than its class says
    return getattr(inner, "model", inner) if found is inner else found


def body(model: nn.Module) -> Any:
    """The part of a causal language model that gives final states, adapters included.

    Raises:
        ValueError: a model whose body and head are not apart.
    """
    inner = causal_model(model)
    found = under_head(model)
    if found is inner or not isinstance(found, nn.Module):
        raise ValueError(
            f"model must be a causal language model of transformers with a body under its head; "
            f"got {type(inner).__name__}"
        )
    return found


@torch.no_grad()
def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that a causal language model ends with, or None where it ends with none.

    Told by a pass over one token: the module without parts whose output the final states are, and
    which is no product with a matrix. What hands on its input (dropout) is passed over.

    None too for a model whose body and head are not apart.
    """
    inside = under_head(model)
    if inside is causal_model(model) or not isinstance(inside, nn.Module):
        return None
    made: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        given = first_part(arguments)
        if not isinstance(output, Tensor) or not isinstance(given, Tensor):
            return
        if output.data_ptr() != given.data_ptr():
            made.append((module, output))

    # some norms have no weight (OLMo)
    norms = [
        module
        for module in inside.modules()
        if not list(module.children())
        and ((weight := getattr(module, "weight", None)) is None or weight.dim() == 1)
    ]
    device = next(inside.parameters()).device
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(inside))
        stack.enter_context(in_own_dtype(device))
        for module in norms:
            stack.callback(module.register_forward_hook(keep).remove)
        final = getattr(inside(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if final is None:
        return None
    for module, output in reversed(made):
        if output.numel() == final.numel() and output.data_ptr() == final.data_ptr():
            return module
    return None


class _States:
    """Stands for what a body returns: the states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __len__(self) -> int:
        return 1


class _Body(nn.Module):
    """Stands for a body, and for its decoder where the head calls that."""

    def __init__(self, states: Tensor, real: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_states=states, _real=real)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _States(self._states)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_real"], name)
        # embeddings may be tied to the head
        return self if isinstance(found, nn.Module) and list(found.children()) else found


class Head:
    """Makes logits of final states as the model itself does.

    Attributes:
        model: the causal language model.
        vocabulary: number of logits V.
    """

    def __init__(self, model: nn.Module) -> None:
        """Check against the model's own output, on four tokens, that its logits come out.

        Raises:
            ValueError: they do not: something between body and head is unknown here.
        """
        self.model = causal_model(model)
        self._body = body(model)
        self._name = next(n for n, m in self.model.named_modules() if m is self._body)
        device = next(self._body.parameters()).device
        table = self.model.get_input_embeddings().weight
        ids = torch.arange(1, 5, device=device)[None] % table.shape[0]
        with torch.no_grad(), running(self.model), in_own_dtype(device):
            whole = _wide(self.model(input_ids=ids, use_cache=False).logits[0])
            states = self._body(input_ids=ids, use_cache=False)
            final = getattr(states, "last_hidden_state", None)
            if final is None:
                raise ValueError(f"model: {type(self._body).__name__} gives no last_hidden_state")
            ours = self(final[0])
            shorter = self._body(input_ids=ids[:, :2], use_cache=False).last_hidden_state
        self.vocabulary = int(whole.shape[-1])
        share = 1e-4 if final.dtype == torch.float32 else 2e-2
        gap = (final[:, :2] - shorter).float().abs().max()
        # a hook that looks at positions, such as a splice at the last token, is no fault of the
        # model
        if not own_hooks(self.model) and not bool(gap <= share * final.float().abs().max()):
            raise ValueError(
                f"model must be causal: states of {type(self.model).__name__} depend on the tokens "
                "after them (is_decoder=True makes a decoder of some models)"
            )
        bound = share * float(whole.abs().max())
        if ours.shape != whole.shape or not bool(((ours - whole).abs() <= bound).all()):
            raise ValueError(
                f"model: the logits of {type(self.model).__name__} are not its head's of the last "
                "hidden state; it does something between the two that is unknown here"
            )

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[n, V]`` on the model's device of final states ``[n, d]``, which are
        differentiable in these: float32, or float64 for a model of float64."""
        real: Any = self._body
        states = states.to(next(real.parameters()).device)
        shell = object.__new__(type(self.model))
        shell.__dict__.update(vars(self.model))
        shell.__dict__.pop("forward", None)
        modules = {**self.model._modules, self._name: _Body(states[None], real)}
        shell.__dict__["_modules"] = modules
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        # not the shell's call: hooks of the whole model are for its whole forward
        with in_own_dtype(states.device):
            out = type(self.model).forward(shell, input_ids=ids, use_cache=False)
        return _wide((out[0] if isinstance(out, tuple) else out.logits)[0])

    @property
    def rows_at_a_time(self) -> int:
        """Tokens whose logits fit into a block of bounded size."""
        return max(_BLOCK_ELEMENTS // self.vocabulary, 1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
