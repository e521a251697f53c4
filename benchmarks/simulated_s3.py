"""An S3 server whose chunks exist only as numbers: it lists, measures and serves a store of any size without keeping
it.

    python benchmarks/simulated_s3.py '{"context": 128, "arrays": {"tokens": [1220704, 2, 32768]}}'

Buckets hold one and the same store: `full` all chunks, `partly` all but those whose number is 5 modulo 97 (of the
activations), `empty` none. Lists come in pages of 1000 keys in S3's order. Each reply is kept back as long as S3 takes:
25 ms, a page of a list 100 ms. Chunks that are written are counted and forgotten; everything else is kept. Prints its
port; `/_requests` tells what was asked.
"""

import bisect
import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c
import numpy as np

STORE = "simulated.zarr"
REPLY, PAGE = 0.025, 0.1  # seconds
PAGE_KEYS = 1000
LOST, OF = 5, 97
DATE = "2026-01-01T00:00:00.000Z"


class Arrays:
    """The chunks of a store: path -> (chunks, axes, bytes of numbers); tokens are a BOS a row and then ordinary ids."""

    def __init__(self, told: dict[str, list[int]], context: int) -> None:
        self.told, self.context = told, context
        self.orders = {count: sorted(f"{i}/" for i in range(count)) for count in {row[0] for row in told.values()}}
        self.bodies: dict[str, bytes] = {}

    def chunk(self, bucket: str, key: str) -> tuple[str, int] | None:
        """(array, number) of a key that is a chunk's, whether it is there or not; None if it is no chunk."""
        found = re.fullmatch(rf"{STORE}/(.+)/c/(\d+)(/0)+", key)
        return (found[1], int(found[2])) if found and found[1] in self.told else None

    def there(self, bucket: str, array: str, number: int) -> bool:
        """Whether the bucket has that chunk."""
        return bucket == "full" or array == "tokens" or (bucket == "partly" and number % OF != LOST)

    def body(self, array: str) -> bytes:
        """What every chunk of an array holds."""
        if array not in self.bodies:
            numbers = bytes(self.told[array][2])
            if array == "tokens":
                rows = np.full((self.told[array][2] // 4 // self.context, self.context), 9, "<i4")
                rows[:, 0] = 2
                numbers = rows.tobytes()
            self.bodies[array] = numbers + int(google_crc32c.value(numbers)).to_bytes(4, "little")
        return self.bodies[array]

    def listed(self, bucket: str, prefix: str, after: str) -> tuple[list[tuple[str, int]], str]:
        """One page of (key, bytes), and where the next one begins."""
        array, _, begin = prefix.removeprefix(STORE + "/").partition("/c/")
        if array not in self.told or bucket == "empty":
            return [], ""
        count, axes, size = self.told[array]
        order = self.orders[count]
        place = max(bisect.bisect_left(order, begin), int(after or 0))
        end = bisect.bisect_left(order, begin + "\uffff")
        tail = "/".join(["0"] * (axes - 1))
        keys = []
        while place < end and len(keys) < PAGE_KEYS:
            if self.there(bucket, array, int(order[place][:-1])):
                keys.append((f"{STORE}/{array}/c/{order[place]}{tail}", size + 4))
            place += 1
        return keys, str(place) if place < end else ""


class Handler(BaseHTTPRequestHandler):
    """S3's answers to what s3fs asks."""

    protocol_version = "HTTP/1.1"
    arrays: Arrays
    kept: dict[str, bytes]
    requests: Counter[str]
    lock = threading.Lock()

    def do_GET(self) -> None:
        """An object, a page of a list, or the numbers of requests so far."""
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket == "_requests":
            return self.reply(200, json.dumps(self.requests).encode())
        if not key:
            return self.page(bucket, {name: values[0] for name, values in parse_qs(parts.query).items()})
        body = self.found(bucket, key)
        self.count("GET", REPLY)
        if body is None:
            return self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if tail := re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", "")):
            told = {"Content-Range": f"bytes {len(body) - int(tail[1])}-{len(body) - 1}/{len(body)}"}
            return self.reply(206, body[-int(tail[1]) :], told)
        self.reply(200, body)

    def do_HEAD(self) -> None:
        """Whether an object is there, and its length."""
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        body = self.found(bucket, key)
        self.count("HEAD", REPLY)
        self.reply(404 if body is None else 200, body or b"", {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"})

    def do_PUT(self) -> None:
        """Keep an object, unless it is a chunk of an array."""
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.arrays.chunk(bucket, key) is None:
            self.kept[f"{bucket}/{key}"] = data
        self.count("PUT", REPLY)
        self.reply(200, b"", {"ETag": '"0"'})

    def do_POST(self) -> None:
        """Delete the objects of a list."""
        bucket = self.path.lstrip("/").partition("?")[0].rstrip("/")
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        for key in re.findall(r"<Key>(.*?)</Key>", text):
            self.kept.pop(f"{bucket}/{unquote(key)}", None)
        self.count("POST", REPLY)
        self.reply(200, b"<DeleteResult></DeleteResult>")

    def page(self, bucket: str, asked: dict[str, str]) -> None:
        """One page of keys."""
        prefix = asked.get("prefix", "")
        keys, following = self.arrays.listed(bucket, prefix, asked.get("continuation-token", ""))
        begin = f"{bucket}/{prefix}"
        keys += [
            (name[len(bucket) + 1 :], len(data)) for name, data in list(self.kept.items()) if name.startswith(begin)
        ]
        contents = "".join(
            f'<Contents><Key>{quote(key)}</Key><LastModified>{DATE}</LastModified><ETag>"0"</ETag><Size>{size}</Size>'
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key, size in keys
        )
        more = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
        text = (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(following)).lower()}</IsTruncated>{more}{contents}</ListBucketResult>"
        )
        self.count("LIST", PAGE)
        self.reply(200, text.encode())

    def found(self, bucket: str, key: str) -> bytes | None:
        """An object's bytes."""
        chunk = self.arrays.chunk(bucket, key)
        if chunk is not None:
            count = self.arrays.told[chunk[0]][0]
            return self.arrays.body(chunk[0]) if chunk[1] < count and self.arrays.there(bucket, *chunk) else None
        return self.kept.get(f"{bucket}/{key}")

    def count(self, kind: str, seconds: float) -> None:
        """Note a request and take the time that S3 takes."""
        with self.lock:
            self.requests[kind] += 1
        time.sleep(seconds)

    def reply(self, status: int, body: bytes, headers: dict[str, str] = {}) -> None:  # noqa: B006
        """One answer in one write."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/xml", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A thread a connection."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that went away is none."""


def main() -> None:
    told = json.loads(sys.argv[1])
    Handler.arrays, Handler.kept, Handler.requests = Arrays(told["arrays"], told["context"]), {}, Counter()
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
