"""One module that learns from batches: its objective, optimizer, learning rate and dead features.

Who draws the batches, logs and keeps checkpoints is the trainer's business
(:mod:`bae_fast.training.trainer`, :mod:`bae_fast.training.jobs`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
from bae_fast.autoencoder import Autoencoder
from bae_fast.devices import has_bfloat16, without_autocast
from bae_fast.distributed import Mesh
from bae_fast.statistics import entropy_bits
from bae_fast.training.config import LEFT_OUT_WHERE_OFF, LoopConfig
from bae_fast.training.feature_shards import FEATURE_DIM
from bae_fast.training.graph import CapturedStep, Graphs
from bae_fast.training.objective import Capturable, Loss, Step
from bae_fast.training.sharded_adam import WIDTH_DIM, ShardedAdam
from bae_fast.training.supply import differences

# steps without a one after which the log counts a column as dead
DEAD_WINDOW = 200

# how far the size of rows that are not normalised may be from 1
_FAR = 4.0

# raw rows drawn at random, given their number and the generator of the draw
Draw = Callable[[int, torch.Generator], Tensor]

Config = TypeVar("Config", bound=LoopConfig)


class Summary(NamedTuple):
    """Numbers of a step that processes add up: each adds its part.

    Attributes:
        squares: sum of the squares of the gradients; not finite where a gradient is not.
        mse, l0, dead: see :meth:`Learner.result`.
    """

    squares: Tensor
    mse: Tensor
    l0: Tensor
    dead: Tensor


class Learner(Generic[Config]):
    """Trains one module on batches that it is given.

    Gradients are switched on inside, whatever the caller's setting. A module of float16 or
    bfloat16 parameters is trained as a float32 copy, whose rounded values the module gets after
    every step: steps of Adam would be lost in the rounding of half precision.

    Attributes:
        model: the caller's module, or this rank's part of it.
        config: the constants, for the sizes of the whole module.
        trained: the module whose parameters the optimizer changes: a float32 copy, or the same.
        objective: what is minimised.
        step: steps done.
        optimized: names of the optimizer's parameters, in its order.
        bfloat16: whether products are made in bfloat16.
        uncaptured: why steps are not replayed from a CUDA graph, or None where they are.
    """

    def __init__(
        self,
        model: Autoencoder,
        config: Config,
        draw: Draw,
        *,
        generator: torch.Generator | None = None,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
        graphs: Graphs | None = None,
        capture_update: bool = True,
        shard_optimizer: bool = False,
    ) -> None:
        """Prepare the start of the features and the optimizer.

        Args:
            model: what the configuration's objective can train, on its device.
            config: the constants.
            draw: gives raw rows for the start.
            generator: draws for start and revival; None: one made from ``config.seed``.
            mesh: the processes; the module is this rank's part of the features.
            micro_batches: parts that a batch of this process is computed in.
            graphs: how a step is captured where the configuration asks for it; None: it is not.
            capture_update: whether the optimizer's step is captured too; else only the gradients.
            shard_optimizer: divide Adam's moments among the processes along "data".

        Raises:
            TypeError, ValueError: see :class:`bae_fast.training.Trainer`.
        """
        if not isinstance(config, LoopConfig):
            raise TypeError(
                f"config must be a TrainingConfig or a SparseConfig; got {type(config).__name__}"
            )
        if isinstance(model, Autoencoder):  # the objective refuses what is none
            features = model.d_sae * (1 if mesh is None else mesh.feature)
            config = config.for_sizes(model.d_in, features)
        with learning():
            self.model, self.config, self.mesh = model, config, mesh
            narrow = any(p.element_size() < 4 for p in model.parameters())
            self.trained = copy.deepcopy(model).float() if narrow else model
            self.objective = config.objective(self.trained)
            if mesh is not None or micro_batches > 1:
                self.objective.spread(mesh, micro_batches)
            _check_parameters(model)
            first = next(self.trained.parameters())
            self.device, self.dtype = first.device, first.dtype
            self.step = 0
            self.generator = generator or torch.Generator().manual_seed(config.seed)
            self.last_fired = torch.zeros(
                self.objective.n_columns, dtype=torch.int64, device=self.device
            )
            self.bfloat16 = config.precision == "bfloat16" or (
                config.precision == "auto"
                and has_bfloat16(self.device)
                and self.dtype == torch.float32
            )
            self._draw = draw
            self._before: dict[str, Tensor] = {}
            self._graphs, self._capture_update = graphs, capture_update
            self._alone = mesh is None and micro_batches == 1
            self.uncaptured = self._against_capture()
            if config.cuda_graph and self.uncaptured is not None:
                warnings.warn(f"cuda_graph has no effect: {self.uncaptured}", stacklevel=3)
            self._captured: CapturedStep | None = None
            self._constants: tuple[float, ...] = ()
            self._names: tuple[str, ...] = ()
            # the processes that moments are divided among
            self._moments = mesh if shard_optimizer and mesh and mesh.data > 1 else None

    def _against_capture(self) -> str | None:
        config, objective = self.config, self.objective
        if not config.cuda_graph:
            return "cuda_graph is False"
        if self._graphs is None:
            return "no way to capture a step was given"
        if not self._alone:
            return "micro_batches must be 1, and one process alone learn"
        try:
            self._graphs.check(self.device)
        except ValueError as error:
            return str(error)
        if config.clip_norm and self._capture_update:
            return f"clip_norm must be 0: the host compares norms; got {config.clip_norm}"
        if not isinstance(objective, Capturable):
            return f"{type(objective).__name__} has numbers of the host in every step"
        return objective.against_capture(torch.bfloat16 if self.bfloat16 else self.dtype)

    @property
    def _captures_update(self) -> bool:
        return self.uncaptured is None and self._capture_update

    def start(self) -> None:
        """Start the features and make the optimizer."""
        config = self.config
        # features that have learned stay, in case a state of them is loaded: see _check_start
        self._kept = self.objective.starts and self.model.learned
        with learning():
            if not self._kept:
                self.objective.start(lambda n: self._draw(n, self.generator), self.generator)
            decoder = [p for n, p in self.trained.named_parameters() if n == "W_dec"]
            rest = [
                p for n, p in self.trained.named_parameters() if n != "W_dec" and p.requires_grad
            ]
            names = [n for n, p in self.trained.named_parameters() if p.requires_grad]
            self.optimized = [n for n in names if n != "W_dec"]
            self.optimized += ["W_dec"] * len(decoder)
            groups = [
                {"params": rest, "scale": 1.0},
                {"params": decoder, "scale": config.decoder_lr_scale},
            ]
            groups = [group for group in groups if group["params"]]
            options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
            if self._moments is None:
                self.optimizer = torch.optim.Adam(
                    groups,
                    fused=self.device.type in ("cpu", "cuda"),
                    capturable=self._captures_update,
                    **options,
                )
            else:
                by_parameter = {p: n for n, p in self.trained.named_parameters()}
                self.optimizer = ShardedAdam(groups, by_parameter, self._moments, **options)
            self.publish()

    def dims(self, path: tuple[str, ...]) -> tuple[int | None, int | None]:
        """Dimensions in which processes along "data" and "feature" have parts of a tensor.

        Args:
            path: the tensor's place in :meth:`live_state`.

        Returns:
            For either axis the dimension, or None where all of its processes have the same.
        """
        if path[0] == "model":
            return None, FEATURE_DIM.get(path[1])
        if path[0] == "optimizer":
            if path[-1] == "step":
                return None, None
            name = self.optimized[int(path[2])]
            width = WIDTH_DIM.get(name) if self._moments is not None else None
            return width, FEATURE_DIM.get(name)
        own = path == ("last_fired",) or path == ("objective", "fired")
        return None, 0 if own or path[-1] == "counts" else None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the caller's module the values of its float32 copy, where there is one."""
        if self.trained is not self.model:
            own = self.model.state_dict()
            for name, value in self.trained.state_dict().items():
                own[name].copy_(value)

    def train(self, mode: bool) -> None:
        """Set both modules to training or to evaluation."""
        self.model.train(mode)
        self.trained.train(mode)

    # -- one step ------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """A linear rise over the warm-up, constant, then a cosine to zero."""
        config = self.config
        done, start = step / config.steps, config.decay_from
        rate = config.lr
        if config.warmup_steps:
            rate *= min((step + 1) / config.warmup_steps, 1.0)
        if done < start or start == 1:  # constant until the end, and after it
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * (done - start) / (1 - start)))

    def as_input(self, batch: Tensor) -> Tensor:
        """A batch on the module's device, in the dtype that a forward pass takes."""
        batch = batch.to(self.device)
        return batch if self.bfloat16 else batch.to(self.dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where products are bfloat16."""
        if self.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def make(self, x: Tensor, target: Tensor | None) -> Loss:
        """One step of one process: gradients, their limit, the optimizer's step, what follows."""
        if self._capture_update:
            replayed = self._replayed_or_given_up(x, target)
            if replayed is not None:
                self._updated(x, replayed)
                return replayed
        loss = self.backward(x, target)
        if self.config.clip_norm:
            self.clip(float(self.summary(loss).squares))
        self.update(x, loss)
        return loss

    def _replayed_or_given_up(self, x: Tensor, target: Tensor | None) -> Loss | None:
        """What a captured step gives; None where steps are not captured.

        A capture that fails is given up with a warning, and steps run as they are from then on.
        """
        if self.uncaptured is not None:
            return None
        try:
            return self._replayed(x, target)
        except RuntimeError as error:
            if self._captured is not None and self._captured.captured:
                raise
            self._give_up(error)
            return None

    def _give_up(self, error: RuntimeError) -> None:
        said = str(error).splitlines()
        self.uncaptured = f"the step cannot be captured: {said[0] if said else 'no reason is said'}"
        warnings.warn(f"cuda_graph has no effect: {self.uncaptured}", stacklevel=5)
        self._captured = None

    def _replayed(self, x: Tensor, target: Tensor | None) -> Loss:
        """Gradients, and the optimizer's step with them where it is captured too."""
        objective = self.objective
        assert isinstance(objective, Capturable)
        self._set_rates()
        constants = objective.constants(self.step)
        if self._captured is None or constants != self._constants:
            self._constants, self._captured = constants, None

            def loss_of(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
                n_targets = int(self.model.is_transcoder)
                goal = others[0] if n_targets else None
                with self.autocast():
                    loss = objective.loss_given(x, goal, others[n_targets:], constants)
                self._names = tuple(loss.parts)
                return (loss.total, loss.counts, *loss.parts.values())

            self._captured = CapturedStep(
                loss_of, self.optimizer, update=self._capture_update, graphs=self._graphs
            )
        others = () if target is None else (target,)
        total, counts, *parts = self._captured(x, *others, *objective.given())
        loss = Loss(total, dict(zip(self._names, parts, strict=True)), counts)
        objective.count(loss, len(x))
        return loss

    def _check_start(self) -> None:
        """Refuse to start features anew that were trained or loaded, in place of losing them.

        Raises:
            ValueError: such a module, a configuration that has a start, and no state loaded.
        """
        if self._kept:
            raise ValueError(
                "model must not have learned before a run that starts its features anew: "
                "TrainingConfig(init='none') goes on from them, model.reset_parameters() gives "
                "them up"
            )

    def _hint(self, x: Tensor) -> None:
        """Say of the first batch where it is far from what constants and thresholds are meant for.

        Rows of a Binary Autoencoder that were not normalised are no fault that its own hint sees:
        the start gives every feature the density that is meant.
        """
        if self.step or x.device.type != "cpu" or self.model.is_normalized():
            return  # a device would be waited for
        rows = x[x.isfinite().all(1)].float()  # others are named where they are met
        if not len(rows):
            return
        size = float(rows.square().mean().sqrt())
        common = float(rows.mean(0).square().mean().sqrt())
        if 1 / _FAR <= size <= _FAR and common <= size / 2:
            return
        warnings.warn(
            f"rows have a root mean square of {size:.3g}, and their mean row one of {common:.3g}, "
            "where 1 and 0 are meant: call fit_normalization_(rows) before training",
            stacklevel=4,
        )

    def _set_rates(self) -> None:
        self._check_start()
        lr = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

    def backward(self, x: Tensor, target: Tensor | None) -> Loss:
        """The loss of a batch, after its gradients have been computed and added over "data"."""
        if not self._capture_update:
            replayed = self._replayed_or_given_up(x, target)
            if replayed is not None:
                return replayed
        config = self.config
        self._set_rates()
        self._hint(x)
        at = Step(self.step, self.step / config.steps, self.is_dead(DEAD_WINDOW))
        self.optimizer.zero_grad(set_to_none=True)
        if not self._capture_update:  # a step that may be left out, see skip
            self._before = {n: b.clone() for n, b in self.trained.named_buffers()}
        loss = self.objective.backward(x, target, at, self.autocast)
        if self.mesh is not None and self.mesh.data > 1:
            for name, parameter in self.trained.named_parameters():
                if parameter.grad is not None:
                    self.mesh.sum_(parameter.grad, "data", f"gradient of {name}")
        return loss

    @torch.no_grad()
    def summary(self, loss: Loss) -> Summary:
        """This process's part of what is logged of a step, and of its gradients' squares."""
        mesh = self.mesh
        data, feature = (1, 1) if mesh is None else (mesh.data, mesh.feature)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.trained.named_parameters():
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
                # b_dec is the same on every rank along feature, and all are along data
                squares += norm.square() / (data * (feature if name == "b_dec" else 1))
        columns = self.is_dead(min(DEAD_WINDOW, self.step + 1), loss.counts)
        return Summary(
            squares,
            loss.parts["mse"].double() / feature,
            loss.counts.sum().double() / (self.config.batch_size * data),
            columns.double().mean() / (data * feature),
        )

    def clip(self, squares: float) -> None:
        """Shorten the gradients where their norm, over all processes, is beyond the limit."""
        limit = self.config.clip_norm
        if limit and squares > limit**2:
            for parameter in self.trained.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / math.sqrt(squares))

    def update(self, x: Tensor, loss: Loss) -> None:
        """The optimizer's step and what belongs to it."""
        self.objective.before_update()
        self.optimizer.step()
        self._updated(x, loss)

    def _updated(self, x: Tensor, loss: Loss) -> None:
        """What follows the optimizer's step."""
        self.step += 1
        self.model.learned = True
        self.objective.after_update(x, self.optimizer, self.step, self.generator)
        self.last_fired.masked_fill_(loss.counts > 0, self.step)
        self.publish()

    def is_finite(self) -> bool:
        """Whether all parameters are: a step whose loss was finite may leave others."""
        return all(all_finite(parameter) for parameter in self.trained.parameters())

    def skip(self) -> None:
        """Count a step whose gradients are not finite, and leave the module as it is."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.trained.named_buffers():
                if name in self._before:
                    buffer.copy_(self._before[name])
        self.objective.forget()
        self.step += 1

    def result(self, loss: Loss, n_rows: int) -> dict[str, Tensor]:
        """The parts of the loss of a step that was made, L0 and the share of dead columns."""
        found = {name: value.detach() for name, value in loss.parts.items()}
        found["l0"] = loss.counts.sum().float() / n_rows
        found["dead_share"] = self.is_dead(min(DEAD_WINDOW, self.step)).double().mean()
        return found

    @torch.no_grad()
    def heldout(self, blocks: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
        """What the log shows of held-out rows; the same on every process, each of which sees all.

        Args:
            blocks: raw rows and targets ``[n, d]``.

        Returns:
            ``heldout_fvu``, ``heldout_entropy_bits`` where the objective has a code of bits, and
            ``heldout_score``, which early stopping compares: the FVU plus a_e times the entropy.

        Raises:
            ValueError: no held-out rows.
        """
        n = 0
        error = squares = torch.zeros((), dtype=torch.float64)
        shift: Tensor | None = None
        sums, counts = torch.zeros(0), None
        for x, target in blocks:
            goal = (x if target is None else target).to(self.device).double()
            with self.autocast():
                recon, ones = self.objective.look(self.as_input(x))
            if shift is None:
                shift = goal.mean(0)  # so that the variance is no difference of large numbers
                sums = torch.zeros_like(shift)
            error = error + (recon.double() - goal).square().sum().cpu()
            sums += (goal - shift).sum(0)
            squares = squares + (goal - shift).square().sum().cpu()
            counts = ones if counts is None or ones is None else counts + ones
            n += len(x)
        if not n:
            raise ValueError("evaluate_every must be 0 for a supply without held-out rows")
        variance = squares - (sums.square().sum() / n).cpu()
        found = {"heldout_fvu": float(error / variance)}
        if counts is not None:
            if self.mesh is not None:
                counts = self.mesh.gather(counts, "feature", "held-out counts")
            found["heldout_entropy_bits"] = float(
                entropy_bits(counts, torch.full_like(counts[:1].sum(), n))
            )
        weight = getattr(self.config, "entropy_weight", 0.0)
        found["heldout_score"] = found["heldout_fvu"] + weight * found.get(
            "heldout_entropy_bits", 0.0
        )
        return found

    def is_dead(self, window: int, counts: Tensor | None = None) -> Tensor:
        """Columns without a one in the last steps, bool ``[K]``.

        Args:
            window: steps.
            counts: the counts of a step that is not counted yet.
        """
        if counts is None:
            return self.step - self.last_fired >= window
        return (self.step + 1 - self.last_fired >= window) & (counts == 0)

    # -- resume --------------------------------------------------------------------------------

    def live_state(self) -> dict[str, Any]:
        """Everything needed to go on exactly, but the rows; not copied."""
        return {
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "step": self.step,
            "generator": self.generator.get_state(),
            "last_fired": self.last_fired,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`live_state`, of the same module and constants."""
        with learning():
            self.trained.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._captured = None  # it holds the memory of the state before
            for group in self.optimizer.param_groups:
                group["capturable"] = self._captures_update
            for parameter, own in self.optimizer.state.items():
                for name, value in own.items():
                    # the fused step reads both by the parameter's strides, which files do not keep
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        own[name] = torch.empty_like(parameter).copy_(value)
            self.objective.load_state_dict(state["objective"])
            self.step = state["step"]
            self.generator.set_state(state["generator"].cpu())
            self.last_fired = state["last_fired"].to(self.device, copy=True)
            self._kept = False
            self.model.learned = True
            self.objective.forget()
            self.publish()

    def identity(self) -> dict[str, Any]:
        """What a state fits: constants and module, JSON values."""
        config: Any = getattr(self.trained, "config", None)
        fields = vars(config) if hasattr(config, "__dict__") else {}
        return {
            "module": type(self.trained).__name__,
            # what the module itself computes by, such as the surrogate of its gradients
            **{
                f"module.{name}": value
                for name, value in fields.items()
                if name not in _NO_ARITHMETIC and isinstance(value, (int, float, str))
            },
            "parameters": {
                name: list(tensor.shape) for name, tensor in self.trained.state_dict().items()
            },
            **self.config.settings(),
        }


def _check_parameters(model: Autoencoder) -> None:
    parameters = dict(model.named_parameters())
    if any(p.is_inference() for p in parameters.values()):
        raise ValueError(
            "model must be made outside of torch.inference_mode(): its parameters cannot be "
            "trained; got inference tensors"
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "model must have a parameter that requires a gradient (model.requires_grad_(True)); "
            f"got none of {len(parameters)}"
        )


def check_same_run(
    what: str, same: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], always: Iterable[str]
) -> None:
    """Refuse a state of another run; warn where it is too old to tell.

    A constant that came into :meth:`Learner.identity` after the state was written cannot be
    compared: the state has no word of it.

    Args:
        what, same: of the error: what must be of a run with the same what.
        theirs, ours: the identities, that of a job with its name before each key.
        always: keys that every state has had.

    Raises:
        ValueError: a key of both that differs, one that only the state has, or one of ``always``
            that only the run has.
    """
    off = {
        key: LEFT_OUT_WHERE_OFF[name]
        for key in {**theirs, **ours}
        if (name := key.rpartition(".")[2]) in LEFT_OUT_WHERE_OFF
    }
    theirs, ours = {**off, **theirs}, {**off, **ours}
    unchecked = sorted(ours.keys() - theirs.keys() - set(always))
    differing = differences({**theirs, **{key: ours[key] for key in unchecked}}, ours)
    if differing:
        raise ValueError(
            f"{what} must be of a run with the same {same}; it is of one with {differing}"
        )
    if unchecked:
        warnings.warn(
            f"{what} is older than some constants, which are taken to be the run's: "
            f"{', '.join(f'{key} {ours[key]!r}' for key in unchecked)}",
            stacklevel=3,
        )


# of a module's configuration: what changes no value of a step, and sizes, which its parameters have
_NO_ARITHMETIC = frozenset({"covariance", "d_in", "d_out", "d_sae", "metadata", "preset"})


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller's setting.

    The precision of products is a constant of the training.
    """
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


def check_finite(name: str, rows: Tensor, numbers: Tensor) -> None:
    """Refuse NaN and Inf; ``numbers`` are those of the rows among all."""
    if not all_finite(rows):
        row = int(numbers[int((~rows.isfinite()).any(1).int().argmax())])
        raise ValueError(f"{name} must be finite; got NaN or Inf in row {row}")
