"""One HTTP request after the other: routes, bodies, answers, and the faults that were planted."""

import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from hub_store import RefusedError, Store

MAX_BODY = 256 << 20


class Wire(BaseHTTPRequestHandler):
    """Calls the method that a route names; subclasses list routes as (methods, pattern, name)."""

    hub: Store
    routes: tuple = ()
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def handle_any(self):
        self.close_connection = True  # a stopped server must not live on in open connections
        path = urlsplit(self.path).path
        try:
            fault = self.hub.take_fault(self.command, self.path)
            body = self.read_body()
            if isinstance(fault, int):
                raise RefusedError(fault, "planted")
            if fault in ("reset", "stall") and self.command in ("PUT", "POST"):
                self.note(0)
                return self.reset() if fault == "reset" else self.hub.stalled.wait(60)
            for methods, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split("|"):
                    return getattr(self, name)(*map(unquote, match.groups()), body=body, fault=fault)
            raise RefusedError(404, f"no such route: {self.command} {path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            raise RefusedError(413, "too large")
        return self.rfile.read(length)

    def note(self, status):
        with self.hub.lock:  # before answering: the client may be gone, the test looking, right after it
            self.hub.log.append((self.command, self.path, status))
            self.hub.headers.append((self.path, dict(self.headers)))

    def answer(self, content, status=200, headers=None, fault=None):
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.note(status)
        self.send_response(status)
        headers = {"Content-Length": str(len(payload)), "Connection": "close"} | (headers or {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip":
            middle = len(payload) // 2
            payload = payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
        if fault in ("reset", "truncate", "stall"):
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            self.hub.stalled.wait(60 if fault == "stall" else 0)
            return self.reset() if fault == "reset" else None
        self.wfile.write(payload)

    def ranged(self, content, fault, headers=None):
        """Answer with content, or the part of it that a Range header asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, 200, headers, fault)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            raise RefusedError(416, "out of range")
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}"} | (headers or {})
        self.answer(content[start : end + 1], 206, headers, fault)

    def reset(self):
        """End the connection with RST rather than FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115
