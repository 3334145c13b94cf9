"""The entry ``python -m tools.verify``; it is the same as ``loader-service verify``."""

import sys

from loader_service.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
