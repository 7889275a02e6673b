"""Judges: who names features and says Yes or No. Text in, text out.

    RuleJudge          no language model: the commonest marked token names, the same token is Yes
    TransformersJudge  a local model, greedy, in batches
    OpenAIJudge        any server that speaks OpenAI's chat completions

A judge hands over every answer as it comes, so that a run that is cut off keeps what it has.
Draw 0 of a request is the judge's best answer; further draws are sampled at temperature 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from bae_fast.interpret.thoughts import close_thoughts, only_thoughts
from bae_fast.lm.hooks import in_order, running
from bae_fast.lm.inputs import padded, text_tokens
from bae_fast.lm.keys import kept_cache, keys_name, repeated
from bae_fast.lm.loading import (
    DEFAULT_MODEL,
    LanguageModel,
    find_language_model,
    load_language_model,
    resolve_dtype,
)

NAME_TOKENS = 32  # of a phrase
JUDGE_TOKENS = 4  # of Yes or No

# tokens of a batch of the local judge, padding included
_BATCH_TOKENS = 4096
# rows of a batch that goes on from one shared beginning
_GROUP_ROWS = 32
# a beginning is worth its own pass where it is at least this long
_LEAST_PREFIX = 16


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        kind: "name" for a phrase, "judge" for Yes or No.
        prompt: the whole question, as text.
        draw: 0 for the judge's best answer, from 1 on for sampled ones.
        phrase: the phrase judged, None for a naming.
        tokens: the marked tokens. These two are in the prompt too: for judges that do not read.
    """

    kind: Literal["name", "judge"]
    prompt: str
    draw: int = 0
    phrase: str | None = None
    tokens: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """What an answer depends on besides the judge."""
        return {"kind": self.kind, "prompt": self.prompt, "draw": self.draw}


@dataclass(frozen=True)
class Answer:
    """What a judge says.

    Attributes:
        text: the answer.
        prompt_tokens, completion_tokens: tokens as the judge counts them; 0 where it counts none.
        p_yes: probability of Yes against No, where the judge gives one.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    p_yes: float | None = None


class JudgeError(RuntimeError):
    """A question that got no answer; ``fatal`` where the next one would not get one either."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


Done = Callable[[int, "Answer | JudgeError"], None]


class Judge(Protocol):
    """Answers requests."""

    @property
    def identity(self) -> str:
        """All that answers depend on besides the request; never a secret."""

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        """Answer every request, in any order, and call ``done(index, answer)`` for each at once.

        ``done`` is called from the calling thread only. What it raises ends the answering.
        """


class RuleJudge:
    """Names by the commonest marked token and says Yes where the marked token is the phrase.

    Case and spaces at the ends do not count; of equally common tokens the first is taken. Its
    scores can be worked out by hand: the judge of tests and of dry runs.
    """

    identity = "rule 1"

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        for i, request in enumerate(requests):
            done(i, Answer(self._say(request)))

    @staticmethod
    def _say(request: Request) -> str:
        tokens = [token.strip().casefold() for token in request.tokens]
        if request.kind == "name":
            return Counter(tokens).most_common(1)[0][0]
        phrase = (request.phrase or "").strip().casefold()
        return "Yes" if tokens == [phrase] else "No"


# -- a local model -----------------------------------------------------------------------------


