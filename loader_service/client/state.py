"""The saved state of a loader: the few plain values of ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from loader_service.errors import StateError
from loader_service.types import MAX_EXCLUDED, Count, Position, View

FORMAT: Final = 1
_IDENTITY: Final = ("format", "fingerprint", "golden", "seed", "view")
"""The fields that decide the samples of a run, so that they must be equal to continue it; all others may differ."""


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in a run.

    Fields:
        epoch, position: the first global position that has not been returned.
        seed, view, fingerprint, golden: identity of the run.
        exclusions: bad records that are replaced, ascending.
        format: version of this struct.
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
        """Return the state as JSON has it: dicts, lists, numbers and strings."""
        # Tuples become lists, structs become dicts.
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values

    def resumed(self, saved: Mapping[str, Any], count: int) -> State:
        """Return a saved state, checked against this loader's own.

        Args:
            saved: the result of :meth:`plain`, perhaps read from a file.
            count: number of records of the dataset.

        Raises:
            StateError: the state is malformed, or of another dataset, view, seed or version.
        """
        try:
            state = msgspec.convert(dict(saved), State)  # checks every field, since a file can hold anything
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise StateError("form", f"not this version's ({error})", f"format {FORMAT}") from error
        # Checked before the bounds below: against another dataset the identity is the better error.
        for what in _IDENTITY:
            if getattr(state, what) != getattr(self, what):
                raise StateError(what, getattr(state, what), getattr(self, what))
        if state.position > count or any(record >= count for record in state.exclusions):
            raise StateError("position or exclusions", "beyond its end", f"a dataset of {count} records")
        return state
