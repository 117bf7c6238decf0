"""The server process: model, scheduler and HTTP, from flags to an orderly end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cpm_bee.errors import InputError
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.loaded_model import load_model
from cpm_bee.language import said
from cpm_bee.serve.options import API_KEY_VARIABLE, ServeOptions

try:
    import uvicorn

    from cpm_bee.serve.app import Api
    from cpm_bee.serve.heap import return_large_blocks
    from cpm_bee.serve.host_check import is_loopback
    from cpm_bee.serve.metrics import Metrics
    from cpm_bee.serve.scheduler import Scheduler
except ImportError as error:
    raise InputError(
        f"serve.py needs the package {error.name}: pip install -e '.[serve]'"
    ) from None

_LOGGER = logging.getLogger(__name__)


def serve(options: ServeOptions) -> None:
    """Serve until a signal; then finish running requests and return.

    Raises:
        InputError: the address cannot be used, or as `load_model`.
    """
    return_large_blocks()
    listener = _listen(options)  # before the model is loaded, which may take minutes
    with listener:
        loaded = load_model(options)
        generator = Generator(loaded.base.model, loaded.base.tokenizer)
        max_tokens = options.max_tokens or generator.default_max_tokens()
        metrics = Metrics(options.model_name)
        scheduler = Scheduler(
            loaded.base.model, loaded.base.tokenizer, options, max_tokens, metrics
        )
        settings = json.dumps(loaded.settings, sort_keys=True)
        fingerprint = "fp_" + hashlib.sha256(settings.encode()).hexdigest()[:12]
        api = Api(options, scheduler, loaded.base.tokenizer, metrics, fingerprint)
        if options.key is None and not is_loopback(options.host):
            _LOGGER.warning(
                "--host %s without a key: whoever reaches this machine can use the model; "
                "set %s or give --api-key",
                options.host,
                API_KEY_VARIABLE,
            )
        scheduler.start()
        try:
            _Server(api, scheduler, options).run(sockets=[listener])
        finally:
            scheduler.stop()
            scheduler.join(10)


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals end it with status 0 after its requests have ended."""

    def __init__(self, api: Api, scheduler: Scheduler, options: ServeOptions) -> None:
        config = uvicorn.Config(
            api.make_app(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            # Longer than clients keep idle connections (httpx, and so openai: 5 s, uvicorn's own
            # default too), or a request could meet a connection that is just being closed.
            timeout_keep_alive=75,
            # What has not ended by then has been given an error, and only has to be sent.
            timeout_graceful_shutdown=int(options.grace) + 6,
        )
        super().__init__(config)
        self._api, self._scheduler, self._options = api, scheduler, options

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            said(f"{self._options.model_name} is served at http://{shown}:{port} (Ctrl-C ends it)"),
            flush=True,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.create_task(self._end_of_grace())
        await super().shutdown(sockets)
        timer.cancel()

    async def _end_of_grace(self) -> None:
        """Wait for the time of grace or a second signal, then fail what is left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.grace
        while loop.time() < deadline and not self._is_hurried:
            await asyncio.sleep(0.05)
        self._scheduler.stop()

    _is_hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Hazard: this interrupts any code of the main thread, so it takes no lock.
        self._is_hurried = self.should_exit
        self._api.is_draining = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but the process does not end by the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(options: ServeOptions) -> socket.socket:
    """A socket with the address of the flags, which listens once the model is there."""
    try:
        [family, _, _, _, address] = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {options.host}: {error}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"--host {options.host} --port {options.port}: {reason} (--port 0 takes a free one)"
        ) from None
    return listener
