"""The error of the developers' tools."""

from __future__ import annotations

from loader_service.errors import LoaderServiceError


class ToolFailed(LoaderServiceError):
    """Raised when a tool cannot do its work, or a check of it fails; the message is a whole sentence for people."""
