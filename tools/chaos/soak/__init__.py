"""A long run without faults, to see that memory stays where it is."""
