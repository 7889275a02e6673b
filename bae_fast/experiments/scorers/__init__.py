"""What ``compare`` judges beside the code itself: one file a kind of scorer.

A scorer is added as a file here with ``make(context)``, which gives the scorers that the
configuration asks for, and an order, ``ORDER``, among the columns of the table. Its options are
fields of :class:`bae_fast.experiments.compare.Config`, if it has any.
"""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from bae_fast.experiments.data import load_model
from bae_fast.progress import Stages

if TYPE_CHECKING:
    from bae_fast.causal import SubstitutionTest
    from bae_fast.lm import ActivationCache, LanguageModel

T = TypeVar("T")


class Column(NamedTuple):
    """One column of the table.

    Attributes:
        key: the key in a scorer's result; a value of None leaves the cell empty.
        header: its title.
        form: how a number is written, for str.format.
    """

    key: str
    header: str
    form: str


class Scorer(NamedTuple):
    """A further judge of trained models.

    Attributes:
        name: the name of its part of a run's ``scores``, and of its files.
        settings: all that its results depend on besides the run, JSON values only.
        score: (model, method, k, seed) to its results, JSON values only; the model is in eval
            mode.
        columns: what of it stands in the table.
    """

    name: str
    settings: dict[str, Any]
    score: Callable[[Any, str, int | None, int], dict[str, Any]]
    columns: Sequence[Column]


class Measure(NamedTuple):
    """What is measured of a model by whichever features it has on, so that one whose codes are
    searched for is measured as the encoder's.

    Attributes:
        settings: all that its results depend on besides the model, JSON values only.
        of: (model, method) to its results, JSON values only; the model is in eval mode.
        columns: what of it stands in the table.
    """

    settings: dict[str, Any]
    of: Callable[[Any, str], dict[str, Any]]
    columns: Sequence[Column]

    def scorer(self, name: str) -> Scorer:
        """The scorer of features as a model's own encoder gives them."""

        def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
            return self.of(model, method)

        return Scorer(name, self.settings, score, self.columns)


class Context:
    """What scorers may need: the configuration, the held-out text and the language model.

    Attributes:
        config: the experiment's configuration.
        cache: hidden states of ``config.hook`` and the tokens they belong to.
        train, heldout: row numbers of the cache that methods were trained on, and that they were
            not.
        tokenizer: the language model's tokenizer.
        transcoder_hooks: modules that a transcoder reads and writes.
        pair: rows of the transcoder, empty where there is none.
    """

    def __init__(
        self,
        config: Any,
        stages: Stages,
        cache: ActivationCache,
        tokenizer: Any,
        transcoder_hooks: Sequence[str],
        pair: dict[str, Tensor],
        hook_rows: Callable[[str], ActivationCache],
    ) -> None:
        self.config = config
        self.stages = stages
        self.cache = cache
        self.tokenizer = tokenizer
        split = cache.split(config.heldout_rows)
        self.train, self.heldout = split.train, split.heldout
        self.transcoder_hooks = transcoder_hooks
        self.pair = pair
        self._hook_rows = hook_rows
        self._lm: LanguageModel | None = None
        self._source: ActivationCache | None = None
        self._substitution: SubstitutionTest | None = None
        self._made: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def once(self, source: Any, name: str, make: Callable[[], T]) -> T:
        """What several scorers need of a model or of its rows, made when the first of them asks.

        Args:
            source: a model in eval mode, or hidden states; what was made of it is kept as long as
                it is.
            name: tells what is made apart from what else is made of the source.
            make: makes it.
        """
        made = self._made.setdefault(source, {})
        if name not in made:
            made[name] = make()
        found: T = made[name]
        return found

    def read_by(self, method: str) -> ActivationCache:
        """Hidden states of the module that a method reads, opened once."""
        if method != "transcoder":
            return self.cache
        if self._source is None:
            self._source = self._hook_rows(self.transcoder_hooks[0])
        return self._source

    def place(self, method: str) -> tuple[str, str | None]:
        """The module whose output a method's reconstruction stands for, and the one that it reads
        where that is another."""
        if method != "transcoder":
            return self.config.hook, None
        source, path = self.transcoder_hooks
        return path, source

    def training_windows(self) -> Tensor:
        """The windows that methods are trained on."""
        return self.cache.tokens[: int(self.cache.row_window[self.train.stop - 1]) + 1].long()

    def windows(self, n_tokens: int) -> Tensor:
        """Held-out windows of at least so many tokens if there are, from the first."""
        first = int(self.cache.row_window[self.heldout.start])
        n = max(-(-n_tokens // self.cache.context_size), 1)
        return self.cache.tokens[first : first + n].long()

    def lm(self) -> LanguageModel:
        """The language model, loaded once."""
        if self._lm is None:
            self._lm = load_model(self.config, self.stages)
        return self._lm

    def substitution(self) -> SubstitutionTest:
        """The language model on the held-out windows that the configuration asks for, run once."""
        from bae_fast.causal import SubstitutionTest

        if self._substitution is None:
            lm, windows = self.lm(), self.windows(self.config.substitution_tokens)
            with self.stages.stage("the language model as it is"):
                self._substitution = SubstitutionTest(lm, windows)
        return self._substitution


def scorer_makers() -> list[Callable[[Context], list[Scorer]]]:
    """``make`` of every file here, in the order of their columns."""
    names = [name for _, name, _ in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [module.make for module in sorted(modules, key=lambda module: module.ORDER)]
