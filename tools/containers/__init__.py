"""`make docker` and `make docker-scale`: the system as containers, run by Docker Compose."""
