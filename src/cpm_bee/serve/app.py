"""The HTTP interface: which path does what, and how errors look."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.generate.prompt import Prompt
from cpm_bee.records import ANSWER, Record, options_of
from cpm_bee.serve import api_errors, messages, request_body, work
from cpm_bee.serve.api_errors import ApiError, invalid
from cpm_bee.serve.body_limit import BodyLimit
from cpm_bee.serve.host_check import HostCheck, hosts_of
from cpm_bee.serve.metrics import Metrics
from cpm_bee.serve.openai_form import Form
from cpm_bee.serve.options import ServeOptions
from cpm_bee.serve.parameters import Parameters, take_parameters
from cpm_bee.serve.pending import ClientLeft, Pending
from cpm_bee.serve.records_form import RecordsForm
from cpm_bee.serve.request_body import Body
from cpm_bee.serve.responses import EventStream, JsonResponse, error_response
from cpm_bee.serve.scheduler import Scheduler
from cpm_bee.tokenizer import Tokenizer

_PAGE = Path(__file__).with_name("page.html")
# The page is one file: it loads nothing, and talks to this server only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Api:
    """The endpoints over a scheduler.

    Args:
        fingerprint: of the model with its delta.
    """

    def __init__(
        self,
        options: ServeOptions,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: Metrics,
        fingerprint: str,
    ) -> None:
        self._options, self._scheduler, self._metrics = options, scheduler, metrics
        self._encoder = Encoder(tokenizer)
        self._fingerprint = fingerprint
        self._started = int(time.time())
        self.is_draining = False

    def make_app(self) -> FastAPI:
        app = FastAPI(title="CPM-Bee", docs_url=None, redoc_url=None, openapi_url=None)
        v1 = APIRouter(prefix="/v1", dependencies=[Depends(self._check_key)])
        v1.add_api_route("/chat/completions", self.chat_completions, methods=["POST"])
        v1.add_api_route("/completions", self.completions, methods=["POST"])
        v1.add_api_route("/generate", self.generate, methods=["POST"])
        v1.add_api_route("/models", self.models, methods=["GET"])
        v1.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        app.include_router(v1)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/", self.page, methods=["GET"])
        app.add_exception_handler(ApiError, self._on_api_error)
        app.add_exception_handler(HTTPException, self._on_http_error)
        app.add_exception_handler(ClientLeft, self._on_client_left)
        app.add_exception_handler(Exception, self._on_error)
        app.add_middleware(BodyLimit, most=self._options.max_body)
        hosts = hosts_of(self._options.host, self._options.host_names)
        app.add_middleware(HostCheck, hosts=hosts, on_error=self._note)
        return app

    # ------------------------------------------------------------------ small endpoints

    async def models(self) -> Response:
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        if name != self._options.model_name:
            raise api_errors.unknown_model(name, self._options.model_name)
        return JsonResponse(self._model())

    def _model(self) -> dict[str, Any]:
        options = self._options
        return {
            "id": options.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "cpm_bee",
            "max_prompt_tokens": options.max_prompt_tokens,
            "max_answer_tokens": options.max_answer_tokens,
            "fingerprint": self._fingerprint,
        }

    async def health(self) -> Response:
        if self.is_draining or not self._scheduler.is_alive:
            return error_response(api_errors.shutting_down())
        return JsonResponse({"status": "ok", "model": self._options.model_name})

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        text = _PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    # ------------------------------------------------------------------ answers

    async def chat_completions(self, http: Request) -> Response:
        body = await self._body(http)
        record = messages.take_chat(body)
        parameters = take_parameters(body, self._options, openai=True)
        body.finish()
        return await self._answer_openai(http, [record], parameters, is_chat=True)

    async def completions(self, http: Request) -> Response:
        body = await self._body(http)
        records = messages.take_completions(body, self._options.max_records)
        parameters = take_parameters(body, self._options, openai=True)
        body.finish()
        return await self._answer_openai(http, records, parameters, is_chat=False)

    async def _answer_openai(
        self, http: Request, records: Sequence[Record], parameters: Parameters, *, is_chat: bool
    ) -> Response:
        request = self._request(records, parameters, "messages" if is_chat else "prompt")
        name, usage = self._options.model_name, parameters.include_usage
        form = Form(name, self._fingerprint, is_chat=is_chat, include_usage=usage)
        pending = Pending(self._scheduler, request, self._options.timeout)
        if parameters.stream:
            return EventStream(pending, form, self._note)
        await pending.done(http.receive)
        return JsonResponse(form.whole(request))

    async def generate(self, http: Request) -> Response:
        """Records in, answered records out; with `choices`, one of their options each."""
        body = await self._body(http)
        escape = body.take("escape", bool, False)
        given = _records_given(body)
        records = messages.take_records(body, self._options.max_records, escape=escape)
        is_seeded = body.peek("seed") is not None
        parameters = take_parameters(body, self._options, openai=False)
        # Samples have a new seed for each request, orders of options that of the command line.
        seed = parameters.options.seed if is_seeded else 0
        choosing, abstain_below = _take_choosing(body, records, seed)
        body.finish()
        request = self._request(records, parameters, "records", choosing)
        name = self._options.model_name
        form = RecordsForm(name, given, escape=escape, abstain_below=abstain_below)
        pending = Pending(self._scheduler, request, self._options.timeout)
        if parameters.stream:
            return EventStream(pending, form, self._note)
        await pending.done(http.receive)
        return JsonResponse(form.whole(request))

    async def _body(self, http: Request) -> Body:
        """The body of a request, whose model is this one."""
        if self.is_draining:
            raise api_errors.shutting_down()
        # A page of another site cannot send this type without asking first.
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise invalid("send JSON, with the header Content-Type: application/json")
        body = request_body.parse(await http.body())
        name = body.take("model", str)
        if name is not None and name != self._options.model_name:
            raise api_errors.unknown_model(name, self._options.model_name)
        return body

    def _request(
        self,
        records: Sequence[Record],
        parameters: Parameters,
        source: str,
        choosing: work.Choosing | None = None,
    ) -> work.Request:
        """Encode the records, and compare their lengths with the limits."""
        items = []
        for number, record in enumerate(records):
            where = f"{source}[{number}]" if len(records) > 1 or source == "records" else source
            # The scheduler encodes the record again if it chooses: without its answers, as here.
            own = {**record, ANSWER: ""} if choosing is not None else record
            try:
                prompt = Prompt.of(own, self._encoder)
            except InputError as error:
                raise invalid(f"{where}: {error}", where) from None
            if (length := len(prompt.encoded)) > self._options.max_prompt_tokens:
                raise invalid(
                    f"{where}: has {length:,} tokens; this server takes "
                    f"{self._options.max_prompt_tokens:,}",
                    where,
                    "context_length_exceeded",
                )
            items.append(work.Item(record, prompt, number))
        limits = parameters.most, parameters.stop
        request = work.Request(
            items, parameters.options, *limits, choosing, follow=parameters.stream
        )
        for item in items:
            needed = self._scheduler.num_tokens(request, item)
            if choosing is None and needed > self._scheduler.max_tokens:
                raise invalid(
                    f"needs memory for {needed:,} tokens of all beams, and this server has it for "
                    f"{self._scheduler.max_tokens:,}: ask for fewer beams or a shorter answer",
                    code="context_length_exceeded",
                )
        return request

    # ------------------------------------------------------------------ keys and errors

    async def _check_key(self, http: Request) -> None:
        if (key := self._options.key) is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise api_errors.wrong_key()

    def _note(self, error: ApiError) -> None:
        self._metrics.refused(error.status)

    async def _on_api_error(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self._note(error)
        return error_response(error)

    async def _on_http_error(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        own = ApiError(
            error.status_code,
            f"{http.method} {http.url.path}: {error.detail}",
            type="invalid_request_error",
            code=code,
            headers=error.headers,
        )
        return await self._on_api_error(http, own)

    async def _on_client_left(self, http: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def _on_error(self, http: Request, error: Exception) -> Response:
        return await self._on_api_error(http, api_errors.failed("the server made a mistake"))


def _records_given(body: Body) -> list[Record]:
    """The records as they were sent, which `take_records` checks."""
    one, several = body.peek("record"), body.peek("records")
    return [one] if one is not None else several


def _take_choosing(
    body: Body, records: Sequence[Record], seed: int
) -> tuple[work.Choosing | None, float]:
    """How an option is chosen, if it is; and the probability below which none is."""
    choices = body.take("choices", bool, False)
    orders = body.take("average_orders", int, least=1, most=24)
    abstain_below = body.take("abstain_below", float, least=0, most=1)
    if not choices:
        for name, value in (("average_orders", orders), ("abstain_below", abstain_below)):
            if value is not None:
                body.problem(name, "needs choices")
        return None, 0.0
    for i, record in enumerate(records):
        if not options_of(record):
            body.problem(f"records[{i}]", "has no options to choose from")
    return work.Choosing(orders or 1, seed), abstain_below or 0.0
