"""Proof by causing failures: faults drawn from a seed, against running epoch loops, and the account at the end."""
