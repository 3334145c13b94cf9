"""The entry ``python -m tools.export``; it is the same as ``loader-service export``."""

import sys

from loader_service.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
