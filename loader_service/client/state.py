"""Where a loader is, as a few plain values: what ``state_dict`` gives and ``load_state_dict`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from loader_service.errors import StateError
from loader_service.types import MAX_EXCLUDED, Count, Position, View

FORMAT: Final = 1
_IDENTITY: Final = ("format", "fingerprint", "golden", "seed", "view")
"""What must be the same for the rest of a run to be the rest of that run; everything else may change."""


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in a run.

    Fields:
        epoch, position: the first global position that has not been returned.
        seed, view, fingerprint, golden: which run it is.
        exclusions: the records that are replaced as bad, ascending.
        format: of this struct.
    """

    epoch: Count
    position: Position
    seed: Count
    view: View
    fingerprint: str
    golden: str
    exclusions: Annotated[tuple[Position, ...], msgspec.Meta(max_length=MAX_EXCLUDED)]
    format: int = FORMAT

    def plain(self) -> dict[str, Any]:
        """Only what JSON has: dicts, lists, numbers and strings."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values

    def resumed(self, saved: Mapping[str, Any], count: int) -> State:
        """The saved place, checked against this loader's.

        Args:
            saved: what :meth:`plain` gave, perhaps through a file.
            count: the dataset's number of records.

        Raises:
            StateError: it is malformed, or of another dataset, view, seed or version.
        """
        try:
            state = msgspec.convert(dict(saved), State)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise StateError("form", f"not this version's ({error})", f"format {FORMAT}") from error
        for what in _IDENTITY:
            if getattr(state, what) != getattr(self, what):
                raise StateError(what, getattr(state, what), getattr(self, what))
        if state.position > count or any(record >= count for record in state.exclusions):
            raise StateError("position or exclusions", "beyond its end", f"a dataset of {count} records")
        return state
