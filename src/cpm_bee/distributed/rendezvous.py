"""Checks before torchrun starts: whether the port is free, and whether the first machine answers.

    python -m cpm_bee.distributed.rendezvous MASTER_ADDR MASTER_PORT NNODES SECONDS

The agents (torchrun processes) of a run meet at MASTER_ADDR:MASTER_PORT, where the first machine's
agent opens a store. Without these checks, torchrun waits more than a minute if another program has
the port, or ten minutes for an unreachable machine, and fails with a traceback. Here

- the machine that has the address MASTER_ADDR is the first one, and checks that the port is free;
- the others wait until something listens there.

The output is flags for torchrun: whether this machine is the first one, which torchrun gets wrong
when a host name resolves to another of its addresses, and the address under which the others see
it, since they may not know its host name. For a loopback address the output is empty: several
agents on one machine agree among themselves which of them is the first.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import sys
import time

from cpm_bee.cli import run_command
from cpm_bee.errors import InputError, RunError

_QUIET = 5.0  # seconds to wait before printing a message about it


def rendezvous_flags(address: str, port: int, num_nodes: int, seconds: float) -> str:
    """Returns flags for torchrun; "" for one machine or a loopback address.

    Raises:
        InputError: no machine has this name, another program has the port, or none is given.
        RunError: nothing listens there in time.
    """
    if num_nodes == 1:
        if port != 0:  # torchrun takes any free port for 0
            _check_port_is_free(port)
        return ""
    if port == 0:
        raise InputError("MASTER_PORT=0: several machines need a port, the same on all of them")
    addresses = _resolve(address, port)
    if all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses):
        return ""
    if any(map(_is_own, addresses)):
        _check_port_is_free(port)
        return _flags(address, seconds, is_host=True)
    return _flags(_wait_for_host(address, port, seconds), seconds, is_host=False)


def _resolve(address: str, port: int) -> set[str]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"MASTER_ADDR={address}: {reason}; it must be the name or address of the first "
            "machine, as the others see it"
        ) from None
    return {str(info[4][0]) for info in found}


def _wait_for_host(address: str, port: int, seconds: float) -> str:
    """Wait until something listens there; returns this machine's address on that connection."""
    begin = time.monotonic()
    announced = False
    while time.monotonic() < begin + seconds:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address, port), timeout=5) as connection,
        ):
            return str(connection.getsockname()[0])
        if not announced and time.monotonic() > begin + min(_QUIET, seconds / 2):
            announced = True
            text = f"waiting up to {seconds:.0f} seconds for {address}:{port}, the first machine"
            print(text, file=sys.stderr, flush=True)
        time.sleep(0.2)
    raise RunError(
        f"no answer from {address}:{port} within {seconds:.0f} seconds (RDZV_TIMEOUT): "
        "MASTER_ADDR must be the first machine's address on all machines, the run must have been "
        "started there too, and no firewall may block port MASTER_PORT"
    )


def _flags(own: str, seconds: float, *, is_host: bool) -> str:
    return f"--rdzv_conf=is_host={int(is_host)},join_timeout={seconds:.0f} --local_addr={own}"


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _check_port_is_free(port: int) -> None:
    """Raise `InputError` if torchrun could not listen on a port of all addresses."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As torchrun does: a connection that has just been closed is no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
                probe.listen()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = (error.strerror or str(error)).lower()
                raise InputError(
                    f"MASTER_PORT={port}: {reason}; perhaps another run uses it. Choose another "
                    f"port, the same on all machines, for example MASTER_PORT={_free_port()}"
                ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _main() -> None:
    address, port, num_nodes, seconds = sys.argv[1:]
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"MASTER_PORT={port}: must be a whole number up to 65535")
    print(rendezvous_flags(address, int(port), int(num_nodes), float(seconds)))


if __name__ == "__main__":
    run_command(_main)
