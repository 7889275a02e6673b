"""The blocks of a language model below a module: run once, and their outputs given again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from bae_fast.lm.hooks import block_path, resolve_hook
from bae_fast.lm.inputs import text_config


class LowerBlocks:
    """The blocks that a pass has left before a module is called, and that module if it is one.

    A pass from the same tokens gives the same outputs there, so a second one that changes the
    module's output need not compute them. Where a model's blocks are not found by number nothing
    is kept, and the second pass computes everything.

    Example::

        lower = LowerBlocks(lm.model, "model.layers.11")
        with lower.recorded():
            before = lm.body(input_ids=ids, use_cache=False)
        with lower.replayed(), spliced(lm, "model.layers.11", bae):
            after = lm.body(input_ids=ids, use_cache=False)
    """

    def __init__(self, model: nn.Module, path: str, *, called_first: str | None = None) -> None:
        """Find the blocks.

        Args:
            model: the language model.
            path: the module whose output is changed.
            called_first: a module called before it that must run in the second pass too.

        Raises:
            ValueError: no such module.
        """
        self._end = model.get_submodule(resolve_hook(model, path))
        self._first = None
        if called_first is not None:
            self._first = model.get_submodule(resolve_hook(model, called_first))
        try:
            blocks = model.get_submodule(block_path(model, 0).rpartition(".")[0])
        except ValueError:
            blocks = nn.ModuleList()
        self._blocks = list(blocks.children())
        config = text_config(getattr(model, "config", None))
        if getattr(config, "num_kv_shared_layers", 0):  # later blocks read keys of these (Gemma 3n)
            self._blocks = []
        self._outputs: dict[nn.Module, Any] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the blocks give in the one pass of this block of code."""
        self._outputs.clear()
        passed = False

        def keep(block: nn.Module, _arguments: Any, output: Any) -> None:
            if not passed:
                self._outputs[block] = output

        def stop(*_: Any) -> None:
            nonlocal passed
            passed = True

        # in front of the user's hooks, which run again when the output is given again
        handles = [block.register_forward_hook(keep, prepend=True) for block in self._blocks]
        handles.append(self._end.register_forward_hook(stop))
        if self._first is not None:
            handles.append(self._first.register_forward_pre_hook(stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Blocks give what was kept and compute nothing; their hooks run."""
        with contextlib.ExitStack() as undo:
            for block, output in self._outputs.items():
                own = vars(block).get("forward")
                vars(block)["forward"] = _giving(output)
                undo.callback(_put_back, block, own)
            yield


def _giving(output: Any) -> Any:
    return lambda *_arguments, **_options: output


def _put_back(block: nn.Module, own: Any) -> None:
    """Take away a forward that stood before the class's own, or put back the one that stood there
    before."""
    del vars(block)["forward"]
    if own is not None:
        vars(block)["forward"] = own
