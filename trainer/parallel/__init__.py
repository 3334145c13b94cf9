"""The processes and devices of a run: who they are, and how the two towers exchange activations between them."""
