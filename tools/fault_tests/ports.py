"""Free TCP ports that stay free until the program they are meant for listens to them.

- A port that was looked for and let go may be another program's a moment later: the system gives
  it to whoever asks for any port. Tests and training processes beside this one ask all the time.
- A held port is nobody else's, yet who is told of it may listen to it: its socket reuses addresses
  and never listens.

Alternatives considered: ports of a fixed range, which two runs of this tool on one machine share.
"""

import socket


def held_port() -> socket.socket:
    """Return a socket that holds a free port of the loopback interface until it is closed.

    Raises OSError where no port is free.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def port_of(held: socket.socket) -> int:
    """Return the number of the port that a socket holds."""
    return int(held.getsockname()[1])
