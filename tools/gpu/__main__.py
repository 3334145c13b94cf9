"""``python -m tools.gpu [--wheels DIR] [OPTIONS]``: prepare this Python, then run ``tools.gpu.command`` in it, by ``tools.gpu.start``."""

from __future__ import annotations

from tools.gpu.prepare import main

if __name__ == "__main__":
    main()
