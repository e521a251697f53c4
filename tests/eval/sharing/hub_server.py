"""A stand-in for the hub: repositories in memory, behind the requests that huggingface_hub's client makes."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_standin_token"


class Hub:
    """Repositories by `models/owner/name` or `datasets/owner/name`: path -> bytes, and how many commits there were."""

    def __init__(self):
        self.repositories, self.private, self.commits, self.refuses = {}, set(), 0, None

    def sha(self, name):
        files = self.repositories[name]
        state = [(path, blob_id(files[path])) for path in sorted(files)]
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()


def blob_id(data):
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    @property
    def address(self):
        return f"http://{self.headers['Host']}"

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "unauthorised"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked.get("organization", "me"), asked["name"]
            key = f"{asked.get('type') or 'model'}s/{owner}/{name.rpartition('/')[2]}"
            if key in self.hub.repositories:
                return self.reply(409, {"error": "there already", "url": f"{self.address}/{key}"})
            self.hub.repositories[key] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(key)
            return self.reply(200, {"url": f"{self.address}/{key.removeprefix('models/')}"})
        if self.path.startswith("/api/validate-yaml"):
            return self.reply(200, {"errors": [], "warnings": []})
        key, what = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        files = self.hub.repositories[key]
        if what == "preupload":
            return self.reply(
                200, {"files": [self.upload_mode(files, file["path"]) for file in json.loads(body)["files"]]}
            )
        if self.hub.refuses is not None and self.hub.commits >= self.hub.refuses:
            return self.reply(400, {"error": "no more"})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.commits += 1
        oid = self.hub.sha(key)
        self.reply(200, {"commitUrl": f"{self.address}/{key.removeprefix('models/')}/commit/{oid}", "commitOid": oid})

    def upload_mode(self, files, path):
        there = {"oid": blob_id(files[path])} if path in files else {}
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, **there}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if (
            match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(/revision/[^/]+|/tree/.*)?", path)
        ) is not None:
            key, more = match.groups()
            if key not in self.hub.repositories:
                return self.reply(404, {"error": "none"}, X_Error_Code="RepoNotFound")
            files = self.hub.repositories[key]
            if more and more.startswith("/tree/"):
                return self.reply(
                    200,
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
                        for name, data in files.items()
                    ],
                )
            if more and more.rpartition("/")[2] not in ("main", self.hub.sha(key)):
                return self.reply(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            owner_name = key.split("/", 1)[1]
            return self.reply(200, {"id": owner_name, "sha": self.hub.sha(key), "siblings": siblings, "private": False})
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match is None:
            return self.reply(404, {"error": f"no {path}"})
        key = match[1] if match[1].startswith("datasets/") else f"models/{match[1]}"
        data = self.hub.repositories.get(key, {}).get(match[2])
        if data is None:
            return self.reply(404, X_Error_Code="EntryNotFound")
        self.reply(200, data, ETag=f'"{blob_id(data)}"', X_Repo_Commit=self.hub.sha(key))


@contextlib.contextmanager
def serving():
    """A hub at an address of this machine: (hub, its address)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = Hub(), True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
