"""Starts the server and ends it in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cpm_bee.errors import InputError, describe
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.loaded_model import load_model
from cpm_bee.serve.options import ServeOptions

_LAST_REQUESTS = 30  # seconds that running requests get after a SIGTERM


def serve(options: ServeOptions) -> None:
    """Load the model and serve it until SIGINT or SIGTERM; running requests are finished first.

    Raises:
        InputError: a package is not installed, the address is taken, or the model cannot be loaded.
    """
    try:
        import uvicorn
        from fastapi import FastAPI

        from cpm_bee.serve.answering import Answering
        from cpm_bee.serve.app import make_app
        from cpm_bee.serve.metrics import Metrics
        from cpm_bee.serve.scheduler import Scheduler
    except ImportError as error:
        raise InputError(
            f"serve.py needs the package {error.name}: pip install -e .[serve] -c constraints.txt"
        ) from None
    listening = _listen(options.host, options.port)  # before loading, which takes long
    loaded = load_model(options)
    generator = Generator(loaded.base.model, loaded.base.tokenizer)
    generator.model.eval()
    scheduler = Scheduler(
        generator,
        max_waiting=options.max_waiting,
        max_tokens=generator.default_max_tokens(),
        max_length=options.max_length,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop, _LAST_REQUESTS)

    app = make_app(Answering(scheduler, options, Metrics(scheduler)), lifespan)
    host, port = listening.getsockname()[:2]
    print(f"serving {options.model_name} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_LAST_REQUESTS
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except (OSError, OverflowError) as error:
        reason = describe(error) if isinstance(error, OSError) else str(error)
        raise InputError(f"--host {host} --port {port}: {reason}; give another --port") from None
    return listening
