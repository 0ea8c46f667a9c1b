"""An S3 service on this machine (moto) behind a delay, counting requests and bytes.

    python -m benchmarks.s3 --latency 0.04

prints its port and runs until its standard input closes. Requests come to a small proxy that waits, then asks moto.
Answers to GET and HEAD are kept and repeated, since moto takes milliseconds of CPU for each: what is measured is the
client and the delay, not moto. ``GET /_counts`` tells and resets the counts, without delay.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import logging
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
PROXY_HEADERS = (
    "connection",
    "content-length",
    "transfer-encoding",
    "date",
    "server",
)  # headers that the proxy sets itself


class Proxy:
    """Answers for moto, after a delay."""

    def __init__(self, moto: tuple[str, int], latency: float) -> None:
        self._moto, self._latency = moto, latency
        self._kept: dict[tuple[str, str, str], bytes] = {}
        self.requests = self.bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one after the other."""
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = lines[0].split(" ")
                headers = dict(line.split(": ", 1) for line in lines[1:] if line)
                low = {name.lower(): value for name, value in headers.items()}
                if low.get("expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(low.get("content-length", 0)))
                writer.write(await self._answer(method, target, headers, low.get("range", ""), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    async def _answer(self, method: str, target: str, headers: dict[str, str], part: str, body: bytes) -> bytes:
        if target == "/_counts":
            data = json.dumps({"requests": self.requests, "bytes": self.bytes}).encode()
            self.requests = self.bytes = 0
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
        reading, key = method in ("GET", "HEAD"), (method, target, part)
        if not reading:
            self._kept.clear()
        await asyncio.sleep(self._latency)
        answer = self._kept.get(key, b"") or await asyncio.to_thread(self._ask, method, target, headers, body)
        self.requests += 1
        if reading:
            self._kept[key] = answer
            self.bytes += len(answer) - answer.index(b"\r\n\r\n") - 4
        return answer

    def _ask(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
        connection = http.client.HTTPConnection(*self._moto)
        connection.request(method, target, body or None, {**headers, "Connection": "close"})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        head = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        head += [f"{name}: {value}" for name, value in answer.getheaders() if name.lower() not in PROXY_HEADERS]
        size = answer.getheader("Content-Length", "0") if method == "HEAD" else str(len(data))
        head += [f"Content-Length: {size}", "", ""]
        return "\r\n".join(head).encode("latin-1") + data


async def _serve(moto: tuple[str, int], latency: float) -> None:
    server = await asyncio.start_server(Proxy(moto, latency).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until standard input closes."""
    from moto.server import ThreadedMotoServer

    parser = argparse.ArgumentParser(prog="python -m benchmarks.s3", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latency", type=float, default=0.04, help="seconds before each answer (default: 0.04)")
    args = parser.parse_args(argv)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    asyncio.run(_serve(moto.get_host_and_port(), args.latency))
    threading.Thread(target=moto.stop, daemon=True).start()


@contextmanager
def running(latency: float) -> Iterator[str]:
    """Run the service in a process of its own; gives its address."""
    command = [sys.executable, "-m", "benchmarks.s3", "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def counts(address: str) -> dict[str, int]:
    """Return requests and bytes since the last call."""
    with urllib.request.urlopen(f"{address}/_counts") as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
