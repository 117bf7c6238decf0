"""Metrics for Prometheus; the names are vLLM's behind `cpm_bee_`, so dashboards need one change."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cpm_bee.serve.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        running = Gauge(
            "cpm_bee_num_requests_running", "Requests that are answered", registry=registry
        )
        running.set_function(lambda: scheduler.num_running)
        waiting = Gauge("cpm_bee_num_requests_waiting", "Requests that wait", registry=registry)
        waiting.set_function(lambda: scheduler.num_waiting)
        self.prompt_tokens = Counter(
            "cpm_bee_prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.generation_tokens = Counter(
            "cpm_bee_generation_tokens", "Tokens written", registry=registry
        )
        self.success = Counter(
            "cpm_bee_request_success",
            "Answered requests, by the reason for their end",
            ["finished_reason"],
            registry=registry,
        )
        self.errors = Counter(
            "cpm_bee_request_errors", "Refused or failed requests", ["status"], registry=registry
        )
        self.first_token = Histogram(
            "cpm_bee_time_to_first_token_seconds",
            "From the arrival of a streamed request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "cpm_bee_e2e_request_latency_seconds",
            "From the arrival of a request to its end",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
