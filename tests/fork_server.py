"""`ldm` for shells that call it dozens of times: a program that has everything imported and forks at each call.

`python -m tests.fork_server SOCKET` serves until it is killed. `client` is the text of an executable that hands its
arguments, environment, folder and streams to the server and ends with the exit code of the fork.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [json.dumps([dict(os.environ), os.getcwd(), *sys.argv[1:]]).encode()], [0, 1, 2])
code = server.recv(1)
sys.exit(code[0] if code else 70)
"""
_LONGEST_CALL = 2**16
# torch imports the last two itself in the first step of an optimizer: 900 modules, a second and a half.
_PRELOADED = (
    "ldm_cli.cli.app",
    "ldm_cli.recipe.load",
    "rich.console",
    *(f"ldm_cli.stages.{name}" for name in ("evaluate", "precompute", "sample", "train_ar", "train_clip")),
    *(f"ldm_cli.stages.{name}" for name in ("train_unet", "train_vae", "dry_run", "convert", "report")),
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
)


def client(path: Path) -> str:
    """An executable that calls the server at `path`."""
    return _CLIENT.format(python=sys.executable, path=str(path))


def serve(path: Path) -> None:
    """Fork at each call; `path` is there once calls are heard."""
    for module in _PRELOADED:
        import_module(module)
    from ldm_cli.cli.app import program

    program()
    gc.freeze()  # no fork looks for garbage among what is imported

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork but its client
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen()
    Path(f"{path}.new").rename(path)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    code = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        call, streams, _, _ = socket.recv_fds(connection, _LONGEST_CALL, 3)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        environment, folder, *arguments = json.loads(call)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        from ldm_cli.cli.app import run

        code = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(bytes([code]))
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
