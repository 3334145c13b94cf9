"""The wire: messages, sockets, shared-memory slots and keys. Knows no images."""
