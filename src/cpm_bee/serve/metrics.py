"""Figures of the server for Prometheus, with vLLM's names behind `cpm_bee_`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cpm_bee.serve.work import Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Metrics:
    """All figures, with the label `model_name`; may be updated by any thread."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._running = self._gauge(
            "num_requests_running", "Records that are being generated, each in a slot."
        )
        self._waiting = self._gauge("num_requests_waiting", "Records that wait for a slot.")
        self._cache = self._gauge(
            "kv_cache_usage_perc", "Share of the memory for keys and values in use, 0 to 1."
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts answered.")
        self._generated = self._counter("generation_tokens", "Tokens of answers written.")
        self._success = Counter(
            "cpm_bee_request_success",
            "Requests that ended, by reason: stop, length, abort (client left, error, timeout).",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            "cpm_bee_request_refused",
            "Requests that were answered with an error, by status.",
            ["model_name", "status"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to the step that starts it.", _SECONDS
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Time per token of an answer after the first one.",
            _STEP_SECONDS,
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _SECONDS
        )
        self._sizes = (
            self._histogram("request_prompt_tokens", "Tokens of a request's prompts.", _TOKENS),
            self._histogram("request_generation_tokens", "Tokens of a request's answers.", _TOKENS),
        )

    def _gauge(self, name: str, help: str) -> Gauge:
        gauge = Gauge(f"cpm_bee_{name}", help, ["model_name"], registry=self._registry)
        return gauge.labels(self._model_name)

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(f"cpm_bee_{name}", help, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"cpm_bee_{name}", help, ["model_name"], registry=self._registry, buckets=buckets
        )
        return histogram.labels(self._model_name)

    def state(self, running: int, waiting: int, cache_share: float) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._cache.set(cache_share)

    def started(self, request: Request, began: float) -> None:
        """Note that the first token of a record is there.

        Args:
            began: when its step began, in seconds of `time.monotonic`.
        """
        if request.first_token is None:
            request.first_token = time.monotonic()
            self._queue_time.observe(max(began - request.arrived, 0))
            self._first_token.observe(request.first_token - request.arrived)

    def ended(self, request: Request, reason: str | None = None) -> None:
        """Note the end of a request.

        Args:
            reason: "abort" if it has no answer; else it is that of its answers.
        """
        if reason is None:
            outputs = [item.output for item in request.items if item.output is not None]
            reason = "length" if any(output.was_cut for output in outputs) else "stop"
            assert request.ended is not None
            seconds = request.ended - request.arrived
            generated = request.generated_tokens
            self._latency.observe(seconds)
            self._prompt_tokens.inc(request.prompt_tokens)
            self._generated.inc(generated)
            for histogram, count in zip(
                self._sizes, (request.prompt_tokens, generated), strict=True
            ):
                histogram.observe(count)
            if request.first_token is not None and generated > 1:
                since = request.ended - request.first_token
                self._per_token.observe(since / (generated - 1))
        self._success.labels(self._model_name, reason).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(self._model_name, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
