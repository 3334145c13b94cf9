"""The tree of errors that loader_service raises on purpose, with the exit codes of the command line.

::

    LoaderServiceError                exit code 1; base class, never raised itself
    ├── OptionError                   2  an argument or option has an invalid value
    ├── DatasetError                  3  base class, never raised itself
    │   ├── DatasetNotFound              no LMDB environment exists at the path
    │   ├── DatasetUnfinished            the environment has no manifest
    │   ├── DatasetInvalid               the environment is damaged, foreign, or of another format
    │   ├── RecordError                  one record cannot be read or decoded
    │   └── TooManyBadRecords            more records are bad than max_bad allows
    ├── PictureError                  3  one image file cannot be used
    ├── PreprocessingFailed           1  preprocessing cannot continue, and no image is the reason
    ├── LinkError                     4  base class, never raised itself
    │   ├── AddressError                 an address cannot be parsed, bound or resolved
    │   ├── NoNodeError                  no node answered in time
    │   ├── NodeRefused                  a node answered, but its samples would have other bytes
    │   ├── NodeFull                     a node answered, but it takes no more clients
    │   ├── KeyFileError                 a key file, or a folder of them, is missing, malformed or open to others
    │   ├── KeyRefused                   client and node do not accept each other's keys
    │   └── MessageError                 a message breaks the protocol
    ├── SharedMemoryError             5  shared memory is too small or cannot be opened
    ├── SlotsHeld                     5  the caller's arrays hold every slot
    ├── PinnedMemoryError             5  CUDA cannot pin the slots
    ├── StateError                    6  a saved state does not fit this loader
    ├── LoopError                     1  base class, never raised itself: a loop uses a loader in a way that cannot work
    │   ├── NoEpochLeft                  all epochs of the loader have begun
    │   ├── IteratorReplaced             a newer iterator, or another place, has replaced this one
    │   ├── LoaderClosed                 the loader is closed
    │   ├── LoaderForked                 the loader was opened in another process
    │   └── LoaderBusy                   another thread takes a batch at this moment
    └── NodeFailed                    7  a node cannot start or cannot continue

An error keeps its facts as fields and builds one sentence from them: what is wrong, where, and what to do about it.
The command line prints the sentence and exits with the code; it prints no traceback for these errors.
"""

from __future__ import annotations

from pathlib import Path


def printable(text: str) -> str:
    """Return a text with every character escaped that a terminal would not show as itself, as in JSON: a backslash, u, four digits.

    Names and reasons come from other machines and from files. Control characters in them would move the cursor, change
    colours or begin new lines; others reverse the direction of the text. JSON with these escapes has the same meaning.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")  # two units for a character beyond U+FFFF, as in JSON
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


class LoaderServiceError(Exception):
    """The base of the tree; ``str(error)`` is a complete, printable sentence for a person."""

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))


class OptionError(LoaderServiceError):
    """An argument or option with an invalid value."""

    exit_code = 2

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option, self.value, self.expected = option, value, expected
        super().__init__(f"{option}={value!r} cannot work: expected {expected}.")


class DatasetError(LoaderServiceError):
    """The base of errors of a dataset on disk."""

    exit_code = 3


class DatasetNotFound(DatasetError):
    """No LMDB environment exists at the path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        super().__init__(
            f"there is no dataset at {path}: create one with `loader-service preprocess SRC OUT` "
            "(`make preprocess` in a checkout)."
        )


class DatasetUnfinished(DatasetError):
    """An environment without a manifest, which the writer stores last."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        super().__init__(
            f"the dataset at {path} has no manifest, so its preprocessing never finished: run `loader-service preprocess` "
            "again with the same arguments."
        )


class DatasetInvalid(DatasetError):
    """An environment that is damaged, was not made by this project, or has another format."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"the dataset at {path} cannot be used: {reason}.")


class RecordError(DatasetError):
    """A record that cannot be read or decoded."""

    def __init__(self, path: Path | str, record: int, reason: str, source: str = "") -> None:
        self.path, self.record, self.reason, self.source = Path(path), record, reason, source
        name = f" ({source})" if source else ""
        super().__init__(f"record {record}{name} of {path} cannot be used: {reason}.")


class TooManyBadRecords(DatasetError):
    """More bad records than ``max_bad`` allows to be replaced."""

    def __init__(self, bad: int, allowed: int, last: str) -> None:
        self.bad, self.allowed, self.last = bad, allowed, last
        super().__init__(
            f"{bad} records are bad, and max_bad allows {allowed}; the last one: {last} "
            "Repair the dataset (`loader-service verify PATH` lists every bad record), or raise max_bad."
        )


class PictureError(LoaderServiceError):
    """An image file that cannot become a record."""

    exit_code = 3

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = source, reason
        super().__init__(f"{source} cannot be used: {reason}.")


class PreprocessingFailed(LoaderServiceError):
    """Preprocessing cannot continue, and no image is the reason: a full disk, lost workers, a folder in use."""


class LinkError(LoaderServiceError):
    """The base of errors between a client and a node."""

    exit_code = 4


