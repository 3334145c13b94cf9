"""Every error that loader_service raises on purpose, in one tree.

::

    LoaderServiceError                exit code 1; never raised itself
    ├── OptionError                   2  an argument or option that cannot work
    ├── DatasetError                  3  never raised itself
    │   ├── DatasetNotFound              there is no environment at that path
    │   ├── DatasetUnfinished            an environment without a manifest
    │   ├── DatasetInvalid               damaged, foreign, or of another format
    │   ├── RecordError                  one record cannot be read or decoded
    │   └── TooManyBadRecords            more are bad than may be replaced
    ├── PictureError                  3  one picture file cannot be used
    ├── PreprocessingFailed           1  preprocessing cannot go on, for a reason outside of the pictures
    ├── LinkError                     4  never raised itself
    │   ├── AddressError                 an address that cannot be parsed, bound or resolved
    │   ├── NoNodeError                  nobody answered within the time given
    │   ├── NodeRefused                  a node is there, but serves other bytes
    │   ├── KeyFileError                 a key file is missing, malformed or open to others
    │   ├── KeyRefused                   client and node do not accept each other's keys
    │   └── MessageError                 a message that breaks the protocol's grammar
    ├── SharedMemoryError             5  no room, or no access, for the slots
    ├── SlotsHeld                     5  every slot is held by the caller's arrays
    ├── StateError                    6  a saved state that does not fit this loader
    └── NodeFailed                    7  a node could not start or go on

An error keeps its facts as fields and builds its sentence from them: what was wrong, where, and what to do.
The command line prints the sentence and ends with the exit code; it never shows a traceback for one of these.
"""

from __future__ import annotations

from pathlib import Path


class LoaderServiceError(Exception):
    """Base of every deliberate error; ``str(error)`` is a whole sentence for a person."""

    exit_code = 1


class OptionError(LoaderServiceError):
    """An argument or option that cannot work."""

    exit_code = 2

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option, self.value, self.expected = option, value, expected
        super().__init__(f"{option}={value!r} cannot work: expected {expected}.")


class DatasetError(LoaderServiceError):
    """Something is wrong with a dataset on disk."""

    exit_code = 3


class DatasetNotFound(DatasetError):
    """There is no environment at that path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        super().__init__(
            f"there is no dataset at {path}: make one with `make preprocess` or `python -m tools.preprocess SRC OUT`."
        )


class DatasetUnfinished(DatasetError):
    """An environment without a manifest: its writer never finished."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        super().__init__(f"the dataset at {path} has no manifest, so its preprocessing never finished: run it again.")


class DatasetInvalid(DatasetError):
    """An environment that is damaged, foreign, or of another format."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"the dataset at {path} cannot be used: {reason}.")


class RecordError(DatasetError):
    """One record cannot be read or decoded."""

    def __init__(self, path: Path | str, record: int, reason: str, source: str = "") -> None:
        self.path, self.record, self.reason, self.source = Path(path), record, reason, source
        name = f" ({source})" if source else ""
        super().__init__(f"record {record}{name} of {path} cannot be used: {reason}.")


class TooManyBadRecords(DatasetError):
    """More records are bad than the caller allowed to be replaced."""

    def __init__(self, bad: int, allowed: int, last: str) -> None:
        self.bad, self.allowed, self.last = bad, allowed, last
        super().__init__(
            f"{bad} records are bad, and max_bad allows {allowed}; the last: {last} "
            "Mend the dataset (`python -m tools.verify` names all), or allow more."
        )


class PictureError(LoaderServiceError):
    """One picture file cannot be turned into a record."""

    exit_code = 3

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = source, reason
        super().__init__(f"{source} cannot be used: {reason}.")


class PreprocessingFailed(LoaderServiceError):
    """Preprocessing cannot go on, for a reason outside of the pictures: no room, no workers, a folder in use."""


class LinkError(LoaderServiceError):
    """Something is wrong between a client and a node."""

    exit_code = 4


class AddressError(LinkError):
    """An address that cannot be parsed, bound or resolved."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"the address {address} cannot be used: {reason}.")


class NoNodeError(LinkError):
    """Nobody answered within the time given."""

    def __init__(self, addresses: tuple[str, ...], waited_s: float, doing: str = "no node answered") -> None:
        self.addresses, self.waited_s = addresses, waited_s
        super().__init__(
            f"{doing} within {waited_s:g} s at {', '.join(addresses)}: start one with `loader-service start`, "
            "or look at what runs there with `loader-service status ADDRESS`."
        )


class NodeRefused(LinkError):
    """A node is there, but would give other bytes than this client must have."""

    def __init__(self, address: str, what: str, need: object, have: object, remedy: str = "") -> None:
        self.address, self.what, self.need, self.have, self.remedy = address, what, need, have, remedy
        reason = f"its {what} is {have}, this client needs {need}"
        super().__init__(f"the node at {address} is refused: {reason}{'; ' + remedy if remedy else ''}.")


class KeyFileError(LinkError):
    """A key file is missing, malformed or open to others."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"the key file {path} cannot be used: {reason}.")


class KeyRefused(LinkError):
    """Client and node do not accept each other's keys."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"no connection to the node at {address}: {reason}.")


class MessageError(LinkError):
    """A message that breaks the protocol's grammar."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"a message that is not of this protocol: {reason}.")


class SharedMemoryError(LoaderServiceError):
    """No room, or no access, for the slots."""

    exit_code = 5

    def __init__(
        self, what: str, need_bytes: int | None = None, have_bytes: int | None = None, remedy: str = ""
    ) -> None:
        self.what, self.need_bytes, self.have_bytes, self.remedy = what, need_bytes, have_bytes, remedy
        sizes = ""
        if need_bytes is not None and have_bytes is not None:
            sizes = f" (need {need_bytes / 2**20:.0f} MiB, have {have_bytes / 2**20:.0f} MiB)"
        super().__init__(f"{what}{sizes}{': ' + remedy if remedy else ''}.")


class SlotsHeld(LoaderServiceError):
    """Every slot is held by the caller's arrays, so that no batch can be made."""

    exit_code = 5

    def __init__(self, slots: int) -> None:
        self.slots = slots
        super().__init__(
            f"all {slots} slots are held by arrays that the caller keeps: a batch's arrays are views of a slot, which "
            "comes back when the last of them is let go. Copy what must be kept (`batch.images.copy()`), or raise prefetch."
        )


class StateError(LoaderServiceError):
    """A saved state that does not fit this loader."""

    exit_code = 6

    def __init__(self, what: str, saved: object, here: object) -> None:
        self.what, self.saved, self.here = what, saved, here
        super().__init__(f"the saved state does not fit this loader: its {what} is {saved}, here it is {here}.")


class NodeFailed(LoaderServiceError):
    """A node could not start or go on."""

    exit_code = 7

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the node failed: {reason}.")
