"""Commands at terminals of their own, for tests that type and read."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time

PROGRAM = (sys.executable, "-m", "mlx_lm_server")
SIZE = (30, 120)
LIMIT_S = 30


class AtTerminal:
    """A command that has a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [*PROGRAM, *arguments])
        termios.tcsetwinsize(self._fd, SIZE)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Reads until the pattern is there, and forgets what came up to it."""
        ends_s = time.monotonic() + LIMIT_S
        while (found := re.search(pattern, self.output[-2000:])) is None:
            assert time.monotonic() < ends_s, (pattern, self.output[-2000:])
            if select.select([self._fd], [], [], 0.1)[0]:
                self.output += os.read(self._fd, 65536).decode(errors="replace")
        self.output = self.output[found.end() :]

    def interrupt(self) -> None:
        self.type("\x03")

    def exit_code(self) -> int:
        """Waits for the end; what does not end is killed."""
        ends_s = time.monotonic() + LIMIT_S
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > ends_s:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(found[1])
