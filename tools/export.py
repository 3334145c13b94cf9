"""``python -m tools.export`` is ``loader-service export``."""

import sys

from loader_service.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
