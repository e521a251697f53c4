"""A judge: a chat model behind any OpenAI-compatible endpoint, whose answers are kept and never asked for twice.

    <cache.dir>/answers/<first two digits>/<digest>.json    an answer; the digest is that of everything it depends on

The client is the `openai` package: servers are tried against its pooling, time limits and back-off, which honours
Retry-After. The key comes from OPENAI_API_KEY alone and stands in no file and no message. It is sent to OpenAI, to
this machine and to an address that the user gave, not to one that only a plan names. Replies are read up to a limit, in
bytes and in time.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from hsae.cache.errors import UserError
from hsae.cache.files import check_seal, parse_json, sealed
from hsae.cache.storage.paths import Place, publish
from hsae.eval.autointerp.config import OPENAI_URL, JudgeConfig

KEY = "OPENAI_API_KEY"
PER = 1_000_000  # tokens that a price is of
SHOWN = 200  # characters of a server's message
MOST_BYTES = 1 << 24  # of a reply


@dataclass(frozen=True, kw_only=True)
class Question:
    """One chat request."""

    system: str
    user: str
    max_tokens: int
    """Tokens the answer may have."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the judge said, and what it took."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money for a million tokens, in whatever currency."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost."""
        return (self.input * input_tokens + self.output * output_tokens) / PER


