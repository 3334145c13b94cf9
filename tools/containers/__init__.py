"""`make docker` and `make docker-scale`: the system as containers, really run."""
