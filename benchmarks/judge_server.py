"""A judge without a model, for tests and for trying `hsae eval autointerp` out: it speaks the chat completions protocol
and reads the prompts.

It explains a latent by the word that stands most often between « and », and predicts by looking for that word. Replies
can be made to fail. On its own:

    python benchmarks/judge_server.py --port 8123
    hsae eval autointerp --run 3 --base-url http://127.0.0.1:8123/v1 --judge words --yes
"""

import argparse
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LINE = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
MARKED = re.compile(r"«([^«»]*)»")
EXPLANATION = re.compile(r"^Explanation: the word (.*)$", re.MULTILINE)


def answer(user: str) -> str:
    """What the judge says to a prompt: an explanation if something is marked in it, else the numbers of lines with the
    word.
    """
    lines = LINE.findall(user)
    if marked := [word.strip() for line in lines for word in MARKED.findall(line)]:
        (word, _), *_ = Counter(filter(None, marked)).most_common(1) or [("␣", 0)]
        return f"Explanation: the word {word}"
    found = EXPLANATION.search(user)
    assert found is not None, user
    word = re.compile(rf"(?<!\w){re.escape(found[1])}(?!\w)")
    return ", ".join(str(number) for number, line in enumerate(lines, 1) if word.search(line)) or "None"


@dataclass
class Behaviour:
    """How the server behaves, and what it has seen."""

    fault: Callable[[int], str | None] = lambda number: None
    """For the n-th request (from 0) what goes wrong: `429`, `500`, ... (with `, <seconds>` a Retry-After), `hang`,
    `garbage`, `empty`, `echo`.
    """
    answer: Callable[[str], str] = answer
    delay: float = 0.0
    """Seconds a reply takes."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all requests."""
    times: list[float] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    under_way: int = 0
    most: int = 0
    """Most requests under way at once."""
    lock: threading.Lock = field(default_factory=threading.Lock)


def _handler(behaviour: Behaviour) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with behaviour.lock:
                number = len(behaviour.asked)
                behaviour.asked.append(body)
                behaviour.times.append(time.monotonic())
                behaviour.keys.add(self.headers.get("Authorization", ""))
                behaviour.under_way += 1
                behaviour.most = max(behaviour.most, behaviour.under_way)
            try:
                time.sleep(behaviour.delay)
                self._reply(body, behaviour.fault(number))
            finally:
                with behaviour.lock:
                    behaviour.under_way -= 1

        def _reply(self, body: dict[str, Any], fault: str | None) -> None:
            if self.path != "/v1/chat/completions":
                return self._send(404, {"error": {"message": f"no such path {self.path}"}})
            if fault is not None and fault[:3].isdecimal():
                status, _, wait = fault.partition(", ")
                said = f"fault {status} for {self.headers.get('Authorization')}"
                return self._send(int(status), {"error": {"message": said}}, {"Retry-After": wait} if wait else {})
            if fault == "hang":
                time.sleep(6)
            if fault == "garbage":
                return self._send(200, b'{"choices": [')
            text = behaviour.answer(body["messages"][1]["content"])
            if fault == "echo":
                text += f" {self.headers.get('Authorization')}"
            tokens = sum(len(message["content"]) for message in body["messages"]) // 4
            self._send(
                200,
                {
                    "id": "0",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": []
                    if fault == "empty"
                    else [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": tokens, "completion_tokens": len(text) // 4 + 1, "total_tokens": 0},
                },
            )

        def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):  # the client no longer waits
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def served(behaviour: Behaviour, port: int = 0) -> Iterator[str]:
    """The base URL of a running server."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(behaviour))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="a judge without a model")
    options.add_argument("--port", type=int, default=8123)
    seen = Behaviour()
    with served(seen, options.parse_args().port) as url:
        print(f"listening at {url}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print(f"{len(seen.asked)} requests")
