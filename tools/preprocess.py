"""The entry ``python -m tools.preprocess``; it is the same as ``loader-service preprocess``."""

import sys

from loader_service.cli import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])
