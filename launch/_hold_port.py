"""Prints a free port of this host, and keeps it free for process 0 until standard input ends.

The socket never listens. Nothing else is given its port; but one that asks to share it, as the coordinator of
JAX does, may listen there.
"""

import socket
import sys

with socket.socket() as holder:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("", 0))
    print(holder.getsockname()[1], flush=True)
    sys.stdin.read()
