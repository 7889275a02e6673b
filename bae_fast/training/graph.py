"""A training step captured once as a CUDA graph, and started again by one call of the host.

Where rows and features are few, a kernel ends before the host has started the next one. A graph
starts all of a step at once. It replays the same work on the same memory: inputs are copied into
buffers, and what Python computed while it was captured stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.devices import current

# calls of a step before it is captured: kernels are compiled, the optimizer's state and the
# libraries' workspaces are made
WARM_CALLS = 3

Replay = Callable[[], None]


class Graphs(Protocol):
    """How a step is captured; :class:`CudaGraphs` on a device."""

    def check(self, device: torch.device) -> None:
        """Raise ValueError where tensors on the device cannot be captured."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Where the calls before the capture run."""

    def capture(self, run: Callable[[], None]) -> Replay:
        """Record what ``run`` does, once, without doing it; the result does it."""


class CudaGraphs:
    """CUDA graphs of torch, on the current device. Not run on a device."""

    def __init__(self) -> None:
        # by device: torch's own stream for captures is of the device that was current when it was
        # first asked for, and a capture there would hold nothing of another device
        self._streams: dict[int, torch.cuda.Stream] = {}

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"optimizer must hold parameters on a CUDA device; got {device}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own: what is made on the default one cannot be captured."""
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            yield
        here.wait_stream(side)

    def capture(self, run: Callable[[], None]) -> Replay:
        here = torch.cuda.current_device()
        if here not in self._streams:
            self._streams[here] = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # "global", the default, would refuse what other threads do meanwhile, as a language model
        # that runs ahead for the next rows does when it takes memory
        with torch.cuda.graph(graph, stream=self._streams[here], capture_error_mode="thread_local"):
            run()
        replay: Replay = graph.replay
        return replay


