"""The format of log lines: text for people, or one JSON object per line for programs."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Final

import msgspec

from loader_service.errors import printable

FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")

# logging stores the caller's `extra` as attributes of the record, among its own: these are its own. Python 3.12 adds
# taskName; the other two are set by formatters.
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A formatter that writes one JSON object per record: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, ``fields``.

    ``fields`` holds what the caller passed as ``extra``, for example the worker and the record that the line is about.
    ``exception`` holds the traceback, if one was logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON in one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "fields": {name: value for name, value in record.__dict__.items() if name not in _STANDARD},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return printable(msgspec.json.encode(line, enc_hook=str).decode())  # the caller's `extra` may hold any type


class TextFormatter(logging.Formatter):
    """A formatter for people: time, logger and message in one printable line; a traceback, if one was logged, follows."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Return the line of a record."""
        return printable(super().formatMessage(record))


def set_up(style: str, level: str) -> None:
    """Send log lines to standard error.

    Args:
        style: one of FORMATS.
        level: minimum level, one of LEVELS.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)  # force: replace handlers set by an import
