"""The process in which libFuzzer runs: ``python -m tools.fuzz.libfuzzer KIND CORPUS [OPTION]...``, started by ``guided``.

An input's first byte chooses the decoder or the shape; the rest is the message or the JPEG.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import atheris

# atheris instruments the Python modules that are imported in this block, so it must be the first to import them.
with atheris.instrument_imports(include=["loader_service.wire.messages"]):
    from loader_service.wire import messages

from tools.fuzz.jpegs import SHAPES, compare
from tools.fuzz.messages import check_message


def try_jpeg(data: bytes) -> None:
    """Compare the decoders on a JPEG."""
    if not data:
        return
    how = data[0]
    height, width = SHAPES[how % len(SHAPES)]
    top, left = how % 13, how % 11
    compare(data[1:], (height, width), (top, left, height - top, width - left - how % 5), 3 + how % 2)


def try_message(data: bytes) -> None:
    """Decode a message."""
    if data:
        check_message(data[1:], messages.decode_from_client if data[0] else messages.decode_from_node)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"jpegs": try_jpeg, "messages": try_message}


def main() -> None:
    """Run libFuzzer until it has made its inputs, or until one breaks a rule."""
    kind, *arguments = sys.argv[1:]
    atheris.Setup([sys.argv[0], *arguments], TARGETS[kind])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
