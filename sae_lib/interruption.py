"""SIGINT (Ctrl-C) and SIGTERM as a wish: they wait until the work under way is in a state that can be kept."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from tqdm.auto import tqdm

from sae_lib.distributed import rank


class Interruption:
    """As a context: the first signal is kept in `signal`, the next one acts as it would have without.

    Outside the main thread, where Python takes no signals, and for a signal that the process ignores, nothing changes.
    """

    def __init__(self):
        self.signal: int | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()

    def act(self, message: str) -> None:
        """If a signal came: KeyboardInterrupt with the message; for SIGTERM, print it and exit with status 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if self.signal == signal.SIGTERM:
            if not rank():
                tqdm.write(message, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
