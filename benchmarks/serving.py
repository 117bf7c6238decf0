"""Measure serve.py under load on loopback: requests/s, latency, CPU time, memory.

    python benchmarks/serving.py --data BEE.jsonl --load ckpts/pytorch_model.bin --answers 10000

Starts a server and asks it with `--clients` clients at once until there are `--answers` answers,
each client with the next of the records as soon as it has its answer. Half of them stream, and
every 20th request is given up by its client halfway. A client that is refused with 429 waits a
tenth of a second. Anything else that is no answer ends the measurement with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

SERVE = Path(__file__).resolve().parent.parent / "src" / "serve.py"
POINTS = 10  # of the measurement, at which memory is read
_GIVEN_UP_AFTER = 0.05  # seconds


class Answered(NamedTuple):
    """What a client saw of a request."""

    seconds: float
    tokens: int


class Load:
    """Clients of a server, and what they measured.

    Args:
        on_answer: is called with the number of answers so far.
    """

    def __init__(
        self,
        url: str,
        records: list[Any],
        fields: dict[str, Any],
        on_answer: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._url, self._fields, self._on_answer = url, fields, on_answer
        self._numbered: Iterator[tuple[int, Any]] = enumerate(itertools.cycle(records))
        self.answers: list[Answered] = []
        self.counts: Counter[str] = Counter()

    async def run(self, clients: int, answers: int) -> None:
        """Ask until there are so many answers."""
        await asyncio.gather(*(self._client(answers) for _ in range(clients)))

    async def _client(self, answers: int) -> None:
        # Hazard: not one `AsyncClient` for all. Requests that are given up leave its pool of
        # connections short, so others wait in it for seconds, which looks like the server's time.
        async with httpx.AsyncClient(base_url=self._url, verify=False, timeout=300) as http:
            while len(self.answers) < answers:
                number, record = next(self._numbered)
                body = {"record": record, "stream": number % 2 == 0, **self._fields}
                if number % 20 == 19:
                    await self._give_up(http, body)
                    continue
                while not await self._ask(http, body):
                    await asyncio.sleep(0.1)

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any]) -> bool:
        """Ask once; returns whether there was an answer."""
        began = time.monotonic()
        answer = await http.post("/v1/generate", json=body)
        if answer.status_code == 429:
            self.counts["refused with 429"] += 1
            return False
        if answer.status_code != 200:
            raise SystemExit(f"status {answer.status_code}: {answer.text}")
        seconds = time.monotonic() - began
        last = answer.text.splitlines()
        if body["stream"]:
            assert last[-2] == "data: [DONE]", last[-2:]
            usage = json.loads(last[-4].removeprefix("data: "))["usage"]
        else:
            usage = answer.json()["usage"]
        self.answers.append(Answered(seconds, usage["completion_tokens"]))
        self._on_answer(len(self.answers))
        return True

    async def _give_up(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            await http.post("/v1/generate", json=body, timeout=httpx.Timeout(_GIVEN_UP_AFTER))
        except httpx.TimeoutException:
            self.counts["given up by the client"] += 1


def memory_of(process: subprocess.Popen[str]) -> float:
    """The resident memory of a process, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [kilobytes] = re.findall(r"VmRSS:\s*(\d+) kB", status)
    return int(kilobytes) / 1024


def cpu_seconds_of(process: subprocess.Popen[str]) -> float:
    """The CPU time that a process has used, all its threads together."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="records, one per line")
    parser.add_argument("--load", type=Path, required=True, help="checkpoint")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--warm-up", type=int, default=500, help="answers before them")
    parser.add_argument("--beam-size", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=20)
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8") as file:
        records = [json.loads(line) for line in itertools.islice(file, 1000)]
    command = [sys.executable, str(SERVE), "--load", str(arguments.load.resolve()), "--port", "0"]
    fields = {"beam_size": arguments.beam_size, "max_length": arguments.max_length}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ) as server,
    ):
        assert server.stdout is not None
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            measure(server, found[0], records, fields, arguments)
        finally:
            server.send_signal(signal.SIGTERM)
        print(f"exit status after SIGTERM: {server.wait(60)}")


def measure(
    server: subprocess.Popen[str],
    url: str,
    records: list[Any],
    fields: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Warm up, then measure."""
    asyncio.run(Load(url, records, fields).run(arguments.clients, arguments.warm_up))
    memory, cpu = [memory_of(server)], cpu_seconds_of(server)

    def on_answer(count: int) -> None:
        if count * POINTS >= len(memory) * arguments.answers:
            memory.append(memory_of(server))
            print(f"{count:,} answers: {memory[-1]:.0f} MiB resident", flush=True)

    load = Load(url, records, fields, on_answer)
    began = time.monotonic()
    asyncio.run(load.run(arguments.clients, arguments.answers))
    seconds = time.monotonic() - began
    cpu = cpu_seconds_of(server) - cpu
    count = len(load.answers)
    rate = sum(own.tokens for own in load.answers) / seconds
    print(f"{arguments.clients} clients, {seconds:.0f} s, {fields}")
    print(f"{count:,} answers: {count / seconds:.1f} requests/s, {rate:.0f} tokens/s")
    print_latencies(load.answers)
    print(f"CPU time of the server: {1000 * cpu / count:.1f} ms an answer")
    print(", ".join(f"{n:,} {what}" for what, n in sorted(load.counts.items())) or "none refused")
    shown = ", ".join(f"{size:.0f}" for size in memory)
    print(f"resident memory of the server in MiB, before and after each tenth: {shown}")


def print_latencies(answers: Sequence[Answered]) -> None:
    """Quantiles of all answers, and of short and long ones alone."""
    longest = max(own.tokens for own in answers)
    for name, few, most in (("all", 0, longest), ("1 to 5", 1, 5), ("6 and more", 6, longest)):
        seconds = [own.seconds for own in answers if few <= own.tokens <= most]
        if len(seconds) > 1:
            quantiles = statistics.quantiles(seconds, n=100)
            p50, p90, p99 = (f"{1000 * quantiles[n - 1]:.0f}" for n in (50, 90, 99))
            print(
                f"latency in ms of answers with {name} tokens ({len(seconds):,}): median {p50}, "
                f"90 % {p90}, 99 % {p99}, max {1000 * max(seconds):.0f}"
            )


if __name__ == "__main__":
    main()
