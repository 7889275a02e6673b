"""The end of training inside the language model: a short tail whose loss has the next token in it.

After the ordinary training on rows, a few hundred steps more minimise

    ordinary loss + s (c KL - mse),    c = mse / KL, without gradient

KL is KL(p | q) in nats, mean over tokens of some windows of the text that is trained on, with p the
next-token distribution of the model as it is and q that of the model with the autoencoder's
reconstruction in its states' place. So a share s of the squared error gives its place to the
divergence, scaled in every step to the error's size, as in Karvonen, arXiv 2503.17272. All other
terms keep their weights, and an error of the same size is worth as many bits as before. The rate is
not held by more than that: look at it beside the loss.

The ordinary part of the loss is that of the method's own objective, on batches of rows as before.
Which states are replaced, and which tokens count, is as in
:class:`bae_fast.causal.SubstitutionTest`. The model is frozen. Its blocks below the module run
once a window, without gradient; only those above it are in the graph. Distributions over the
vocabulary exist for a block of tokens at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.causal.distributions import judged_text
from bae_fast.causal.splice import spliced
from bae_fast.lm.cache import MAX_NORM_RATIO, tokens_digest
from bae_fast.lm.hooks import frozen, in_own_dtype, resolve_hook, running
from bae_fast.lm.inputs import Padding
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.logits import Head
from bae_fast.lm.replay import LowerBlocks
from bae_fast.training import LoopConfig, Loss, Objective, Step
from bae_fast.training.config import check_bounds, check_integers

if TYPE_CHECKING:
    from typing_extensions import Self

# of a divergence that the error is divided by
_LEAST_KL = 1e-12


@dataclasses.dataclass(frozen=True)
class Tail:
    """The constants of a tail.

    Attributes:
        steps: optimizer steps.
        windows: windows of text a step.
        kl_share: s, the share of the squared error's place that the divergence takes.
        lr_scale: the learning rate over that of the ordinary training. It rises over the first
            tenth of the steps and falls to zero as a cosine.

    Raises:
        ValueError: a constant of another type or out of its range.
    """

    steps: int = 200
    windows: int = 1
    kl_share: float = 0.5
    lr_scale: float = 0.25

    def __post_init__(self) -> None:
        check_integers(self, {"steps": 1, "windows": 1})
        check_bounds(self, {"kl_share": (0.0, 1.0), "lr_scale": (0.0, math.inf)})
        if not self.lr_scale:
            raise ValueError(f"lr_scale must be positive; got {self.lr_scale}")


class InPlaceDivergence:
    """What a language model loses on windows of text, differentiable in the autoencoder."""

    def __init__(
        self,
        lm: LanguageModel,
        windows: Tensor,
        path: str,
        *,
        source: str | None = None,
        mask: Tensor | None = None,
        exclude_tokens: Iterable[int] | None = None,
        drop_positions: int = 1,
        max_norm_ratio: float | None = MAX_NORM_RATIO,
    ) -> None:
        """Find the tokens that count.

        Args:
            lm: the model.
            windows: token ids ``[n_windows, length]`` of the text that is trained on. Those without
                a token that counts are left out.
            path, source: the module whose output the autoencoder stands for, and for a transcoder
                the one that it reads; see :func:`bae_fast.causal.spliced`.
            mask, exclude_tokens, drop_positions, max_norm_ratio: see
                :class:`bae_fast.causal.SubstitutionTest`.

        Raises:
            TypeError: windows that are no integers.
            ValueError: no such module, windows or a mask of another shape, or no token of text with
                a known next one.
        """
        text = judged_text(
            lm, windows, mask=mask, exclude_tokens=exclude_tokens, drop_positions=drop_positions
        )
        compared = text.judged & text.has_next
        some = compared.any(1)
        self.lm, self.path, self.source = lm, resolve_hook(lm.model, path), source
        self.windows, self._compared = text.windows[some], compared[some]
        self._mask = None if text.mask is None else text.mask[some]
        self._replaced = {
            "drop_positions": drop_positions,
            "exclude_tokens": text.exclude_tokens,
            "max_norm_ratio": max_norm_ratio,
        }
        self._lower = LowerBlocks(lm.model, path, called_first=source)
        self._padding = Padding(lm.model)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def __call__(self, autoencoder: Autoencoder, chosen: Tensor) -> Tensor:
        """KL in nats, mean over the tokens that count: ``[]``, float32 or wider.

        The autoencoder stands in its place as it does when it is used, in evaluation mode.

        Args:
            autoencoder: any; gradients reach its parameters alone.
            chosen: int64 ``[n]``, numbers of windows.
        """
        lm = self.lm
        compared = self._compared[chosen].to(lm.device)
        inputs: dict[str, Any] = {
            "input_ids": self.windows[chosen].to(lm.device),
            "use_cache": False,
        }
        if self._mask is not None:  # before the passes: how a model is told is tried by some of its
            mask = self._mask[chosen].to(lm.device)
            inputs |= self._padding.arguments(inputs["input_ids"], mask)
        with (
            in_own_dtype(lm.device),
            running(lm.model),
            frozen(lm.model),
            running(autoencoder),
        ):
            with torch.no_grad(), self._lower.recorded():
                original = lm.body(**inputs).last_hidden_state[compared]
            with (
                self._lower.replayed(),
                spliced(
                    lm,
                    self.path,
                    autoencoder,
                    source=self.source,
                    may_replace_none=True,
                    **self._replaced,  # type: ignore[arg-type]
                ),
            ):
                changed = lm.body(**inputs).last_hidden_state[compared]
            found: Tensor = _MeanKL.apply(changed, original, lm.head)
        return found

    def settings(self) -> dict[str, Any]:
        """What the divergence is of, JSON values."""
        return {
            "model": self.lm.name,
            "revision": self.lm.revision,
            "path": self.path,
            "source": self.source,
            "windows": tokens_digest(self.windows),
            "tokens": tokens_digest(self._compared),
            **self._replaced,
        }


class _MeanKL(torch.autograd.Function):
    """Mean of KL(p | q) over tokens, from final states; a gradient for q's states alone.

    Of logits the gradient is softmax(q) - p over the number of tokens; the head's own derivative
    takes it to the states. Both are taken in the forward pass, so that no logits are kept.
    """

    @staticmethod
    def forward(ctx: Any, changed: Tensor, original: Tensor, head: Head) -> Tensor:
        step, n = head.rows_at_a_time, len(changed)
        total: Tensor | float = 0.0
        gradients = []
        for q, p in zip(changed.split(step), original.split(step), strict=True):
            with torch.enable_grad():
                states = q.detach().requires_grad_()
                logits = head(states)
            log_q, log_p = logits.detach().log_softmax(-1), head(p).log_softmax(-1)
            p_exp = log_p.exp()
            # two probabilities of zero are equal, one of zero is far away
            gap = log_p.sub_(log_q).nan_to_num_(nan=0.0, posinf=1e4, neginf=-1e4)
            total = total + torch.linalg.vecdot(p_exp, gap).sum(dtype=torch.float64)
            slopes = log_q.exp_().sub_(p_exp).div_(n)
            (gradient,) = torch.autograd.grad(logits, states, slopes)
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return (torch.as_tensor(total) / n).to(slopes.dtype).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(gradient.dtype), None, None


# -- for the trainer ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TailConfig(LoopConfig):
    """The constants of a tail's run, by which :class:`bae_fast.training.Trainer` trains it.

    Example::

        divergence = InPlaceDivergence(lm, windows, "model.layers.11")
        config = TailConfig.after(PRESETS["sparse"], divergence, Tail(steps=200))
        Trainer(bae, rows, config).fit()

    Attributes:
        ordinary: the constants of the objective that goes on.
        divergence: what the language model loses.
        tail: the tail's own constants.
    """

    ordinary: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    divergence: Any = None
    tail: Tail = dataclasses.field(default_factory=Tail)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.divergence, InPlaceDivergence):
            raise TypeError(
                "divergence must be an InPlaceDivergence; got "
                f"{type(self.divergence).__name__}: TailConfig.after makes these constants"
            )
        if self.tail.windows > len(self.divergence):
            raise ValueError(
                f"windows must be at most {len(self.divergence)}, the number of windows with text; "
                f"got {self.tail.windows}"
            )

    @classmethod
    def after(
        cls, constants: LoopConfig, divergence: InPlaceDivergence, tail: Tail | None = None
    ) -> Self:
        """The constants of a tail after a training with others.

        Args:
            constants: those of the ordinary training, of any method. Rows a step, Adam's rates and
                the weights of all terms stay; the start, the revival and the refit are past.
            divergence: of windows that are trained on.
            tail: None: the defaults.

        Raises:
            TypeError, ValueError: a constant that does not fit.
        """
        tail = Tail() if tail is None else tail
        loop = {
            field.name: getattr(constants, field.name) for field in dataclasses.fields(LoopConfig)
        }
        loop |= {
            "steps": tail.steps,
            "lr": constants.lr * tail.lr_scale,
            "warmup_steps": tail.steps // 10,
            "decay_from": 0.1,
            "cuda_graph": False,
        }
        return cls(**loop, ordinary=constants.going_on(), divergence=divergence, tail=tail)

    def for_sizes(self, d_in: int, d_sae: int) -> Self:
        return dataclasses.replace(self, ordinary=self.ordinary.for_sizes(d_in, d_sae))

    def objective(self, model: Autoencoder) -> TailObjective:
        """:class:`TailObjective`."""
        return TailObjective(model, self)

    def settings(self) -> dict[str, Any]:
        loop = LoopConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(LoopConfig)}
        )
        return {
            **loop.settings(),
            "ordinary": self.ordinary.settings(),
            "divergence": self.divergence.settings(),
            "tail": dataclasses.asdict(self.tail),
        }


class TailObjective(Objective):
    """A method's own objective, in which the next token takes the place of a share of the error."""

    def __init__(self, model: Autoencoder, config: TailConfig) -> None:
        """Make the method's own objective.

        Raises:
            TypeError, ValueError: see there.
        """
        self.model, self.config = model, config
        self.ordinary = config.ordinary.objective(model)
        self.n_columns = self.ordinary.n_columns

    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        """The ordinary loss with a share of its ``mse`` part replaced, see the module."""
        config = self.config
        past_all = Step(config.ordinary.steps + step.number, 1.0, step.dead)
        found = self.ordinary.loss(x, target, past_all)
        mse = found.parts["mse"]
        kl = config.divergence(self.model, self._windows(step.number)).to(mse)
        scale = (mse / kl.clamp_min(_LEAST_KL)).detach()
        total = found.total + config.tail.kl_share * (scale * kl - mse)
        parts = {**found.parts, "kl_bits": kl.detach() / math.log(2)}
        return Loss(total, parts, found.counts)

    def _windows(self, number: int) -> Tensor:
        """Numbers of the windows of a step: all of them in a random order, then in another."""
        each, n = self.config.tail.windows, len(self.config.divergence)
        places = range(number * each, (number + 1) * each)
        return torch.stack(
            [_order(n, self.config.seed + place // n)[place % n] for place in places]
        )

    def look(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.ordinary.look(x)

    def before_update(self) -> None:
        self.ordinary.before_update()

    def after_update(
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        self.ordinary.after_update(x, optimizer, step, generator)

    @property
    def finishes(self) -> bool:
        return self.ordinary.finishes

    def finish(self, rows: Tensor) -> None:
        self.ordinary.finish(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.ordinary.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ordinary.load_state_dict(state)


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
