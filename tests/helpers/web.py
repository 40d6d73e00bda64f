"""A web server on loopback that can be slow, break off, or send byte ranges."""

import http.server
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch


class Server(http.server.ThreadingHTTPServer):
    """Serves the bytes in ``files``; ``sent`` cuts a body short of its announced length."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent: int | None = None
        self.stall = threading.Event()
        self.stall.set()
        self.announce = self.ranges = True
        self.requests: list[str] = []

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def url(self, name: str) -> str:
        return f"{self.host}/models/{name}"

    def put(self, name: str, content: Any, **options: Any) -> str:
        """Serve bytes as they are, and anything else as torch.save writes it."""
        if not isinstance(content, bytes):
            file = io.BytesIO()
            torch.save(content, file, **options)
            content = file.getvalue()
        self.files[f"/models/{name}"] = content
        return self.url(name)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        part = self.headers.get("Range")
        self.server.requests.append(" ".join(filter(None, (self.path, part))))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404, "Not Found")
            return
        etag = f'"{sha256(content).hexdigest()}"'
        first = int(re.fullmatch(r"bytes=(\d+)-.*", part)[1]) if part and self.server.ranges else 0  # type: ignore[index]
        if first >= len(content) > 0:
            self.send_error(416)
            return
        if self.headers.get("If-Range", etag) != etag:
            first = 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if self.server.announce:
            self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", "0" * 40)  # as the Hugging Face hub sends it
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[first : first + 1000])
        self.wfile.flush()
        self.server.stall.wait(30)
        self.wfile.write(content[first + 1000 : self.server.sent])

    def do_CONNECT(self) -> None:
        self.server.requests.append(self.path)
        self.send_error(403, "This proxy connects nowhere")

    def log_message(self, *args: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.stall.set()
        server.shutdown()
