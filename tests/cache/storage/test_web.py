"""Stores over HTTP: what `hsae cache serve` shows and refuses, and a real server process read as any other store.

FIX D3: connections that ask for nothing are closed, make room for readers, and fill no log. FIX D5: the token is sent
to this machine and to named addresses alone; no reply is read without bound.
"""

import errno
import http.client
import os
import socket
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest
import torch
from typer.testing import CliRunner

from hsae.cache.building.build import build
from hsae.cache.building.copying import copy
from hsae.cache.building.repair import repair
from hsae.cache.building.verification import verify
from hsae.cache.errors import RemoteError, StoreError, UserError
from hsae.cache.format.layout import read_header
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.cache.storage.paths import children, place, sizes
from hsae.cache.storage.server import application, find, serve
from hsae.cli.main import app

HOOK = "blocks.3.hook_resid_post"


def contents(root):
    return {name: (root / name).read_bytes() for name in sizes(root) if not name.endswith(".lock")}


@pytest.fixture(scope="module")
def folder(make_store, tmp_path_factory):
    """A folder with two stores and what must not be shown."""
    folder = tmp_path_factory.mktemp("served")
    store, _ = make_store(folder)
    make_store(folder, codec="compact")
    (folder / "secret.txt").write_text("secret")
    (folder / ".hidden.zarr").mkdir()
    (folder / ".hidden.zarr/zarr.json").write_text("secret")
    (store / ".x.partial").write_text("secret")
    (store / "outside").symlink_to(folder / "secret.txt")
    (store / "above").symlink_to(folder.parent)
    (store / "dotted").symlink_to(store / ".x.partial")
    (store / "loop").symlink_to(store / "loop")
    (store / "inside").symlink_to(store / "zarr.json")
    os.mkfifo(store / "pipe")
    (folder / "lone.zarr").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def server(folder, serve):
    with serve(folder) as (url, _, printed):
        yield url, printed


@pytest.fixture
def url(server, token, scratch_home):
    return server[0]


