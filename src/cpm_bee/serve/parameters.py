"""What a request asks of generation: its fields, the server's defaults and limits."""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

from cpm_bee.errors import InputError
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.stop_sequences import NO_STOPS, StopSequences
from cpm_bee.serve.options import ServeOptions
from cpm_bee.serve.request_body import Body

# Fields of OpenAI's API that this server does not have, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_MOST_STOPS, _LONGEST_STOP = 4, 100
# They describe the request to whoever keeps it; nothing here depends on them.
_LABELS = (("user", str), ("metadata", dict), ("store", bool), ("safety_identifier", str))


class Parameters(NamedTuple):
    """How the records of a request are answered.

    Attributes:
        most: the most tokens of a record's answers; None if `options.max_length` is the limit.
        stop: texts that end an answer.
        stream: whether texts are sent as they grow.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    options: GenerationOptions
    most: int | None
    stop: StopSequences
    stream: bool
    include_usage: bool


def take_parameters(body: Body, server: ServeOptions, *, openai: bool) -> Parameters:
    """Take the fields that all endpoints share; problems are noted in `body`.

    Args:
        openai: whether the endpoint is one of OpenAI's, whose names for fields differ.
    """
    count = "n" if openai else "num_return"
    fields = {
        "num_return": body.take(count, int, 1, least=1, most=server.max_beams),
        "beam_size": body.take("beam_size", int, least=1, most=server.max_beams),
        "length_penalty": body.take("length_penalty", float, 1.0, least=0),
        "repetition_penalty": body.take("repetition_penalty", float, 1.0, least=1e-6),
        "repetition_window": body.take("repetition_window", int, least=1),
        "temperature": body.take("temperature", float, least=0, most=100),
        "seed": body.take("seed", int, least=0),
        # 0 and -1 are "all tokens" elsewhere.
        "top_k": max(body.take("top_k", int, 0, least=-1), 0) or None,
        "top_p": body.take("top_p", float, least=1e-9, most=1),
        "min_p": body.take("min_p", float, least=0, most=1) or None,
    }
    if fields["top_p"] == 1:
        fields["top_p"] = None
    if fields["temperature"] == 0:
        # The most probable token is among any share of the probability.
        fields.update(top_k=None, top_p=None, min_p=None)
    if fields["temperature"] is None and fields["beam_size"] is None:
        fields["beam_size"] = server.beam_size
    if fields["seed"] is None:
        fields["seed"] = secrets.randbelow(1 << 31)
    most = _most(body, server, openai=openai)
    max_length = server.max_length if most is None else most
    if not openai:
        max_length = body.take(
            "max_length", int, max_length, least=1, most=server.max_answer_tokens
        )
    stream = body.take("stream", bool, False)
    include_usage = _include_usage(body, stream=stream) if openai else False
    stop = _stop(body) if openai else NO_STOPS
    if openai:
        for name, neutral in _UNSUPPORTED.items():
            body.refuse(name, neutral)
        for name, kind in _LABELS:
            body.take(name, kind)
    try:
        options = GenerationOptions(max_length=max_length, **fields)
    except InputError as error:
        _note(body, str(error), {"num_return": count})
        options = GenerationOptions()
    return Parameters(options, most, stop, stream, include_usage)


def _most(body: Body, server: ServeOptions, *, openai: bool) -> int | None:
    limit = server.max_answer_tokens
    names = ("max_completion_tokens", "max_tokens") if openai else ("max_tokens",)
    given = [body.take(name, int, least=1, most=limit) for name in names]
    values = [value for value in given if value is not None]
    if len(set(values)) > 1:
        body.problem(names[0], "differs from max_tokens; give one of them")
    return min(values, default=None)


def _stop(body: Body) -> StopSequences:
    given = body.take_any("stop")
    texts = [given] if isinstance(given, str) else given
    if given is None or given == "":
        return NO_STOPS
    if not (isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)):
        body.problem("stop", "expected a text or a list of texts, none of them empty")
    elif len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
        body.problem(
            "stop", f"up to {_MOST_STOPS} texts of up to {_LONGEST_STOP} characters are allowed"
        )
    else:
        return StopSequences(tuple(texts))
    return NO_STOPS


def _include_usage(body: Body, *, stream: bool) -> bool:
    given = body.take("stream_options", dict)
    if given is None:
        return False
    if not stream:
        body.problem("stream_options", "needs stream")
    options = Body(given, "stream_options.")
    include: bool = options.take("include_usage", bool, False)
    options.refuse("include_obfuscation", (False,))
    body.include(options)
    return include


def _note(body: Body, text: str, names: dict[str, str]) -> None:
    """Note problems that name flags, with the fields of the API in their place."""

    def renamed(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return names.get(name, name)

    for line in text.splitlines():
        name, _, reason = re.sub(r"--([a-z-]+)", renamed, line).partition(": ")
        body.problem(name.partition(" ")[0], reason)
