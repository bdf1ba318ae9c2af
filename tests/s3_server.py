"""A real S3 API on loopback (moto's server), and a proxy before it that behaves as a bad network and a busy S3 do."""

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from components import buckets

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
}


def point(monkeypatch: pytest.MonkeyPatch, endpoint: str, **variables: str) -> None:
    """Let this process and those it starts use the S3 at ``endpoint`` and nothing of the person's own."""
    for name in (*buckets.PASSED_ON, "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", **variables}.items():
        monkeypatch.setenv(name, value)


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server that begins empty."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    endpoint = f"http://{host}:{port}"
    reset(endpoint)
    try:
        yield endpoint
    finally:
        server.stop()


def reset(endpoint: str) -> None:
    """Let the server forget everything."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().status == 200


def client_of(endpoint: str) -> Any:
    """A boto3 client that asks the server itself, whatever the environment says."""
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )


def upload(client: Any, folder: Path, bucket: str, prefix: str = "") -> None:
    """Every file below ``folder``."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}{file.relative_to(folder)}", Body=file.read_bytes())


@dataclass
class Fault:
    """What becomes of one answer: refused with a status, cut after some bytes, changed, or slow."""

    status: int = 0
    code: str = "InternalError"
    late: bool = False  # with a status: what was asked for is done all the same
    cut_at: float | None = None  # share of the body that arrives
    flip: bool = False  # one byte of the body is another
    pause_s: float = 0.0


@dataclass
class Proxy:
    """Passes requests on to ``upstream``; ``fault`` says what becomes of each."""

    upstream: str
    fault: Callable[[str, str, int], Fault | None]  # (method, path with query, how often it was asked before)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The proxy's endpoint."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()

    def next_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self.guard:
            asked = self.seen[method, path]
            self.seen[method, path] += 1
            self.requests.append((method, path, headers))
            return self.fault(method, path, asked)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    host = proxy.upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self._body()
            headers = {name: value for name, value in self.headers.items() if name.lower() not in DROPPED}
            fault = proxy.next_fault(self.command, self.path, headers) or Fault()
            time.sleep(fault.pause_s)
            if fault.status:
                proxy.faults[fault.code] += 1
                if fault.late:
                    self._ask(body, headers)
                text = ERROR.format(code=fault.code, message="as injected").encode()
                self._answer(fault.status, {"Content-Type": "application/xml"}, text, Fault())
                return
            answer, content = self._ask(body, headers)
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in DROPPED}
            self._answer(answer.status, kept, content, fault, length=answer.getheader("Content-Length"))

        def _ask(self, body: bytes, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
            upstream = http.client.HTTPConnection(host, timeout=60)
            upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = upstream.getresponse()
            return answer, answer.read()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":  # pyarrow's uploads are
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(
            self, status: int, headers: dict[str, str], body: bytes, fault: Fault, length: str | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
            self.end_headers()
            if fault.flip and body:
                proxy.faults["flip"] += 1
                body = body[:-1] + bytes([body[-1] ^ 1])
            if fault.cut_at is None:
                self.wfile.write(body)
                return
            proxy.faults["cut"] += 1
            self.wfile.write(body[: int(len(body) * fault.cut_at)])
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


DROPPED = {"connection", "content-length", "transfer-encoding"}
