"""A process that has chosen Triton's interpreter and imported what tests need, and forks one process a test file.

Imports take several seconds of processor time, more than the tests of most files. A host is started by the first file
that asks for it and ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import ROOT

OPTIONS = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-q", "--tb=short", "-m", "not gpu"]

SECONDS = 900
"""What a file may take."""


@cache
def _host() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.support.interpreter_host"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def run_in_interpreter(file: str) -> tuple[int, str]:
    """Run the tests of a file under the interpreter; pytest's exit status and what it printed."""
    host = _host()
    assert host.stdin is not None
    assert host.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        host.stdin.write(json.dumps([file, str(log)]) + "\n")
        host.stdin.flush()
        status = host.stdout.readline()
        return int(status or -1), log.read_text() if log.exists() else "the host of the interpreter has ended"


def _serve() -> None:
    """Read requests until whoever makes them ends; each is run by a fork, which has imported but computed nothing."""
    import hypothesis  # noqa: F401
    import pytest
    import torch._dynamo
    import torch._inductor.config  # noqa: F401
    import triton.language  # noqa: F401

    import infllm_pass  # noqa: F401

    for line in sys.stdin:
        file, log = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            with open(log, "w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                status = pytest.main([*OPTIONS, file])
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
