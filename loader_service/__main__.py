"""``python -m loader_service`` is ``loader-service``."""

from loader_service.cli import main

main()
