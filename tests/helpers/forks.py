"""Run commands in forks of a process that has already imported torch, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, folder, files = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        for number, path in enumerate(files, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            exec(code, {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs code like ``python -c``.

    Args:
        folder: Where standard output and error go meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [folder / "stdout", folder / "stderr"]
        command = [sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([code, str(folder), [str(file) for file in self._files]]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in self._files))