class CapturedStep:
    """Forward, backward and the optimizer's step of one loss, replayed from a CUDA graph.

    ``step = CapturedStep(loss_of, optimizer)``, then ``loss = step(x)`` for every batch. The first
    calls run the step as it is written, on the batch that they are given; the next captures it.
    So the parameters are those that the same calls without a graph would give.

    Learning rates may change between calls, by a scheduler or by setting ``group["lr"]``: they are
    kept in tensors. Everything else that is not a tensor is fixed by the capture, and whatever
    the optimizer's groups hold besides is checked. ``p.grad`` holds the gradients of the last call.

    With ``update=False`` the optimizer's step is the caller's, who may look at the gradients first,
    change them in place or leave it out.

    Attributes:
        captured: whether the step is replayed from now on.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor | tuple[Tensor, ...]],
        optimizer: torch.optim.Optimizer,
        *,
        warm_calls: int = WARM_CALLS,
        update: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        """Prepare a step; nothing runs yet.

        Args:
            loss_of: gives the loss ``[]`` of a batch's tensors, or a tuple of tensors whose first
                is the loss; autocast belongs inside. It may not wait for the device, and draws no
                shape from a tensor's values: the operators of the GPU backends do neither.
            optimizer: updates all parameters; ``capturable=True`` where its class knows that and
                ``update`` is set.
            warm_calls: calls that run without a graph, at least 1.
            update: whether the optimizer's step is part of it.
            graphs: how a step is captured; None: by CUDA graphs.

        Raises:
            ValueError: warm_calls below 1, an optimizer that cannot be captured or has an empty
                group, or parameters on no CUDA device or on several.
        """
        check_int("warm_calls", warm_calls, 1)
        self._graphs = CudaGraphs() if graphs is None else graphs
        for at, group in enumerate(optimizer.param_groups):
            if not group["params"]:
                raise ValueError(f"optimizer must hold parameters in every group; got none in {at}")
            for parameter in group["params"]:
                self._graphs.check(parameter.device)
            if update and not group.get("capturable", True):
                raise ValueError(
                    f"optimizer must be capturable: {type(optimizer).__name__}(..., "
                    "capturable=True); got capturable=False"
                )
        devices = sorted(
            {str(p.device) for group in optimizer.param_groups for p in group["params"]}
        )
        if len(devices) > 1:
            raise ValueError(
                f"optimizer must hold parameters on one device; got {', '.join(devices)}"
            )
        self._device = torch.device(devices[0])
        self._loss_of, self._optimizer, self._warm_calls = loss_of, optimizer, warm_calls
        self._update = update
        self._rates = [self._rate(group) for group in optimizer.param_groups if update]
        self._constants: list[dict[str, Any]] = []  # at the capture
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._gradients: list[tuple[Tensor, Tensor | None]] = []  # where the graph writes them
        self._single = True
        self._replay: Replay | None = None

    @staticmethod
    def _rate(group: dict[str, Any]) -> Tensor:
        """The group's learning rate as a tensor that stays."""
        device = group["params"][0].device
        rate = torch.zeros((), dtype=torch.float32, device=device)
        rate.copy_(torch.as_tensor(group["lr"]))
        group["lr"] = rate
        return rate

    def _other_constants(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in self._optimizer.param_groups
        ]

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Make one step with a batch's tensors; returns copies of what ``loss_of`` gave, detached.

        Raises:
            TypeError: an input is no tensor.
            ValueError: other shapes, dtypes or devices than at the first call, or constants of
                the optimizer that changed after the capture.
        """
        self._set_inputs(inputs)
        if self._update:
            self._set_rates()
        # a capture records one stream, of the current device: on another one the step would run
        # at once, and the graph would be empty
        with current(self._device):
            return self._step()

    def _step(self) -> Tensor | tuple[Tensor, ...]:
        if self._replay is not None:
            self._replay()
            for parameter, gradient in self._gradients:  # whatever became of p.grad
                parameter.grad = gradient
        elif self._warm_calls > 0:
            self._warm_calls -= 1
            with self._graphs.aside():
                self._run()
        else:
            self._constants = self._other_constants()
            self._replay = self._graphs.capture(self._run)
            self._gradients = [
                (parameter, parameter.grad)
                for group in self._optimizer.param_groups
                for parameter in group["params"]
            ]
            self._replay()
        found = tuple(output.clone() for output in self._outputs)
        return found[0] if self._single else found

    def _run(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        given = self._loss_of(*self._inputs)
        self._single = isinstance(given, Tensor)
        outputs: Sequence[Tensor] = [given] if isinstance(given, Tensor) else given
        outputs[0].backward()
        if self._update:
            self._optimizer.step()
        self._outputs = tuple(output.detach() for output in outputs)

    def _set_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        for at, given in enumerate(inputs):
            if not isinstance(given, Tensor):
                raise TypeError(f"input {at} must be a tensor; got {type(given).__name__}")
        if not self._inputs:
            self._inputs = [given.detach().clone() for given in inputs]
            return
        kinds = [_kind(given) for given in inputs]
        wanted = [_kind(own) for own in self._inputs]
        if kinds != wanted:
            raise ValueError(
                f"inputs must be as at the first call, {', '.join(wanted)}; got {', '.join(kinds)}"
            )
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given.detach(), non_blocking=True)

    def _set_rates(self) -> None:
        """Put learning rates that were set since the last call where the graph reads them."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        if not self.captured:
            return
        now = self._other_constants()
        if now != self._constants:
            changed = sorted(
                {
                    key
                    for before, after in zip(self._constants, now, strict=True)
                    for key in before.keys() | after.keys()
                    if before.get(key) != after.get(key)
                }
            )
            raise ValueError(
                f"optimizer must keep {', '.join(changed)} after the step was captured; got "
                f"{', '.join(repr([group.get(key) for group in now]) for key in changed)}"
            )


def _kind(tensor: Tensor) -> str:
    """Shape, dtype and device as one word."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)} on {tensor.device}"
