"""A stand-in for the Hugging Face hub on loopback: the routes and headers that a download meets."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin")  # what the hub keeps in LFS: a redirect, a SHA-256 as ETag


class Hub(ThreadingHTTPServer):
    """Serves `files`; its other attributes say how it fails. `asked` holds what came in."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commit = {}, "c0ffee" * 6 + "c0ff"  # (repository, file) → bytes
        self.refuse = {}   # repository → (status, X-Error-Code or "")
        self.token = None  # when set, all else is answered 401
        self.cut = {}      # file → bytes after which the connection closes; then 503 until emptied
        self.spoil = set()  # files whose content is not what their hash says
        self.asked = []    # (method, file or owner/name/file@revision, Range header)
        self.leaked = []   # tokens that came to the store
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self):
        """Where large files lie: another host, as at the real hub, which is owed no token."""
        return f"http://localhost:{self.server_address[1]}"

    def add(self, repository, folder, names):
        for name in names:
            self.files[repository, name] = (folder / name).read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, wanted_range = self.server, self.headers.get("Range")
        if self.path.startswith("/lfs/"):
            owner, model, name = self.path.removeprefix("/lfs/").split("/", 2)
            repository = f"{owner}/{model}"
            hub.asked.append(("GET" if body else "HEAD", name, wanted_range))
            hub.leaked += [self.headers["Authorization"]] if self.headers["Authorization"] else []
            return self.content(name, hub.files[repository, name], wanted_range, body)
        owner, model, _, revision, name = self.path.removeprefix("/").split("/", 4)
        repository = f"{owner}/{model}"
        hub.asked.append(
            ("GET" if body else "HEAD", f"{repository}/{name}@{revision}", wanted_range))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.head(401, {"X-Error-Message": "Invalid credentials"})
        if repository in hub.refuse:
            status, code = hub.refuse[repository]
            return self.head(status, {"X-Error-Code": code} if code else {})
        if not any(repository == known for known, _ in hub.files):
            return self.head(404, {"X-Error-Code": "RepoNotFound"})
        if (repository, name) not in hub.files:
            return self.head(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
        content = hub.files[repository, name]
        if name.endswith(LARGE):
            return self.head(302, {
                "Location": f"{hub.store}/lfs/{repository}/{name}", "X-Repo-Commit": hub.commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        self.content(name, content, wanted_range, body)

    def content(self, name, content, wanted_range, body):
        hub = self.server
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name in hub.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if body and hub.cut.get(name) == 0:
            return self.head(503, {})
        start = int(wanted_range.removeprefix("bytes=").split("-")[0]) if wanted_range else 0
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if start else 200, headers, len(content) - start)
        if body:
            if name in hub.cut:
                self.wfile.write(content[start:hub.cut[name]])
                hub.cut[name] = 0
                self.close_connection = True
                return
            self.wfile.write(content[start:])

    def head(self, status, headers, length=0):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
