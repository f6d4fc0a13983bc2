"""A `memdec` for runs of many small jobs: each is forked from a process that has the libraries, in the place of a start of 3 s.

    python tests/forked.py SOCKET    # this process, until it is ended

A job gets the words, folder, variables and streams of its caller, runs the command line as the installed program does, and
gives its exit status back.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CALLER = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as job:
    job.connect({address!r})
    socket.send_fds(job, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    status = job.recv(1)
sys.exit(status[0] if status else 1)
"""


@contextmanager
def program(folder: Path) -> Iterator[Path]:
    """Put a program `memdec` into a new folder and yield that folder; its jobs have one thread each."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as short:  # the name of a socket has at most some 100 characters
        address = Path(short) / "socket"
        server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
        try:
            while not address.exists():
                assert server.poll() is None
                time.sleep(0.05)
            (folder / "memdec").write_text(CALLER.format(python=sys.executable, address=str(address)))
            (folder / "memdec").chmod(0o755)
            yield folder
        finally:
            server.terminate()
            server.wait()


def serve(address: str) -> None:
    """Fork for every caller."""
    from memdec import cli
    from memdec.datastore import calibrate, index, keys, targets  # noqa: F401  what most jobs import
    from memdec.results import evaluate, score  # noqa: F401
    from memdec.training import adapt_vocab, stages  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the jobs here
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address + ".new")
        listener.listen(64)
        os.rename(address + ".new", address)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run(caller, cli.main)
            caller.close()


def run(caller: socket.socket, main: Callable[[], object]) -> None:
    """Do the job of a caller in this process, which ends with it."""
    words, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    sys.argv[1:], folder, variables = json.loads(words)
    for stream, copy in enumerate(streams):
        os.dup2(copy, stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(bytes([status]))
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
