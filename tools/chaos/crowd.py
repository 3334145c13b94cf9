"""A crowd: a process that is many idle clients of one node, until its standard input ends.

It prints a line for each step: `clients N` once N clients are welcome, and ends when the node's room for clients is used
up or the node does not answer any more Hellos.
"""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
import zmq

from loader_service.wire import messages, sockets
from loader_service.wire.auth import client_keys, secure_client

ANSWER_S: Final = 5.0
"""A node that has welcomed a client answers the next Hello within milliseconds."""


@click.command()
@click.argument("address")
@click.argument("clients", type=int)
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of the clients' keys.")
def main(address: str, clients: int, keys: Path | None) -> None:
    """Greet a node under many identities, print how many it has welcomed, and stay until standard input ends."""
    own = client_keys(keys / "node.key", keys / "client.secret") if keys else None
    context: zmq.Context[Any] = zmq.Context()
    poller, waiting = zmq.Poller(), set()
    hello = messages.encode(messages.Hello(messages.PROTOCOL, "crowd"))
    everyone = []
    for _ in range(clients):
        dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(messages.CLIENT_ID_BYTES))
        if own:
            secure_client(dealer, own)
        dealer.connect(address)
        dealer.send(hello)
        poller.register(dealer, zmq.POLLIN)
        waiting.add(dealer)
        everyone.append(dealer)
    welcome, deadline = 0, time.monotonic() + ANSWER_S
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for dealer, _ in poller.poll(int(left_s * 1000) + 1):
            message = messages.decode_from_node(dealer.recv())
            welcome += isinstance(message, messages.Welcome)
            waiting.discard(dealer)
            poller.unregister(dealer)
            deadline = time.monotonic() + ANSWER_S
    click.echo(f"clients {welcome}")
    sys.stdin.read()
    for dealer in everyone:
        sockets.try_send(dealer, [messages.encode(messages.Bye())])
        dealer.close(linger=sockets.BYE_LINGER_MS)
    context.term()


if __name__ == "__main__":
    main()
