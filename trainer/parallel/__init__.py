"""Processes and devices of a run, and the exchange of activations between the two towers."""