class TransformersJudge:
    """A local causal language model; loaded when the first question comes.

    Phrases are generated greedily. Yes or No is the larger of the two words' next-token
    probabilities: one pass, no generation. Questions that begin alike share the keys and values
    of their beginning. A draw from 1 on says Yes with its probability, by a number that the
    question and the draw decide.
    """

    def __init__(
        self,
        name: str = DEFAULT_MODEL,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        lm: LanguageModel | None = None,
    ) -> None:
        """
        Args:
            name, dtype, device: see :func:`bae_fast.lm.load_language_model`.
            lm: a model that is loaded already, in place of the three.

        Raises:
            ImportError, ValueError: no such model.
        """
        self.dtype = resolve_dtype(dtype, device) if lm is None else lm.dtype
        self.device = torch.device(device)
        self.name = name if lm is None else lm.name
        self._lm = lm
        revision = lm.current_revision() if lm is not None else find_language_model(name).revision
        if not revision:  # known only once it is loaded
            revision = self.lm.revision
        kind = str(self.dtype).removeprefix("torch.")
        self.identity = f"transformers {self.name} {revision} {kind} 1"

    @property
    def lm(self) -> LanguageModel:
        """The model, loaded now if it was not."""
        if self._lm is None:
            self._lm = load_language_model(self.name, dtype=self.dtype, device=self.device)
        return self._lm

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a question, in the model's chat format where it has one."""
        tokenizer = self.lm.tokenizer
        if getattr(tokenizer, "chat_template", None):
            # models that can do without thoughts (Qwen3) are asked for the answer alone
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            # a format that begins the thoughts for the model (DeepSeek-R1): they end at once
            text += close_thoughts(text)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return text_tokens(tokenizer, f"{prompt}\nAnswer:")

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        ids = [self.encode(request.prompt) for request in requests]
        names = [i for i, request in enumerate(requests) if request.kind == "name"]
        verdicts = [i for i, request in enumerate(requests) if request.kind == "judge"]
        for batch, phrases in self._run(self._generate, _batches(names, ids), ids):
            for i, tokens in zip(batch, phrases, strict=True):
                text = self.lm.tokenizer.decode(tokens, skip_special_tokens=True)
                done(i, Answer(text, len(ids[i]), len(tokens)))
        for group, chances in self._run(self._p_yes, _groups(verdicts, ids), ids):
            for i, p_yes in zip(group, chances, strict=True):
                yes = p_yes >= 0.5
                if requests[i].draw:
                    yes = _uniform(requests[i]) < p_yes
                done(i, Answer("Yes" if yes else "No", len(ids[i]), 1, p_yes))

    def _run(
        self, forward: Callable[[list[list[int]]], Any], parts: list[list[int]], ids: list[Any]
    ) -> Iterator[tuple[list[int], Any]]:
        if not parts:
            return
        sequences = [[ids[i] for i in part] for part in parts]
        in_turn = in_order(forward, sequences, self.lm.device.type)
        with running(self.lm.model), contextlib.closing(in_turn) as results:
            yield from zip(parts, results, strict=True)

    @torch.no_grad()
    def _generate(self, sequences: list[list[int]]) -> list[list[int]]:
        model, tokenizer = self.lm.model, self.lm.tokenizer
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):  # padded on the left: what comes next is last
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        stops = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
        pad = tokenizer.pad_token_id
        out = model.generate(
            input_ids=ids.to(self.lm.device),
            attention_mask=mask.to(self.lm.device),
            max_new_tokens=NAME_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad if pad is not None else next(iter(stops), 0),
        )[:, width:].tolist()
        ends = [next((i for i, t in enumerate(row) if t in stops), len(row)) for row in out]
        return [row[:end] for row, end in zip(out, ends, strict=True)]

    def verdict_tokens(self) -> tuple[int, int]:
        """Ids of the first tokens of Yes and No as they would follow the question.

        Raises:
            ValueError: the two begin alike.
        """
        tokenizer = self.lm.tokenizer
        space = "" if getattr(tokenizer, "chat_template", None) else " "
        yes, no = (
            tokenizer(space + word, add_special_tokens=False)["input_ids"][0]
            for word in ("Yes", "No")
        )
        if yes == no:
            raise ValueError(
                f"{self.name} cannot judge: its words Yes and No begin with one token, {yes}"
            )
        return yes, no

    @torch.no_grad()
    def _p_yes(self, sequences: list[list[int]]) -> list[float]:
        """Probability of Yes against No after each of some sequences that begin alike."""
        lm, device = self.lm, self.lm.device
        shared = min(_common(sequences[0], sequences[-1]), min(map(len, sequences)) - 1)
        name = keys_name(lm.model) if len(sequences) > 1 and shared >= _LEAST_PREFIX else None
        kept: dict[str, Any] = {}
        if name is None:
            shared = 0
        else:
            start = torch.tensor([sequences[0][:shared]], device=device)
            kept = {name: kept_cache(lm.body(input_ids=start, use_cache=True))}
        ids, mask, lengths = padded([sequence[shared:] for sequence in sequences])
        mask = torch.nn.functional.pad(mask, (shared, 0), value=True)
        last = lm.body(
            input_ids=ids.to(device),
            attention_mask=mask.to(device).long(),
            use_cache=bool(kept),
            **repeated(kept, len(sequences)),
        ).last_hidden_state
        states = last[torch.arange(len(sequences), device=device), (lengths - 1).to(device)]
        logits = lm.head(states)[:, list(self.verdict_tokens())]
        chances: Tensor = logits.double().softmax(-1)[:, 0]
        return chances.tolist()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _uniform(request: Request) -> float:
    """A number in [0, 1) that the question and the draw decide."""
    digest = hashlib.sha256(f"{request.draw} {request.prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _batches(which: list[int], ids: list[list[int]]) -> list[list[int]]:
    """Short to long, padded size and the answer within the bound."""
    batches: list[list[int]] = []
    for i in sorted(which, key=lambda i: len(ids[i])):
        if batches and (len(batches[-1]) + 1) * (len(ids[i]) + NAME_TOKENS) <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _groups(which: list[int], ids: list[list[int]]) -> list[list[int]]:
    """Sequences that share at least half of the shortest, in the order of their tokens.

    In that order what the first and the last share, all share.
    """
    groups: list[list[int]] = []
    for i in sorted(which, key=lambda i: ids[i]):
        if groups and len(groups[-1]) < _GROUP_ROWS:
            shortest = min(len(ids[j]) for j in (*groups[-1], i))
            if 2 * _common(ids[groups[-1][0]], ids[i]) >= shortest:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


# -- a server ----------------------------------------------------------------------------------


class OpenAIJudge:
    """A model behind OpenAI's chat completions, or any server that speaks them.

    Requests go out side by side. 408, 409, 429, 5xx, timeouts and lost connections are tried
    again by the client, with growing pauses. The key comes from the environment and stays in
    memory: it is in no file and in no message.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        timeout: float = 60.0,
        max_retries: int = 6,
        concurrency: int = 8,
    ) -> None:
        """
        Args:
            model: its name at the server.
            base_url: e.g. "http://localhost:8000/v1"; None: the client's own default.
            api_key_env: the environment variable that holds the key. A server on the loopback
                address needs none.
            temperature: that of draw 0; None: the server's, for models that take no other. Later
                draws are sampled at 1.
            max_tokens: the length of an answer; None: 32 for a phrase and 4 for a judgment, too
                few for models that think first.
            timeout: seconds a try.
            max_retries: tries after the first.
            concurrency: requests at once.

        Raises:
            ImportError: openai is not installed.
            ValueError: no key, an empty model, or an argument out of range.
        """
        try:
            import openai
        except ImportError:
            raise ImportError(
                "the openai judge needs openai: pip install 'bae-fast[interpret]'"
            ) from None
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must name the judge's model; got {model!r}")
        self.base_url = _check_url(base_url)
        for name, value, least in (
            ("timeout", timeout, 0),
            ("concurrency", concurrency, 0),
            ("max_retries", max_retries, -1),
        ):
            if not value > least:
                raise ValueError(f"{name} must be above {least}; got {value!r}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens!r}")
        key = os.environ.get(api_key_env, "")
        if not key and not _is_loopback(self.base_url):
            raise ValueError(
                f"the environment variable {api_key_env} must hold the key of the judge's server; "
                "it is not set"
            )
        if not key.isascii() or any(c.isspace() for c in key):
            raise ValueError(f"{api_key_env} must hold a key of plain characters without spaces")
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.concurrency = int(concurrency)
        self._openai = openai
        self._key = key
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self.base_url, timeout=timeout, max_retries=max_retries
        )
        settings = {"temperature": temperature, "max_tokens": max_tokens}
        # without base_url the client may take it from the environment
        url = _check_url(str(self._client.base_url))
        self.identity = f"openai {url} {model} {settings} 1"

    def __repr__(self) -> str:
        return f"OpenAIJudge(model={self.model!r}, base_url={self.base_url!r})"

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        futures = {pool.submit(self._one, request): i for i, request in enumerate(requests)}
        kept: set[Future[Answer | JudgeError]] = set()
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
                kept.add(future)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # what is under way is paid for
            for future, i in futures.items():
                if future not in kept and not future.cancelled():
                    with contextlib.suppress(JudgeError):
                        done(i, future.result())
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, request: Request) -> Answer | JudgeError:
        limit = self.max_tokens or (NAME_TOKENS if request.kind == "name" else JUDGE_TOKENS)
        options: dict[str, Any] = {}
        # OpenAI's newer models know only the second name, other servers often only the first
        options["max_tokens" if self.base_url else "max_completion_tokens"] = limit
        if request.draw:
            options["seed"] = request.draw
        temperature = 1.0 if request.draw and self.temperature is not None else self.temperature
        if temperature is not None:
            options["temperature"] = temperature
        try:
            found = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": request.prompt}], **options
            )
            text = found.choices[0].message.content
            usage = getattr(found, "usage", None)
            counts = [
                int(getattr(usage, name, None) or 0)
                for name in ("prompt_tokens", "completion_tokens")
            ]
        except self._openai.OpenAIError as error:
            return self._failure(error)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return JudgeError(
                self._clean(f"{self.model}: the server's answer has no message ({error})")
            )
        if not isinstance(text, str):
            return JudgeError(
                f"{self.model}: the server's answer has no text; a model that thinks first needs "
                "more tokens (--max-tokens)"
            )
        if only_thoughts(text):
            return JudgeError(
                f"{self.model}: the answer was cut off within the model's thoughts; a model that "
                "thinks first needs more tokens (--max-tokens)"
            )
        return Answer(self._hide(text), *counts)

    def _failure(self, error: Exception) -> JudgeError:
        o = self._openai
        fatal = isinstance(
            error,
            (o.AuthenticationError, o.PermissionDeniedError, o.NotFoundError, o.RateLimitError),
        ) or (isinstance(error, o.APIConnectionError) and not isinstance(error, o.APITimeoutError))
        where = f"{self.model} at {self._client.base_url}"
        return JudgeError(self._clean(f"{where}: {type(error).__name__}: {error}"), fatal=fatal)

    def _clean(self, text: str) -> str:
        """One line, without the key."""
        line = " ".join(self._hide(text).split())
        return line if len(line) <= 300 else line[:300] + "…"

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def _check_url(base_url: str | None) -> str | None:
    """The URL, with neither name nor password: it is shown and written down."""
    if base_url is None:
        return None
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must be http(s)://host[:port]/path; got {base_url!r}")
    if "@" in parts.netloc or parts.query:
        raise ValueError("base_url must hold neither user, password nor query: the key comes from "
                         "the environment")  # fmt: skip
    return base_url


def _is_loopback(base_url: str | None) -> bool:
    host = urlsplit(base_url).hostname if base_url else None
    return host == "localhost" or host == "::1" or bool(re.match(r"127\.\d", host or ""))
