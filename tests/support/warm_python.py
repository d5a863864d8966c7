"""A `python` for shell scripts under test: their programs are forked off the warm server.

    with WarmPython() as python:
        subprocess.run(["bash", "script.sh"], env={**os.environ, **python.variables})

- The script runs `"$REAL_PYTHON" -IS "$WARM_PYTHON" ARGUMENTS` in place of `python ARGUMENTS`. That
  program sends arguments, environment and folder through a socket, and prints what comes back.
- The ranks of `k2train.launch --nproc-per-node N` are forked without the launcher. What a launcher
  does is for tests that start one.
- Output comes at the end, and no signal is passed on: for programs that are run to their end.
"""

import json
import shutil
import socketserver
import sys
import tempfile
import threading
from pathlib import Path
from typing import Self

from tests.support import forkserver

CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["WARM_SOCKET"])
    asked = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    server.sendall(json.dumps(asked).encode() + b"\\n")
    told = json.loads(server.makefile("rb").readline())
for stream, text in ((sys.stdout, told["out"]), (sys.stderr, told["err"])):
    stream.write(text)
    stream.flush()
sys.exit(told["code"] if told["code"] >= 0 else 128 - told["code"])
"""
LAUNCHER, COUNT = ["-m", "k2train.launch"], "--nproc-per-node"


def without_launcher(arguments: list[str]) -> tuple[int, list[str]]:
    """Number of ranks, and the arguments of each; 1 and the same for what launches nothing."""
    if arguments[:2] != LAUNCHER or COUNT not in arguments:
        return 1, arguments
    place = arguments.index(COUNT)
    return int(arguments[place + 1]), arguments[place + 2 :]


class _Request(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())
        ranks, arguments = without_launcher(asked["arguments"])
        done = forkserver.run(arguments, asked["environment"], Path(asked["folder"]), ranks)
        told = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
        self.wfile.write(json.dumps(told).encode() + b"\n")


class WarmPython:
    """A context manager that answers such programs, one at a time."""

    def __enter__(self) -> Self:
        # A socket has to have a short name.
        self.folder = Path(tempfile.mkdtemp(prefix="k2train-warm-"))
        client, address = self.folder / "client.py", self.folder / "socket"
        client.write_text(CLIENT, encoding="utf-8")
        # Here, not in the thread: it belongs to all tests of this process.
        forkserver.server()
        self._answers = socketserver.UnixStreamServer(str(address), _Request)
        self._thread = threading.Thread(target=self._answers.serve_forever, daemon=True)
        self._thread.start()
        self.variables = {
            "REAL_PYTHON": sys.executable,
            "WARM_PYTHON": str(client),
            "WARM_SOCKET": str(address),
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.shutdown()
        self._thread.join()
        self._answers.server_close()
        shutil.rmtree(self.folder)