class AddressError(LinkError):
    """An address that cannot be parsed, bound or resolved."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"the address {address} cannot be used: {reason}.")


class NoNodeError(LinkError):
    """No node answered in time."""

    def __init__(self, addresses: tuple[str, ...], waited_s: float, doing: str = "no node answered") -> None:
        self.addresses, self.waited_s = addresses, waited_s
        super().__init__(
            f"{doing} within {waited_s:g} s at {', '.join(addresses)}: start one with `loader-service start`, "
            "or check the address with `loader-service status ADDRESS`."
        )


class NodeRefused(LinkError):
    """A node answered, but its samples would have other bytes than this client needs."""

    def __init__(self, address: str, what: str, need: object, have: object, remedy: str = "") -> None:
        self.address, self.what, self.need, self.have, self.remedy = address, what, need, have, remedy
        reason = f"its {what} is {have}, this client needs {need}"
        super().__init__(f"the node at {address} is refused: {reason}{'; ' + remedy if remedy else ''}.")


class NodeFull(LinkError):
    """A node answered, but it takes no more clients."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"the node at {address} is full: {reason}; wait until a client leaves, or use another node.")


class KeyFileError(LinkError):
    """A key file, or a folder of them, that is missing, malformed or open to others."""

    def __init__(self, path: Path | str, reason: str, what: str = "key file") -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"the {what} {path} cannot be used: {reason.rstrip('.')}.")


class KeyRefused(LinkError):
    """Client and node do not accept each other's keys."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"no connection to the node at {address}: {reason}.")


class MessageError(LinkError):
    """A message that breaks the protocol."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"a message breaks the protocol: {reason}.")


class SharedMemoryError(LoaderServiceError):
    """Shared memory that is too small or cannot be opened."""

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
    """No slot is free for the next batch, because the caller's arrays hold all of them."""

    exit_code = 5

    def __init__(self, slots: int) -> None:
        self.slots = slots
        super().__init__(
            f"all {slots} slots are held by arrays that the caller keeps: a batch's arrays are views of a slot, which is "
            "reused when the last of them is released. Copy the arrays to keep (`batch.images.copy()`), or raise prefetch."
        )


class PinnedMemoryError(LoaderServiceError):
    """CUDA does not register the slots as pinned memory, from which it copies to a GPU."""

    exit_code = 5

    def __init__(self, size: int, code: int) -> None:
        self.size, self.code = size, code
        super().__init__(
            f"CUDA could not register {size} bytes of slots as pinned memory (CUDA error {code}). Error 2 is a lack of "
            "memory: lower prefetch or batch_size. Error 712 is memory that is registered already, outside of TensorLoader."
        )


class StateError(LoaderServiceError):
    """A saved state that does not fit this loader."""

    exit_code = 6

    def __init__(self, what: str, saved: object, here: object) -> None:
        self.what, self.saved, self.here = what, saved, here
        super().__init__(f"the saved state does not fit this loader: its {what} is {saved}, here it is {here}.")


class LoopError(LoaderServiceError):
    """The base of errors of a loop that uses a loader in a way that cannot work."""


class NoEpochLeft(LoopError):
    """A loop over an epoch beyond the last one."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        super().__init__(
            f"this loader has epochs={epochs}, and all of them have begun: each `for` is one epoch. Raise epochs, or leave it "
            "out for a loader without an end; set_epoch() or load_state_dict() goes back."
        )


class IteratorReplaced(LoopError):
    """An iterator that is no longer its loader's newest."""

    def __init__(self) -> None:
        super().__init__(
            "this iterator of the loader is no longer valid, because a newer one, set_epoch() or load_state_dict() has "
            "replaced it: a loader has one place, so two loops would each get a part of the batches. Open a second Loader for a "
            "second loop."
        )


class LoaderClosed(LoopError):
    """A loader, or a wrapper around one, that is closed."""

    def __init__(self, what: str = "Loader") -> None:
        self.what = what
        super().__init__(
            f"this {what} is closed: open another one, and load the state of this one to continue its run."
        )


class LoaderForked(LoopError):
    """A loader in a process that did not open it, or on its way there (``process`` is None)."""

    def __init__(self, opened_by: int, process: int | None) -> None:
        self.opened_by, self.process = opened_by, process
        where = "another process" if process is None else f"process {process}, a copy of it"
        super().__init__(
            f"this Loader was opened by process {opened_by} and does not work in {where}: open a Loader "
            "in each process that reads batches. In a DataLoader, use num_workers=0, or loop over the Loader itself, whose "
            "workers are the node's."
        )


class LoaderBusy(LoopError):
    """A loader in whose iterator another thread is at work."""

    def __init__(self) -> None:
        super().__init__(
            "another thread takes a batch from this loader at this moment: open a Loader for each thread, or take the batches "
            "in one thread and pass them on through a queue."
        )


class NodeFailed(LoaderServiceError):
    """A node that cannot start or cannot continue."""

    exit_code = 7

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the node failed: {reason}.")