def request(url, path, method="GET", **headers):
    """(status, headers, body) of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def store_in(folder, codec="mappable"):
    return next(path for path in folder.glob("none-*.zarr") if read_header(path).spec.codec == codec)


def test_files_ranges_and_listings(folder, url, token):
    store, shown = store_in(folder), {"Authorization": f"Bearer {token}"}
    chunk = (store / "tokens/c/1/0").read_bytes()
    path = f"/{store.name}/tokens/c/1/0"
    assert request(url, path, **shown)[::2] == (200, chunk)
    assert request(url, path, Range="bytes=5-16", **shown)[::2] == (206, chunk[5:17])
    assert request(url, path, Range="bytes=-4", **shown)[::2] == (206, chunk[-4:])
    status, headers, body = request(url, path, "HEAD", **shown)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(chunk)))
    assert request(url, path, Range="bytes=900000-", **shown)[0] == 416
    both = sorted(held.name for held in folder.glob("none-*.zarr"))
    assert [found.name for found in children(place(url))] == both
    names = [found.name for found in children(place(url) / store.name)]
    assert names == ["ablation", "acts", "checks", "clean", "inside", "stats", "tokens", "zarr.json"]


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/.hidden.zarr/zarr.json", "/lone.zarr", "/{name}/.x.partial", "/{name}/outside",
        "/{name}/above", "/{name}/above/x",
        "/{name}/dotted", "/{name}/loop", "/{name}/pipe", "/{name}/../secret.txt", "/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/{name}/..%2fsecret.txt", "/{name}/%2e%2e%2f%2e%2e%2fsecret.txt", "/%252e%252e/x", "//etc/passwd",
        "/%2Fetc%2Fpasswd", "/etc/passwd",
        "/{name}/\\..\\..\\secret.txt", "/{name}/zarr.json%00", "/{name}//zarr.json", "/{name}/./zarr.json",
        "/%ff%fe", "/" + "x" * 5000, "/{name}/missing",
        "/{name}/zarr.json/x",
    ],
)  # fmt: skip
def test_nothing_else_is_shown(folder, url, token, path):
    status, _, body = request(url, path.format(name=store_in(folder).name), Authorization=f"Bearer {token}")
    assert status == 404 and b"secret" not in body and b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_nothing_can_be_changed(folder, url, token, method):
    before = contents(store_in(folder))
    for path in ("/", f"/{store_in(folder).name}/zarr.json"):
        assert request(url, path, method, Authorization=f"Bearer {token}")[0] == 405
    assert contents(store_in(folder)) == before


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer ", "Bearer x", "Bearer {token}x", "Basic {token}", "{token}", "Bearer \xff"]
)
def test_without_the_token_nothing_is_said(folder, url, token, shown):
    headers = {"Authorization": shown.format(token=token)} if shown else {}
    answers = {request(url, path, **headers)[::2] for path in ("/", f"/{store_in(folder).name}/zarr.json", "/missing")}
    assert answers == {(401, b"the token is missing or wrong")}
    assert request(url, "/", "PUT", **headers)[0] == 401


def test_one_store_alone_is_served_under_its_name(folder):
    store = store_in(folder)
    assert find(folder, store.name, f"/{store.name}/zarr.json") == store / "zarr.json"
    other = store_in(folder, "compact")
    assert find(folder, store.name, f"{other.name}/zarr.json") is None
    assert find(folder, None, f"{other.name}/zarr.json") == other / "zarr.json"


@pytest.mark.parametrize("codec", ["mappable", "compact"])
def test_a_store_over_http_is_read_as_the_local_one(folder, url, tmp_path, codec, wide):
    near = store_in(folder, codec)
    far = f"{url}/{near.name}"
    assert verify(far) == []

    def batches(where):
        stream = TokenStream(ActivationStore.open(where), HOOK, batch_tokens=11, seed=5, window_tokens=40)
        return torch.stack(list(stream.batches(0, 30)))

    assert torch.equal(batches(far), batches(near))
    here, there = contents(near), contents(copy(far, tmp_path / "copied"))
    assert {name: here[name] for name in there} == there and "checks/c/0" in there
    for arguments, words in (
        (["verify", far], "all chunks are whole"), (["info", far], f"6 of 4 rows, {codec}"),
        (["ls", url], f"{near.name} │ complete"),
    ):  # fmt: skip
        told = CliRunner().invoke(app, ["cache", *arguments])
        assert told.exit_code == 0 and words in told.output, told.output


def test_a_damaged_chunk_is_named_by_its_url(make_store, serve, token, tmp_path):
    near, _ = make_store(tmp_path)
    (near / "tokens/c/2/0").write_bytes((near / "tokens/c/1/0").read_bytes())
    with serve(near) as (url, _, _):
        damages = verify(f"{url}/{near.name}")
        assert [(str(damage.path), damage.problem) for damage in damages] == [
            (f"{url}/{near.name}/tokens/c/2/0", "is another chunk, put in this one's place")
        ]
        with pytest.raises(StoreError, match=r"stores at http:// can only be read; write where they lie"):
            repair(f"{url}/{near.name}", damages)


def test_what_is_wrong_with_the_token_is_said_in_one_sentence(folder, url, monkeypatch):
    far = f"{url}/{store_in(folder).name}"
    monkeypatch.setenv("HSAE_TOKEN", "another-token-altogether")
    refused = f"{far}/zarr.json is refused (the server does not take the token in HSAE_TOKEN; set it to the one that "
    refused += "the server was started with)"
    for command in (["cache", "verify", far], ["cache", "info", far]):
        told = CliRunner().invoke(app, command)
        assert isinstance(told.exception, RemoteError) and str(told.exception) == refused
    monkeypatch.delenv("HSAE_TOKEN")
    with pytest.raises(
        RemoteError, match=r"\(the server wants a token; set HSAE_TOKEN to the one that it was started with\)"
    ):
        verify(far)
    with pytest.raises(RemoteError, match="the server wants a token"):
        place(url).is_dir()


def test_a_missing_store_and_a_place_that_can_only_be_read(folder, url, make_store, tmp_path):
    with pytest.raises(StoreError, match=r"no activation store at http://.*/nothing.zarr; make it with"):
        ActivationStore.open(f"{url}/nothing.zarr")
    assert not (place(url) / "nothing.zarr").is_dir() and sizes(place(url) / "nothing.zarr") == {}
    spec = read_header(store_in(folder)).spec.model_copy(update={"rows": 24})
    with pytest.raises(StoreError, match=rf"{url}/none-eval-\w+.zarr: stores at http:// can only be read"):
        build([spec], url)
    near, _ = make_store(tmp_path, rows=11)
    with pytest.raises(StoreError, match="stores at http:// can only be read; write where they lie"):
        copy(near, url)


@pytest.mark.parametrize(
    "address", ["http://me:secret-token@host/x", "https://host/x?token=secret-token", "http://host:99999/secret-token", "http://host/x#secret-token"]
)  # fmt: skip
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(address):
    with pytest.raises(
        StoreError, match=r"https?://…: write a store's address as .*, and put the token into HSAE_TOKEN"
    ) as caught:
        place(address)
    assert "secret-token" not in str(caught.value)


@contextmanager
def in_a_thread(application, port=0):
    """The port of an ASGI application served from this process."""
    import uvicorn

    config = uvicorn.Config(application, port=port, log_level="critical", lifespan="off", ws="none")
    listener, running = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


def test_a_server_that_fails_and_goes_away_is_waited_for(make_store, scratch_home, token, tmp_path):
    near, values = make_store(tmp_path)
    inner, count = application(tmp_path, None, token), 0

    async def failing(scope, receive, send):
        nonlocal count
        count += 1
        if count % 5 == 0:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif count % 7 == 0:  # more is promised than comes
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"999")]})
            await send({"type": "http.response.body", "body": b"short"})
        else:
            await inner(scope, receive, send)

    with in_a_thread(failing) as port:
        far = f"http://127.0.0.1:{port}/{near.name}"
        store = ActivationStore.open(far)
        assert verify(far) == [] and contents(place(far)) == contents(near)
    read = []
    reader = threading.Thread(target=lambda: read.append(store.acts(HOOK, 0, 23)))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    with in_a_thread(failing, port):
        reader.join(30)
    assert torch.equal(read[0], values[f"acts/{HOOK}"])


def test_a_file_the_server_may_not_read_is_refused_at_once(make_store, token, tmp_path, monkeypatch):
    near, _ = make_store(tmp_path)
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    with (
        in_a_thread(application(tmp_path, None, token)) as port,
        pytest.raises(RemoteError, match=r"zarr.json is refused \(403 Forbidden\)"),
    ):
        verify(f"http://127.0.0.1:{port}/{near.name}")


# ---- FIX D5: where the token goes, and how much is read ------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "address", "sent"),
    [
        ("", "http://127.0.0.1:1/x", True), ("", "http://localhost:1/x", True), ("", "https://[::1]/x", True),
        ("", "http://127.9.9.9/x", True),
        ("", "https://server/x", False), ("", "http://10.0.0.1/x", False), ("", "https://localhost.evil.net/x", False),
        ("server:8420", "https://server:8420/x", True), ("server:8420", "http://server:8420/x", False),
        ("server:8420", "https://server/x", False),
        ("http://server:8420", "http://server:8420/x", True), ("http://server:8420", "https://server:8420/x", False),
        ("server", "https://server:443/x", True), ("server", "https://server.evil.net/x", False),
        ("other, server", "https://server/x", True),
        ("SERVER", "https://server/x", True), ("https://server:8420/folder", "https://server:8420/x", True),
        ("server", "https://2130706433/x", False),
    ],
)  # fmt: skip
def test_the_token_goes_to_this_machine_and_to_named_addresses(named, address, sent, token, monkeypatch):
    from yarl import URL

    from hsae.cache.storage.http import _headers

    monkeypatch.setenv("HSAE_TOKEN_HOST", named)
    assert ("Authorization" in _headers(URL(address))) == sent


def test_a_wrong_name_of_a_host_is_told(token, monkeypatch):
    monkeypatch.setenv("HSAE_TOKEN_HOST", "server:port")
    with pytest.raises(UserError, match="HSAE_TOKEN_HOST must be an address such as server:8420"):
        place("http://10.0.0.1/x.zarr").read_bytes()


@contextmanager
def answering(answer):
    """(its port, the headers of each request) of a server that answers GET and HEAD by answer(path) -> (status,
    headers, pieces)."""
    seen = []

    async def application(scope, receive, send):
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        status, headers, pieces = answer(scope["path"])
        told = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": told})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with in_a_thread(application) as port:
        yield port, seen


def test_what_to_set_is_said_where_the_token_was_not_sent(token, monkeypatch):
    monkeypatch.setattr("hsae.cache.storage.http.is_here", lambda host: False)
    with answering(lambda path: (401, {}, [])) as (port, seen):
        for named, words in (
            ("", rf"the server wants a token; if the one in HSAE_TOKEN is for it: export HSAE_TOKEN_HOST=http://127.0.0.1:{port}\)"),
            (f"http://127.0.0.1:{port}", "the server does not take the token in HSAE_TOKEN"),
        ):  # fmt: skip
            monkeypatch.setenv("HSAE_TOKEN_HOST", named)
            with pytest.raises(RemoteError, match=words):
                verify(f"http://127.0.0.1:{port}/x.zarr")
            assert ("authorization" in seen[-1]) == bool(named)
        monkeypatch.setenv("HSAE_TOKEN_HOST", "")
        monkeypatch.delenv("HSAE_TOKEN")
        with pytest.raises(RemoteError, match=rf"started with and HSAE_TOKEN_HOST=http://127.0.0.1:{port}\)"):
            verify(f"http://127.0.0.1:{port}/x.zarr")


def test_no_redirect_takes_the_token_to_another_server(token):
    with answering(lambda path: (401, {}, [])) as (other, at_other):
        to = f"http://127.0.0.1:{other}/x.zarr/zarr.json"
        redirecting = answering(lambda path: (302, {"location": to}, []))
        words = f"the server redirects to http://127.0.0.1:{other}, which wants a token and gets none"
        with redirecting as (port, seen), pytest.raises(RemoteError, match=words):
            verify(f"http://127.0.0.1:{port}/x.zarr")
    assert seen[0]["authorization"] and "authorization" not in at_other[0]


@pytest.mark.parametrize("length", [{}, {"content-length": str(1 << 40)}])
def test_a_reply_without_end_is_not_read_to_its_end(length, monkeypatch):
    monkeypatch.setattr("hsae.cache.storage.http.MOST_BYTES", 1 << 22)
    with answering(lambda path: (200, {"content-type": "text/html", **length}, [bytes(1 << 20)] * 64)) as (port, _):
        target = place(f"http://127.0.0.1:{port}/x.zarr")
        with pytest.raises(RemoteError, match=r"is refused \(more than 4,000,000 bytes come, which it can't have\)"):
            target.read_bytes(4_000_000)
        with pytest.raises(RemoteError, match="is refused"):
            children(target)


def test_a_compressed_reply_is_not_unpacked():
    import gzip

    packed = gzip.compress(bytes(1 << 22))
    with answering(lambda path: (200, {"content-encoding": "gzip"}, [packed])) as (port, seen):
        with pytest.raises(RemoteError, match=r"is refused .*the server compresses its answers, unasked"):
            place(f"http://127.0.0.1:{port}/x").read_bytes()
        assert seen[0]["accept-encoding"] == "identity"


def test_folders_without_end_are_refused():
    with answering(lambda path: (200, {"content-type": "text/html"}, [b'<a href="deeper/">'])) as (port, _):
        root = place(f"http://127.0.0.1:{port}/x")
        with pytest.raises(RemoteError, match=r"is refused \(the server lists folders without end\)"):
            sizes(root)


def test_a_page_s_links_are_what_lies_directly_in_the_folder():
    links = [
        "a", "./b/", "/x/c", "http://127.0.0.1:{port}/x/d", "?C=N", "../", "/", "http://other/x/e", "f/g", "#h",
        "mailto:me", "a%20b", "/y/i", "&#106;",
    ]  # fmt: skip
    ports = []

    def page(path):
        told = "".join(f'<A class="x" href="{link.format(port=ports[0])}">x</a>' for link in links)
        return 200, {"content-type": "text/html"}, [told.encode()]

    with answering(page) as (port, _):
        ports.append(port)
        names = [found.name for found in children(place(f"http://127.0.0.1:{port}/x"))]
    assert names == ["a", "a%20b", "b", "c", "d", "j"]


def test_a_server_that_tells_no_length_is_refused():
    with answering(lambda path: (200, {}, [b"x"])) as (port, _):
        file = place(f"http://127.0.0.1:{port}/x")
        with pytest.raises(RemoteError, match="the server does not tell the lengths of files"):
            file.status()


# ---- FIX D3: who has no token keeps no reader out ------------------------------------------------------------------

LONG = {"request": 1e6, "stalled": 1e6, "idle": 10**6}  # seconds: no test waits for these


@contextmanager
def limited(folder, token, listener=None, tls=(None, None), **limits):
    """(a server in a thread of this process, what opens connections to it and sends something)."""
    from hsae.cache.storage.connections import Limits, server

    listener = listener or socket.create_server(("127.0.0.1", 0))
    address, connections = listener.getsockname(), []
    running = server(application(folder, None, token), listener, Limits(**{**LONG, **limits}), *tls)
    thread = threading.Thread(target=running.run, daemon=True)

    def opened(sent=b"", count=1):
        made = [socket.create_connection(address, timeout=60) for _ in range(count)]
        connections.extend(made)
        for connection in made:
            connection.sendall(sent)
        return made

    thread.start()
    try:
        yield running, opened
    finally:
        for connection in connections:
            connection.close()
        running.should_exit = running.force_exit = True
        thread.join()


def closed(connection):
    """Whether the server closes it, sooner or later; what it still sends is read."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return True


