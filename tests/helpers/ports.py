"""Ports for the servers of tests."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """A port that is free and stays so: the kernel gives higher ones to whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # tests may have seeded other generators alike
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
