"""Before torchrun on several machines: whether the first one can be reached, and whether it is us.

    python -m cpm_bee.distributed.rendezvous ADDRESS PORT SECONDS

Prints flags for torchrun. By itself torchrun would wait for ten minutes and end in a traceback; it
takes a machine for another one where its name stands for another of its addresses; and it tells the
others that name, which they may not know.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import time

from cpm_bee.errors import InputError, RunError, run_command

_QUIET = 5.0  # seconds of waiting that are not worth a message


def rendezvous_flags(address: str, port: int, seconds: float) -> str:
    """Flags that tell torchrun whether it is the first machine, and its address; "" on loopback.

    The machine that has the address is the first one. Others wait until somebody listens there.

    Raises:
        InputError: no machine has this name.
        RunError: nobody listens there in time.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"MASTER_ADDR={address}: {reason}; it must be the name or address of the first "
            "machine, as the others see it"
        ) from None
    numbers = {str(info[4][0]) for info in found}
    if all(ipaddress.ip_address(number.partition("%")[0]).is_loopback for number in numbers):
        return ""
    if any(map(_is_own, numbers)):
        return _flags(address, seconds, is_host=True)
    begin = time.monotonic()
    told = False
    while time.monotonic() < begin + seconds:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address, port), timeout=5) as connection,
        ):
            return _flags(connection.getsockname()[0], seconds, is_host=False)
        if not told and time.monotonic() > begin + min(_QUIET, seconds / 2):
            told = True
            text = f"waiting up to {seconds:.0f} seconds for {address}:{port}, the first machine"
            print(text, file=sys.stderr, flush=True)
        time.sleep(0.2)
    raise RunError(
        f"nobody answers at {address}:{port} within {seconds:.0f} seconds (RDZV_TIMEOUT): "
        "MASTER_ADDR must be the first machine's address on all machines, the run must have been "
        "started there too, and a firewall must let port MASTER_PORT pass"
    )


def _flags(own: str, seconds: float, *, is_host: bool) -> str:
    return f"--rdzv_conf=is_host={int(is_host)},join_timeout={seconds:.0f} --local_addr={own}"


def _is_own(number: str) -> bool:
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((number, 0))
        except OSError:
            return False
    return True


def _main() -> None:
    address, port, seconds = sys.argv[1:]
    print(rendezvous_flags(address, int(port), float(seconds)))


if __name__ == "__main__":
    run_command(_main)
