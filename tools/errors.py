"""The error that developers' tools raise on purpose."""

from __future__ import annotations

from loader_service.errors import LoaderServiceError


class ToolFailed(LoaderServiceError):
    """A tool cannot do its work; the message is a whole sentence for a person."""