def asked(token, path="/", more=""):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{more}\r\n".encode()


def answered(connection):
    """The status of the next answer, whose body is read."""
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status


@pytest.mark.parametrize(
    "sent",
    [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 5000,
     b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01"],
)  # fmt: skip
def test_a_connection_without_a_whole_request_is_closed(folder, token, sent):
    with limited(folder, token, request=0.1) as (_, opened):
        assert all(closed(connection) for connection in opened(sent, 3))


def test_a_further_request_must_come_whole_as_well_and_one_that_waits_is_closed_later(folder, token):
    with limited(folder, token, request=0.1) as (_, opened):
        (connection,) = opened(asked(token))
        assert answered(connection) == 200
        connection.sendall(b"GET ")
        assert closed(connection)
        (connection,) = opened(asked(token, more="Content-Length: 9\r\n") + b"1")  # a body that does not end
        assert answered(connection) == 200
        connection.sendall(b"2")
        assert closed(connection)
    with limited(folder, token, idle=0) as (_, opened):
        (connection,) = opened(asked(token))
        assert answered(connection) == 200 and closed(connection)


def test_a_tls_handshake_must_end(folder, token, tmp_path):
    with limited(folder, token, request=0.1, tls=self_signed(tmp_path)) as (_, opened):
        assert all(closed(connection) for connection in opened(b"", 3))
        assert all(closed(connection) for connection in opened(b"\x16\x03\x01\x00", 3))


def test_who_takes_nothing_of_an_answer_is_cut_off(tmp_path, token):
    store = tmp_path / "large.zarr"
    store.mkdir()
    (store / "zarr.json").touch()
    with (store / "zarr.json").open("r+b") as file:
        file.truncate(1 << 28)
    with limited(tmp_path, token, stalled=0.1) as (running, opened):
        connections = opened(asked(token, "/large.zarr/zarr.json"), 2)
        assert connections[0].recv(15) == b"HTTP/1.1 200 OK"
        wait_for(lambda: not running.open)
        assert all(closed(connection) for connection in connections)


def wait_for(condition):
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("over_tls", [False, True])
def test_silent_connections_make_room_for_readers(folder, token, tmp_path, over_tls):
    tls = self_signed(tmp_path) if over_tls else (None, None)
    with limited(folder, token, connections=4, tls=tls) as (running, opened), ExitStack() as stack:
        silent = opened(b"" if over_tls else b"GET / HTTP/1.1\r\n", 12)
        wait_for(lambda: len(running.open) == 4)
        readers = opened(count=3)
        if over_tls:
            context = ssl.create_default_context(cafile=tls[0])
            readers = [
                stack.enter_context(context.wrap_socket(reader, server_hostname="127.0.0.1")) for reader in readers
            ]
        for reader in readers:
            reader.sendall(asked(token))
            assert answered(reader) == 200
        more = opened(count=5)  # they push out each other, not those that showed the token
        for reader in readers:
            reader.sendall(asked(token))
            assert answered(reader) == 200
        assert all(closed(connection) for connection in silent + more[:-1])


def test_with_all_connections_busy_a_further_one_waits(tmp_path, token):
    store = tmp_path / "large.zarr"
    store.mkdir()
    with (store / "zarr.json").open("wb") as file:
        file.truncate(1 << 28)
    with limited(tmp_path, token, connections=2) as (running, opened):
        busy = opened(asked(token, "/large.zarr/zarr.json"), 2)
        assert all(connection.recv(15) == b"HTTP/1.1 200 OK" for connection in busy)
        (reader,) = opened(asked(token))
        reader.settimeout(0.2)
        with pytest.raises(TimeoutError):
            reader.recv(1)
        reader.settimeout(60)
        busy[0].close()
        assert answered(reader) == 200 and len(running.open) == 2


class Failing(socket.socket):
    """A listener that accepts nothing at first: no descriptor is left."""

    left = 3

    def accept(self):
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_descriptors_it_goes_on_later_and_says_nothing(folder, token, caplog):
    listener = Failing()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with limited(folder, token, listener, pause=0.01) as (_, opened):
        (connection,) = opened(asked(token))
        assert answered(connection) == 200 and listener.left == 0
    assert caplog.text == ""


def test_what_strangers_send_fills_no_log(folder, token, caplog):
    garbage = [
        b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"\xff" * 70000,
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\ngarbage\r\n",
        b"GET \xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ]  # fmt: skip
    with limited(folder, token) as (_, opened):
        for sent in garbage:
            assert all(closed(connection) for connection in opened(sent, 4))
    assert len([record for record in caplog.records if record.name in ("uvicorn.error", "asyncio")]) <= 1


@pytest.mark.parametrize(
    ("limit", "wanted", "most"), [((256, 256), 1024, 96), ((256, 4096), 1024, 1024), ((65, 65), 9, 1)]
)
def test_there_are_fewer_connections_than_descriptors(monkeypatch, limit, wanted, most):
    import resource

    from hsae.cache.storage.connections import most_connections

    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    monkeypatch.setattr(resource, "setrlimit", lambda _, raised: None)
    assert most_connections(wanted) == most


def test_over_tls_with_a_certificate_of_ones_own(folder, serve, token, tmp_path):
    certificate, key = self_signed(tmp_path)
    name = store_in(folder).name
    with serve(folder, "--certificate", str(certificate), "--key", str(key)) as (url, _, _):
        assert url.startswith("https://127.0.0.1:")
        with pytest.raises(RemoteError, match=r"is refused .*certificate verify failed"):
            verify(f"{url}/{name}")
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection(urlsplit(url).netloc, timeout=30, context=context)
        connection.request("GET", f"/{name}/zarr.json", headers={"Authorization": f"Bearer {token}"})
        assert connection.getresponse().read() == (store_in(folder) / "zarr.json").read_bytes()
        connection.close()


def self_signed(folder):
    """(certificate, key) for 127.0.0.1."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = made.add_extension(address, critical=True).sign(key, hashes.SHA256())
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(text)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "set HSAE_TOKEN to a secret that readers must know"), ("", "set HSAE_TOKEN to a secret"),
        ("short", "must be 16 or more ASCII"),
        ("with spaces in the middle", "without spaces"), ("ümlaut-in-the-secret", "must be 16 or more ASCII"),
    ],
)  # fmt: skip
def test_a_server_needs_a_good_token_and_does_not_show_a_bad_one(folder, token, message):
    with pytest.raises(UserError, match=message) as caught:
        serve(folder, token)
    assert not token or token not in str(caught.value)


def test_what_can_not_be_served_is_said(folder, token, tmp_path, server):
    with pytest.raises(StoreError, match=f"{tmp_path} is no store and holds none; stores are made by"):
        serve(tmp_path, token)
    with pytest.raises(UserError, match="TLS needs both --certificate and --key, or neither"):
        serve(folder, token, key=tmp_path / "key")
    with pytest.raises(UserError, match="nowhere can't be used for TLS"):
        serve(folder, token, key=tmp_path / "nowhere", certificate=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"can't listen at 127.0.0.1, port \d+ \(.*in use.*\); give another"):
        serve(folder, token, port=int(server[0].rsplit(":", 1)[1]))
    assert token not in "".join(server[1])


def test_without_the_packages_the_extra_is_named(folder, token, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn and starlette; run: pip install 'hsae\[serve\]'"):
        serve(folder, token)
    monkeypatch.delitem(modules, "hsae.cache.storage.http", raising=False)
    monkeypatch.setitem(modules, "aiohttp", None)
    with pytest.raises(
        StoreError, match=r"http://host/x: nothing installed reads http:// URLs; pip install 'hsae\[http\]'"
    ):
        _ = place("http://host/x").is_file()
