"""What clients send: the fields of each request, and what is done with those of OpenAI's interface.

A field either has its effect or is refused with status 400 (`_REFUSED`), unless it is one that
cannot change an answer (`user`, `metadata`, ...), which is ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cpm_bee.errors import InputError
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.serve.messages import BadRequest

# Fields of OpenAI's interface that would change the answer and are not supported, with the value
# that changes nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "stop": (None, [], ""),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "n": (None, 1),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class CommonRequest(BaseModel):
    """The fields that all requests for answers have."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    beam_size: int | None = Field(default=None, ge=1, le=64)
    repetition_penalty: float | None = Field(default=None, gt=0)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """Raise `BadRequest` for a field that would have to change the answer and cannot."""
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in _REFUSED[name]:
                raise BadRequest(f"{name} is not supported", name)
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream", "stream_options")


class ChatRequest(CommonRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)


class CompletionRequest(CommonRequest):
    prompt: str | list[str]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class GenerateRequest(CommonRequest):
    """Records; `choices` asks for the probabilities of their options instead of an answer."""

    records: list[dict[str, Any]] = Field(min_length=1)
    escape: bool = True
    choices: bool = False


def options_of(request: CommonRequest, default: GenerationOptions) -> GenerationOptions:
    """Returns the server's options with those that a request gives.

    A temperature means sampling, and 0 greedy decoding, instead of the server's beams.

    Raises:
        BadRequest: a value is out of range, or more tokens are asked for than the server allows.
    """
    changes: dict[str, Any] = {}
    limit = request.max_completion_tokens or request.max_tokens
    if limit is not None:
        if limit > default.max_length:
            raise BadRequest(
                f"max_tokens is at most {default.max_length} on this server (--max-length)",
                "max_tokens",
            )
        changes["max_length"] = limit
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "beam_size", "repetition_penalty")
    changes |= {
        name: getattr(request, name) for name in names if getattr(request, name) is not None
    }
    if "temperature" in changes:
        changes.setdefault("beam_size", None)
    elif default.temperature is None and {"top_p", "top_k", "min_p"} & changes.keys():
        changes |= {"temperature": 1.0, "beam_size": None}  # OpenAI's default
    try:
        return dataclasses.replace(default, **changes)
    except InputError as error:
        raise BadRequest(str(error)) from None
