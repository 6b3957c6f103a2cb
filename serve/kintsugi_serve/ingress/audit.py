"""The audit trail: one JSON line for each request, in files that nothing here ever deletes."""

import logging
import os
import socket
import sys
from logging.handlers import WatchedFileHandler
from pathlib import Path

audit_logger = logging.getLogger("kintsugi.audit")
"""Who asked, what came in and went out by its hash, which model answered, and what was said of it."""


def keep_audit(folder: str | None) -> None:
    """Write the lines to a file of this process in `folder`, or to standard output; Ray's own logging drops them.

    The files are `audit-<host>-<process>.jsonl`. One that is moved away, by logrotate for example, is begun anew.

    Raises:
        OSError: the folder cannot be written.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        handler = WatchedFileHandler(path / f"audit-{socket.gethostname()}-{os.getpid()}.jsonl", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit_logger.handlers[:] = [handler]
    audit_logger.setLevel(logging.INFO)
    audit_logger.propagate = False
