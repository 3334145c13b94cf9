"""What people would use instead, each in an environment of its own; none of it is a dependency of the project."""
