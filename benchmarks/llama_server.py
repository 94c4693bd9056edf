"""Run a llama.cpp server of the embedded model on a loopback port, in its own process.

python -m mbrl_text_env.benchmarks.llama_server PORT [THREADS [PARALLEL [CONTEXT]]]
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from mbrl_text_env.language_models.registry import embedded_gguf

_START_SECONDS = 60.0


@contextlib.contextmanager
def llama_server(*, threads: int = 2, parallel: int = 4, context: int = 8192) -> Iterator[str]:
    """Start a server on a free port and yield its URL; the server is killed at the end.

    It serves `parallel` requests at a time, which share `context` tokens. Raises RuntimeError if
    the server exits or does not answer within a minute.
    """
    port = free_port()
    process = start(port, threads, parallel, context)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def start(
    port: int, threads: int = 2, parallel: int = 4, context: int = 8192
) -> subprocess.Popen[bytes]:
    """Start the process of a server without waiting until it is ready."""
    arguments = map(str, (port, threads, parallel, context))
    return subprocess.Popen(  # noqa: S603 our own module with numbers as arguments
        [sys.executable, "-m", "mbrl_text_env.benchmarks.llama_server", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers; raises `RuntimeError` like `llama_server`."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 loopback
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(
        f"The llama.cpp server at {url} did not answer (exit code {process.poll()}). Is the wheel "
        "xllamacpp installed, and is the port free?"
    )


def free_port() -> int:
    """Find a free loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def serve(port: int, threads: int = 2, parallel: int = 4, context: int = 8192) -> None:
    """Serve until killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(embedded_gguf())
    params.n_parallel, params.n_ctx, params.port = parallel, context, port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
