"""Every answer of a judge on disk, so that none is paid for twice.

    answers.sqlite    one table: key, judge, kind, draw, prompt, text, p_yes, tokens

The key is the SHA-256 of the judge's identity and the request. An answer is a transaction of its
own: after a kill it is there whole or not at all. Several processes may share the file; two that
ask the same question at the same moment both pay for it, and the first answer stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bae_fast.interpret.judges import Answer, Judge, JudgeError, Request
from bae_fast.lm.inputs import without_surrogates
from bae_fast.progress import progress_bar

FORMAT_VERSION = 1
_APPLICATION = 0x42414541  # "BAEA", in the file's header

# seconds to wait for another process's transaction
_BUSY_SECONDS = 60.0
# requests handed to a judge at once; before each lot the file is asked for what others answered
_LOT = 512
# questions in a row without an answer, after which there is no use in going on
_FAILURES_IN_A_ROW = 5

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, kind TEXT NOT NULL, draw INTEGER NOT NULL,
    prompt TEXT NOT NULL, text TEXT NOT NULL, p_yes REAL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID
"""


def request_key(identity: str, request: Request) -> str:
    """SHA-256 of a judge's identity and a request, in hexadecimal."""
    content = {"judge": identity, **request.content()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Answers:
    """The file of answers; of one thread."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Open the file, made where it is missing; None: in memory.

        Raises:
            ValueError: a file of another kind or version, or a damaged one.
            OSError: it cannot be opened.
        """
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(
                self.path or ":memory:", timeout=_BUSY_SECONDS, isolation_level=None
            )
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path} cannot be opened: {error}") from None
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise OSError(f"{self.path} cannot be used: {error}") from None
        except (sqlite3.DatabaseError, ValueError) as error:
            self._db.close()
            raise ValueError(f"{self.path} is not a file of answers: {error}") from None

    def _prepare(self) -> None:
        # one process at a time: two may make the file together
        self._db.execute("BEGIN IMMEDIATE")
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not application and not tables:
            self._db.execute(_TABLE)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            application = _APPLICATION
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        self._db.execute("COMMIT")
        if application != _APPLICATION:
            raise ValueError("it is another program's database")
        if version != FORMAT_VERSION:
            raise ValueError(f"it has version {version}; this program reads {FORMAT_VERSION}")

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM answers").fetchone()[0])

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a statement; a full disk or a damaged file is an OSError that names the file."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path} cannot be used: {error}") from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are there, by key."""
        found = {}
        for key in keys:
            row = self._execute(
                "SELECT text, prompt_tokens, completion_tokens, p_yes FROM answers WHERE key = ?",
                (key,),
            ).fetchone()
            if row is not None:
                found[key] = Answer(*row)
        return found

    def put(self, key: str, identity: str, request: Request, answer: Answer) -> None:
        """Keep an answer; on disk when this returns. An answer that is there already stays."""
        self._execute(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key, identity, request.kind, request.draw, request.prompt,
                without_surrogates(answer.text), answer.p_yes, answer.prompt_tokens,
                answer.completion_tokens,
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Prices:
    """The prices of a million tokens, in any currency; None: not known."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What tokens cost, or None where a price is not known."""
        if self.prompt is None or self.completion is None:
            return None
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Usage:
    """What was asked.

    Attributes:
        calls: questions that a judge answered now.
        cached: answers that were on disk.
        failed: questions without an answer.
        prompt_tokens, completion_tokens: the calls' tokens, as the judge counts them.
        seconds: how long the judge was asked.
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def summary(self, prices: Prices | None = None) -> dict[str, Any]:
        """The numbers, for JSON; ``cost`` is None where prices are not known."""
        cost = (prices or Prices()).cost(self.prompt_tokens, self.completion_tokens)
        return {**vars(self), "seconds": round(self.seconds, 2), "cost": cost}


class Asker:
    """Asks judges what is not on disk yet, and counts.

    Attributes:
        usage: counts so far.
        spent: whether the budget kept a question from being asked.
    """

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        budget_calls: int | None = None,
        prices: Prices | None = None,
        progress: bool = False,
    ) -> None:
        """
        Args:
            answers: where answers are kept; None: in memory.
            budget_calls: ask at most this many questions; None: no bound.
            prices: to show what was spent.
            progress: show progress, as a bar on a terminal and as lines elsewhere.

        Raises:
            ValueError: budget_calls below 0.
        """
        if budget_calls is not None and budget_calls < 0:
            raise ValueError(f"budget_calls must be at least 0; got {budget_calls!r}")
        self.answers = Answers() if answers is None else answers
        self.budget_calls = budget_calls
        self.prices = prices or Prices()
        self.progress = progress
        self.usage = Usage()
        self.spent = False
        self._in_a_row = 0

    def ask(
        self, judge: Judge, requests: Sequence[Request], label: str = "judge"
    ) -> list[Answer | None]:
        """Answers in the order of the requests; None where there is none.

        Equal requests are asked once. Without an answer stay questions beyond the budget and
        those that the judge failed at.

        Raises:
            JudgeError: the judge cannot be reached or refuses, or failed five times in a row.
                What it answered until then is kept.
        """
        keys = [request_key(judge.identity, request) for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        found = self.answers.get(by_key)
        self.usage.cached += len(found)
        missing = [key for key in by_key if key not in found]
        start = time.perf_counter()
        show = self.progress and bool(missing)
        try:
            with progress_bar(len(missing), what=label, unit="calls", show=show) as bar:
                for at in range(0, len(missing), _LOT):
                    lot = missing[at : at + _LOT]
                    if at:  # what another process answered meanwhile
                        found.update(self.answers.get(lot))
                        self.usage.cached += sum(key in found for key in lot)
                        lot = [key for key in lot if key not in found]
                    if self.budget_calls is not None:
                        left = max(self.budget_calls - self.usage.calls - self.usage.failed, 0)
                        self.spent = self.spent or len(lot) > left
                        lot = lot[:left]
                    if lot:
                        self._ask(judge, lot, by_key, found, bar)
        finally:
            self.usage.seconds += time.perf_counter() - start
        return [found.get(key) for key in keys]

    def _ask(
        self,
        judge: Judge,
        keys: list[str],
        by_key: dict[str, Request],
        found: dict[str, Answer],
        bar: Any,
    ) -> None:
        def done(i: int, answer: Answer | JudgeError) -> None:
            if isinstance(answer, JudgeError):
                self.usage.failed += 1
                self._in_a_row += 1
                if answer.fatal or self._in_a_row >= _FAILURES_IN_A_ROW:
                    raise answer
                return
            self._in_a_row = 0
            self.answers.put(keys[i], judge.identity, by_key[keys[i]], answer)
            found[keys[i]] = answer
            self.usage.calls += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.completion_tokens += answer.completion_tokens
            bar.set_postfix(**self._spent_so_far())
            bar.update(1)

        judge.answer([by_key[key] for key in keys], done)

    def _spent_so_far(self) -> dict[str, str]:
        usage = self.usage
        cost = self.prices.cost(usage.prompt_tokens, usage.completion_tokens)
        said = {"tokens": f"{usage.prompt_tokens + usage.completion_tokens:,}"}
        return said if cost is None else said | {"spent": f"{cost:.4f}"}
