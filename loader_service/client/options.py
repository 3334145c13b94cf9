"""What a loader's arguments may be; everything else is an :class:`OptionError` with the argument's name in it."""

from __future__ import annotations

import msgspec

from loader_service.errors import OptionError
from loader_service.types import VIEWS, View


def check_view(view: str | View) -> None:
    """Refuse what is no view."""
    if not isinstance(view, View) and view not in VIEWS:
        raise OptionError("view", view, "a View, or the name of one: train, center, ten-crop, whole")


def view_of(view: str | View, crop: int | None, side: int) -> View:
    """The view that is asked for, of records of ``side`` pixels."""
    chosen = view if isinstance(view, View) else View.named(view, side)
    if crop is not None and chosen.kind == "whole":
        raise OptionError("crop", crop, "no crop beside the view whole, which shows all of a record")
    least, wanted = (0, chosen.crop) if crop is None else (1, crop)
    if chosen.kind != "whole" and not least <= wanted <= side:
        raise OptionError("crop", wanted, f"1 to {side} pixels, the side of this dataset's records")
    return chosen if crop is None else msgspec.structs.replace(chosen, crop=crop)


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise OptionError(option, value, " or ".join(choices))


def check_range(option: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number between two, both included."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(option, value, f"a whole number from {low} to {high}")
