"""Fault injection: faults drawn from a seed against running epoch loops, and a check of every sample at the end."""
