"""The entry ``python -m tools.inspect``; it is the same as ``loader-service inspect``."""

import sys

from loader_service.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
