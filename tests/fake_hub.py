"""A hub on this machine, for tests: lists and serves the files of data sets, with faults on request."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMITS = ["0123456789" * 4, "abcdefabcd" * 4]  # the newest is the last of `commits`


class FakeHub:
    """files: {"owner/name": {path: content}}, and {"": {path: content}} for files elsewhere, at /plain/path.

    faults: {path or "api": [fault, …]}, one for each request; later ones are answered well. A fault is an
    HTTP status ("503"), drop (half of the content, then the connection closes) or garbage (other bytes, as
    many).
    asked: every path whose content was asked for. newest: the commit of main.
    """

    def __init__(self, files, faults=None, seconds_a_megabyte=0.0):
        self.files, self.faults, self.pace = files, faults or {}, seconds_a_megabyte
        self.asked: list[str] = []
        self.newest = COMMITS[0]

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/")
        if kind == "api":
            self.api(rest.removeprefix("datasets/"))
        elif kind == "plain":
            self.serve(self.hub.files[""], rest)
        else:
            repo, _, place = rest.partition("/resolve/")
            commit, _, path = place.partition("/")
            self.serve(self.hub.files[repo], path, commit)

    def fault(self, path) -> str:
        faults = self.hub.faults.get(path, [])
        return faults.pop(0) if faults else ""

    def api(self, what):
        repo, tree, _ = what.partition("/tree/")
        repo, _, revision = repo.partition("/revision/")
        if repo not in self.hub.files:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif fault := self.fault("api"):
            self.answer(int(fault))
        elif not tree:
            commit = revision if revision in COMMITS else self.hub.newest
            self.answer(200, json.dumps({"id": repo, "sha": commit, "tags": [], "siblings": []}).encode())
        else:
            entries = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
            for path, content in self.hub.files[repo].items():
                entry = {"type": "file", "path": path, "size": len(content)}
                entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                if not path.endswith(".txt"):  # large and binary files are kept apart, with their sha256
                    entry["lfs"] = {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    }
                entries.append(entry)
            self.answer(200, json.dumps(entries).encode())

    def serve(self, files, path, commit=""):
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit}
        if self.command == "HEAD":
            self.answer(200, content, **headers)
            return
        self.hub.asked.append(path)
        fault = self.fault(path)
        if fault.isdigit():
            self.answer(int(fault))
            return
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = (b"x" * len(content) if fault == "garbage" else content)[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = len(body) // 2 if fault == "drop" else len(body)
        for at in range(0, sent, 1 << 20):
            self.wfile.write(body[at : min(at + (1 << 20), sent)])
            threading.Event().wait(self.hub.pace)  # tests replace time.sleep
        self.close_connection = fault == "drop"
