"""The flags of serve.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cpm_bee import hints
from cpm_bee.cli import not_negative, positive, real_number
from cpm_bee.errors import InputError
from cpm_bee.generate.options import MACHINE, MODEL, LoadedModelOptions
from cpm_bee.options import CommandOptions, Group

SERVER = Group("server", "服务")
ANSWERS = Group("answers", "作答")
LIMITS = Group("limits", "限制")
_HOST = re.compile(r"\*|[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
API_KEY_VARIABLE = "CPM_BEE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(LoadedModelOptions, CommandOptions):
    """The flags of serve.py."""

    script = "serve.py"
    description = (
        "Serve a model over HTTP: OpenAI's chat and text completions, records under /v1/generate, "
        "and a page to try it at /. Requests that arrive together are answered together."
    )
    chinese = (
        "通过 HTTP 提供模型服务：OpenAI 的对话与文本补全接口、/v1/generate 下的记录接口，以及 `/` "
        "处的试用页面。同时到达的请求会合并成批处理。"
    )
    groups = (SERVER, MODEL, ANSWERS, LIMITS, MACHINE)
    hints = hints.SERVE

    host: str = SERVER.option(
        "127.0.0.1",
        "address to listen at; the default is reached from this machine only, `0.0.0.0` is all "
        "addresses",
        "监听的地址；默认只能从本机访问，`0.0.0.0` 为所有地址",
        metavar="HOST",
    )
    port: int = SERVER.option(
        8000, "port to listen at; 0 takes a free one", "监听的端口；0 表示任取空闲端口",
        type=not_negative,
    )  # fmt: skip
    api_key: str | None = SERVER.option(
        None,
        f"key that requests to /v1 must bring (`Authorization: Bearer KEY`). Other users of the "
        f"machine can see flags: the environment variable {API_KEY_VARIABLE} has the same effect. "
        "No key is asked for when neither is given",
        f"访问 /v1 的请求必须携带的密钥（`Authorization: Bearer KEY`）。本机其他用户能看到"
        f"命令行参数；环境变量 {API_KEY_VARIABLE} 作用相同。两者都未给出时不要求密钥",
        metavar="KEY",
    )
    allowed_hosts: str | None = SERVER.option(
        None,
        "other names that requests may be sent to (`Host`), separated by commas; `*` allows all. "
        "While --host is an address of this machine alone, only localhost, 127.0.0.1 and [::1] are "
        "allowed, so that no web page reaches the server by a name of its own (DNS rebinding); "
        "with another --host all are, unless this flag is given",
        "请求还可以使用的主机名（`Host`），以逗号分隔；`*` 表示全部允许。--host 为仅本机可达的地址"
        "时，只允许 localhost、127.0.0.1 与 [::1]，使网页无法借自己的域名访问本服务（DNS 重绑定）；"
        "--host 为其他地址时默认全部允许，除非给出此参数",
        metavar="NAMES",
    )
    served_model_name: str | None = SERVER.option(
        None,
        "name of the model in the API; that of the checkpoint's folder when not given",
        "模型在 API 中的名称；不指定时为检查点所在文件夹的名称",
        metavar="NAME",
    )
    grace: float = SERVER.option(
        30.0,
        "seconds that running requests may take to finish after SIGTERM or Ctrl-C; a second signal "
        "ends them at once",
        "收到 SIGTERM 或 Ctrl-C 后，留给进行中请求的秒数；再次收到信号则立即结束",
        type=real_number(0),
    )
    beam_size: int = ANSWERS.option(
        3,
        "number of beams for requests that give neither it nor a temperature",
        "请求既未给出束数也未给出温度时使用的束数",
        type=positive,
    )
    max_length: int = ANSWERS.option(
        100,
        "maximum number of tokens for requests that do not limit them, as in text_generation.py",
        "请求未限制长度时最多生成的 token 数，含义与 text_generation.py 相同",
        type=positive,
    )
    max_answer_tokens: int = LIMITS.option(
        1024,
        "most tokens that a request may ask for",
        "一个请求最多可要求生成的 token 数",
        type=positive,
    )
    max_prompt_tokens: int = LIMITS.option(
        4096, "most tokens of a record's context", "一条记录的上下文最多的 token 数", type=positive
    )
    max_beams: int = LIMITS.option(
        16,
        "most beams or samples of a record",
        "一条记录最多的束数或采样数",
        type=positive,
    )
    max_records: int = LIMITS.option(
        64, "most records or prompts of a request", "一个请求最多的记录数", type=positive
    )
    max_body: int = LIMITS.option(
        1 << 20, "most bytes of a request's body", "请求正文最多的字节数", type=positive
    )
    max_waiting: int = LIMITS.option(
        256,
        "most records that wait for their turn; a request beyond is refused with status 429",
        "排队等待的记录数上限；超出的请求以状态码 429 拒绝",
        type=positive,
    )
    timeout: float = LIMITS.option(
        600.0,
        "seconds after which a request that is not finished ends with status 503",
        "请求超过该秒数仍未完成时，以状态码 503 结束",
        type=real_number(0, exclusive=True),
    )

    def __post_init__(self) -> None:
        LoadedModelOptions.__post_init__(self)
        problems = []
        if self.port > 65535:
            problems.append(f"--port {self.port}: the last port is 65535")
        if self.beam_size > self.max_beams:
            problems.append(f"--beam-size {self.beam_size}: is above --max-beams {self.max_beams}")
        if self.max_length > self.max_answer_tokens:
            problems.append(
                f"--max-length {self.max_length}: is above --max-answer-tokens "
                f"{self.max_answer_tokens}"
            )
        if not self.key and (self.api_key is not None or API_KEY_VARIABLE in os.environ):
            problems.append("--api-key: is empty; leave it out where no key is wanted")
        elif self.key and not (self.key.isascii() and self.key.isprintable()):
            problems.append("--api-key: a key has printable ASCII characters only")
        wrong = [name for name in self.host_names if not _HOST.fullmatch(name)]
        if wrong or (self.allowed_hosts is not None and not self.host_names):
            problems.append(
                f"--allowed-hosts {self.allowed_hosts}: give names without http:// and port, "
                "separated by commas"
            )
        if problems:
            raise InputError("\n".join(problems))

    @property
    def host_names(self) -> tuple[str, ...]:
        """The names of `allowed_hosts`; an IPv6 address is without brackets."""
        names = (name.strip().strip("[]") for name in (self.allowed_hosts or "").split(","))
        return tuple(name for name in names if name)

    @property
    def key(self) -> str | None:
        """The key that requests must bring; None if any may come."""
        if self.api_key is not None:
            return self.api_key
        return os.environ.get(API_KEY_VARIABLE)

    @property
    def model_name(self) -> str:
        """The name of the model in the API."""
        if self.served_model_name:
            return self.served_model_name
        load = Path(os.path.realpath(self.load))
        return load.name if load.is_dir() else load.parent.name or load.stem
