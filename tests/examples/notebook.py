"""Execute examples/notebook.ipynb as a person would, with interrupts and a kernel that dies; print the cells' output.

It runs in the examples' environment, which has nbclient, and not in the tests' own.
"""

from __future__ import annotations

import os
import signal
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

SET_UP, NETWORK, RESTORE, LEARN, GO_ON, LEDGER = range(6)


class Person(NotebookClient):
    """A client that sends its kernel a signal when a cell has printed a number of steps."""

    signal_after: tuple[int, int] = (0, 0)
    steps = 0

    def process_message(self, message, cell, cell_index):
        text = message["content"].get("text", "")
        sys.stdout.write(text)
        self.steps += text.count(" ids ")
        number, steps = self.signal_after
        if number and self.steps >= steps:
            self.signal_after = (0, 0)
            os.kill(self.km.provisioner.pid, number)
        return super().process_message(message, cell, cell_index)

    def run(self, *numbers: int) -> None:
        for number in numbers:
            self.steps = 0
            index, cell = [(i, cell) for i, cell in enumerate(self.nb.cells) if cell.cell_type == "code"][number]
            self.execute_cell(cell, index)
            for output in cell.outputs:
                if output.output_type == "error":
                    sys.stdout.write(f"{output.ename}\n")


def main() -> None:
    notebook = nbformat.read(sys.argv[1], as_version=4)
    first = Person(notebook, timeout=60, allow_errors=True, kernel_name="python3")
    with first.setup_kernel():
        first.run(SET_UP, NETWORK, RESTORE)
        first.signal_after = (signal.SIGINT, 6)
        first.run(LEARN)
        sys.stdout.write("-- interrupted; continue the epoch\n")
        first.run(GO_ON)
        first.signal_after = (signal.SIGINT, 6)
        sys.stdout.write("-- the next epoch\n")
        first.run(LEARN)
        sys.stdout.write("-- interrupted; run the cell again\n")
        first.run(LEARN, LEDGER)
        first.signal_after = (signal.SIGKILL, 12)
        sys.stdout.write("-- the kernel dies\n")
        try:
            first.run(LEARN)
        except DeadKernelError:
            sys.stdout.write("DeadKernelError\n")
    sys.stdout.write("-- a new kernel\n")
    second = Person(notebook, timeout=60, kernel_name="python3")
    with second.setup_kernel():
        second.run(SET_UP, NETWORK, RESTORE, LEARN)


main()
