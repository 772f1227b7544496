"""A hub on this machine, for tests: lists and serves the files of data sets, and fails as it is told."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789" * 4


class FakeHub:
    """files: {"owner/name": {path: content}}, and {"": {path: content}} for what is no data set, at /plain/path.

    faults: {path: [fault, …]}, one for each time that the file is asked for; then it is served well. They are
    drop, stall, 503, short (a wrong length), long, garbage (other bytes), whole (ignores that a
    range was asked for), "whole, drop".
    asked: every (path, first byte) in order.
    """

    def __init__(self, files, faults=None, seconds_a_megabyte=0.0):
        self.files, self.faults, self.pace = files, faults or {}, seconds_a_megabyte
        self.asked: list[tuple[str, int]] = []
        self.closing = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
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
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        kind, _, rest = unquote(url.path).strip("/").partition("/")
        if kind == "api":
            self.api(rest.removeprefix("datasets/"), parse_qs(url.query))
        elif kind == "datasets":  # as on the hub, the file itself is elsewhere
            repo, path = rest.split(f"/resolve/{COMMIT}/")
            self.answer(302, Location=f"{self.hub.url}/cdn/{repo}//{path}")
        elif kind == "cdn":
            self.serve(*rest.split("//"))
        else:
            self.serve("", rest)

    def api(self, what, query):
        repo, tree, _ = what.partition("/tree/")
        if repo not in self.hub.files:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            return
        if self.hub.faults.get("api"):
            self.answer(int(self.hub.faults["api"].pop(0)))
            return
        if not tree:
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "tags": [], "siblings": []}).encode())
            return
        entries = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
        for path, content in self.hub.files[repo].items():
            entry = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if not path.endswith(".txt"):  # the hub keeps large and binary files apart, and states their sha256
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        page, size = int(query.get("page", ["0"])[0]), 3
        more = {}
        if len(entries) > (page + 1) * size:
            more = {
                "Link": f'<{self.hub.url}/api/datasets/{repo}/tree/{COMMIT}?recursive=True&page={page + 1}>; rel="next"'
            }
        self.answer(200, json.dumps(entries[page * size : (page + 1) * size]).encode(), **more)

    def serve(self, repo, path):
        content = self.hub.files[repo][path]
        faults = self.hub.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.asked.append((path, first))
        if fault == "503":
            self.answer(503)
            return
        if "whole" in fault:
            first = 0
        if first and first >= len(content):
            self.answer(416)
            return
        body = {"garbage": b"x" * len(content), "long": content + b"more"}.get(fault, content)[first:]
        stated = len(body) // 2 if fault == "short" else len(body)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(stated))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{first + stated - 1}/{first + stated}")
        self.end_headers()
        cut = fault in ("stall", "short") or "drop" in fault
        sent = len(body) // 2 if cut else len(body)
        for at in range(0, sent, 1 << 20):
            if self.hub.closing.is_set():
                return
            self.wfile.write(body[at : min(at + (1 << 20), sent)])
            time.sleep(self.hub.pace)
        self.wfile.flush()
        if fault == "stall":
            self.hub.closing.wait(20)
        if fault == "stall" or "drop" in fault:
            self.close_connection = True