class Judge:
    """Asks questions from several threads; answers that were ever given are read back."""

    def __init__(
        self,
        config: JudgeConfig,
        answers: Place,
        count: Callable[[str], int],
        *,
        prices: Prices | None = None,
        max_cost: float | None = None,
        is_named: bool = False,
    ) -> None:
        """`count` gives the tokens of a text; `max_cost` is the money that may be spent, which needs prices.

        `is_named` says that the user, and not only a plan, gave the address. Raises UserError if the key may be meant
        for another one.
        """
        self.config, self.answers, self.count, self.prices, self.max_cost = config, answers, count, prices, max_cost
        self.requests, self.unread, self.spent = 0, 0, 0.0
        """Requests sent, replies without an answer in them, and money spent or under way."""
        self._key = os.environ.get(KEY, "")
        if self._key and not (is_named or config.base_url == OPENAI_URL or _is_local(config.base_url)):
            raise UserError(
                f"the plan's judge is {config.base_url}, and {KEY} may be for another service; "
                f"if it is for this one, say --base-url {config.base_url}, else unset {KEY}"
            )
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._client: Any = None

    def __enter__(self) -> "Judge":
        self._stopped.clear()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the connections."""
        self.stop()
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def is_stopped(self) -> bool:
        """Whether no further request is sent."""
        return self._stopped.is_set()

    # --- stored answers ---

    def recall(self, question: Question, attempt: int) -> Answer | None:
        """The answer that was given before; None if there is none."""
        request = self._request(question, attempt)
        try:
            stored = parse_json(self._file(request).read_bytes())
            check_seal(stored, required=False)
            if stored["request"] != request:
                return None
            return Answer(
                text=str(stored["answer"]),
                input_tokens=int(stored["usage"]["input_tokens"]),
                output_tokens=int(stored["usage"]["output_tokens"]),
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            return None  # damaged: asked again

    def _request(self, question: Question, attempt: int) -> dict[str, Any]:
        """All that an answer depends on."""
        return {
            "base_url": self.config.base_url,
            "model": self.config.model,
            "temperature": self.config.temperature,
            "max_tokens": question.max_tokens + self.config.spare_tokens,
            "system": question.system,
            "user": question.user,
            "attempt": attempt,
        }

    def _file(self, request: dict[str, Any]) -> Place:
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self.answers / digest[:2] / f"{digest}.json"

    # --- asking ---

    def ask(self, question: Question, attempt: int) -> Answer | None:
        """The answer, stored or new; None if the server's replies hold none.

        Raises UserError if there is no reply, or no money left.
        """
        if (stored := self.recall(question, attempt)) is not None:
            return stored
        request = self._request(question, attempt)
        tokens = self.count(question.system) + self.count(question.user)
        for _ in range(self.config.attempts):
            if (answer := self._answer(request, tokens)) is not None:
                usage = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
                content = {"request": request, "answer": answer.text, "usage": usage}
                publish(self._file(request), json.dumps(sealed(content), ensure_ascii=False, indent=1).encode())
                return answer
        return None

    def _answer(self, request: dict[str, Any], tokens: int) -> Answer | None:
        """The answer in the server's reply, paid for either way."""
        reserved = self._reserve(tokens, request["max_tokens"])
        try:
            reply = self._reply(request)
        except BaseException:
            self._settle(reserved, 0, 0)
            raise
        text = _part(reply, "choices", 0, "message", "content")
        given, made = _part(reply, "usage", "prompt_tokens"), _part(reply, "usage", "completion_tokens")
        input_tokens = given if isinstance(given, int) else tokens
        output_tokens = made if isinstance(made, int) else self.count(str(text or ""))
        self._settle(reserved, input_tokens, output_tokens)
        if not isinstance(text, str):
            with self._lock:
                self.unread += 1
            return None
        return Answer(text=self._clean(text), input_tokens=input_tokens, output_tokens=output_tokens)

    def stop(self) -> None:
        """Send no further request, and no further try of one that is under way."""
        self._stopped.set()

    def _reply(self, request: dict[str, Any]) -> Any:
        import openai

        client = self._connect()
        chosen = {} if request["temperature"] is None else {"temperature": request["temperature"]}
        try:
            return client.chat.completions.create(
                model=request["model"],
                messages=[
                    {"role": "system", "content": request["system"]},
                    {"role": "user", "content": request["user"]},
                ],
                **chosen,
                **{self.config.token_limit: request["max_tokens"]},
            )
        except openai.APIStatusError as error:
            raise UserError(self._refusal(error.status_code, error.body)) from None
        except openai.APIConnectionError as error:  # time limits too
            raise UserError(
                f"the judge {self.config.base_url} gives no reply ({self._short(error.message)} after "
                f"{self.config.retries} further tries); its answers so far are kept: "
                "see to the server and run the same command again"
            ) from None
        except (openai.OpenAIError, ValueError):
            return None  # a reply that is not what the protocol says

    def _connect(self) -> Any:
        import openai

        with self._lock:
            if self._client is None:
                if not self._key and self.config.base_url == OPENAI_URL:
                    raise UserError(f"{OPENAI_URL} wants a key; set the environment variable {KEY}")
                self._client = openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=self.config.base_url,
                    timeout=self.config.timeout_s,
                    max_retries=self.config.retries,
                    http_client=openai.DefaultHttpxClient(
                        event_hooks={"request": [lambda request: self._check_stopped()], "response": [self._limit]},
                        headers={"Accept-Encoding": "identity"},
                        follow_redirects=False,
                    ),
                )
            return self._client

    def _limit(self, response: Any) -> None:
        """Let a reply be read up to its limits."""
        import openai

        if response.headers.get("content-encoding", "identity") != "identity":
            raise openai.OpenAIError("a reply is compressed, unasked")
        library, ends = (
            sys.modules[type(response).__module__.partition(".")[0]],
            time.monotonic() + self.config.timeout_s,
        )

        class Bounded(library.SyncByteStream):  # type: ignore[name-defined, misc]
            def __init__(self, stream: Any) -> None:
                self._stream = stream

            def __iter__(self) -> Iterator[bytes]:
                left = MOST_BYTES
                for piece in self._stream:
                    left -= len(piece)
                    if left < 0:
                        raise openai.OpenAIError("a reply has no end")
                    if time.monotonic() > ends:
                        raise library.ReadTimeout("the reply took too long")
                    yield piece

            def close(self) -> None:
                self._stream.close()

        response.stream = Bounded(response.stream)

    def _check_stopped(self) -> None:
        if self.is_stopped:
            import openai

            raise openai.OpenAIError("stopped")  # the one kind of error that the client does not try again

    def _refusal(self, status: int, body: object) -> str:
        said = body.get("message", body) if isinstance(body, dict) else body
        text = f"the judge {self.config.base_url} answers {status} ({self._short(said)})"
        if status in (401, 403):
            return f"{text}; " + (f"is {KEY} the right key?" if self._key else f"set the environment variable {KEY}")
        if status == 404:
            return f"{text}; is {self.config.model!r} one of its models (--judge) and the URL the API's (--base-url)?"
        if status == 429 or status >= 500:
            return (
                f"{text} after {self.config.retries} further tries; its answers so far are kept: "
                "run the same command again later, or with a lower autointerp.judge.concurrency"
            )
        return f"{text}; the request can't be met as it is: see [autointerp.judge] in the plan"

    def _short(self, said: object) -> str:
        text = " ".join(self._clean(str(said)).split())
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    # --- money ---

    def _reserve(self, input_tokens: int, output_tokens: int) -> float:
        """Take what a request may cost from what is left. Raises UserError if that is not enough."""
        reserved = self.prices.of(input_tokens, output_tokens) if self.prices else 0.0
        with self._lock:
            if self.max_cost is not None and self.spent + reserved > self.max_cost:
                raise UserError(
                    f"one more request could pass the limit of {self.max_cost:g} "
                    f"({self.spent:.4f} spent or under way); its answers so far are kept: "
                    "run the same command again with a higher --max-cost"
                )
            self.spent += reserved
            self.requests += 1
        return reserved

    def _settle(self, reserved: float, input_tokens: int, output_tokens: int) -> None:
        with self._lock:
            self.spent += (self.prices.of(input_tokens, output_tokens) if self.prices else 0.0) - reserved


def _is_local(url: str) -> bool:
    """Whether an address is this machine's, by the loopback addresses and their name."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _part(reply: object, *path: str | int) -> object:
    """What lies in a reply at this place; None if its shape is another."""
    for step in path:
        try:
            reply = reply[step] if isinstance(step, int) else getattr(reply, step)  # type: ignore[index]
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return reply
