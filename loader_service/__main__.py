"""The entry of ``python -m loader_service``, the same as the command ``loader-service``."""

from loader_service.cli import main

main()
