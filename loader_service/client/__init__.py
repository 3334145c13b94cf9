"""The client, which runs in the trainer's process: the public Loader, its protocol core and its thread."""
