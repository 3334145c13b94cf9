"""The part that lives in the trainer: the ledger of what was asked for and delivered, and the public Loader."""
