"""Adam whose moments are divided among the processes along "data" (stage 1 of ZeRO).

Parameters and gradients are whole on every process. Each updates its rows or columns of every
matrix, for which alone it has moments, and sends them to the others.

torch's ZeroRedundancyOptimizer divides a list of parameters, of which two are large here: no more
than two processes would have any. Here every matrix is cut along the width of the rows, so that
this division and that of the features do not meet. A step is Adam's own, number by number.

Source: Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from bae_fast.distributed import Mesh

# dimension of a parameter along which its moments are divided; all others' are whole everywhere
WIDTH_DIM = {"W_enc": 0, "W_dec": 1}


class ShardedAdam(torch.optim.Adam):
    """:class:`torch.optim.Adam`, fused, with this process's part of the moments.

    ``state`` is by parameter as that of Adam, with moments of the parameter's shape but in the
    dimension of :data:`WIDTH_DIM`, which has this process's part. :meth:`step` is a collective.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: dict[nn.Parameter, str],
        mesh: Mesh,
        **options: Any,
    ) -> None:
        """Take groups and options of Adam.

        Args:
            groups: parameters, the same on every process along "data".
            names: the names of the parameters.
            mesh: the processes.
            options: ``lr``, ``betas``, ``eps``.

        Raises:
            ValueError: rows whose width is no multiple of the processes along "data".
        """
        super().__init__(groups, fused=True, **options)
        self._mesh = mesh
        self._dims: dict[nn.Parameter, int] = {}
        for parameter, name in names.items():
            dim = WIDTH_DIM.get(name)
            if dim is None:
                continue
            if parameter.shape[dim] % mesh.data:
                raise ValueError(
                    f"shard_optimizer must be False where the width of the rows is no multiple of "
                    f"the {mesh.data} processes along data; got {name} of width "
                    f"{parameter.shape[dim]}"
                )
            self._dims[parameter] = dim

    def _own(self, tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor
        each = tensor.shape[dim] // self._mesh.data
        return tensor.narrow(dim, self._mesh.data_rank * each, each).contiguous()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of Adam on this process's parts, and the parts of all in the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                dim = self._dims.get(parameter)
                own, grad = self._own(parameter, dim), self._own(parameter.grad, dim)
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
                    state["exp_avg"] = torch.zeros_like(own)
                    state["exp_avg_sq"] = torch.zeros_like(own)
                adam(
                    [own], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                    lr=group["lr"], weight_decay=0.0, eps=group["eps"], maximize=False,
                )  # fmt: skip
                if dim is not None:
                    parameter.copy_(self._mesh.gather(own, "data", "weights", dim=dim))
