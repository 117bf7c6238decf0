"""The flags of serve.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from cpm_bee import hints
from cpm_bee.cli import positive, real_number
from cpm_bee.generate.options import MACHINE, MODEL, SEARCH, GenerationOptions, LoadedModelOptions
from cpm_bee.options import CommandOptions, Group

SERVER = Group("server", "服务")
LIMITS = Group("limits", "限制")

KEY_VARIABLE = "CPM_BEE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(GenerationOptions, LoadedModelOptions, CommandOptions):
    """The flags of serve.py."""

    script = "serve.py"
    description = (
        "Serve a model over HTTP: chat and text completions in OpenAI's form, records, and a page "
        "to try the model in a browser. Requests that arrive together are answered in one batch. "
        "Needs `pip install -e .[serve]`."
    )
    chinese = (
        "通过 HTTP 提供模型服务：OpenAI 格式的对话与文本补全、记录接口，以及可在浏览器中试用模型的"
        "网页。同时到达的请求合并为一批处理。需要 `pip install -e .[serve]`。"
    )
    groups = (SERVER, MODEL, SEARCH, LIMITS, MACHINE)
    hints = hints.SERVE

    host: str = SERVER.option(
        "127.0.0.1",
        "address to listen on; `0.0.0.0` lets other machines in (give `--api-key` then)",
        "监听地址；`0.0.0.0` 允许其他机器访问（此时应设置 `--api-key`）",
        metavar="ADDRESS",
    )
    port: int = SERVER.option(8000, "port to listen on", "监听端口", type=positive, metavar="PORT")
    api_key: str | None = SERVER.option(
        None,
        f"key that requests must give (`Authorization: Bearer KEY`); `{KEY_VARIABLE}` in the "
        "environment does the same and does not appear in the list of processes",
        f"请求必须提供的密钥（`Authorization: Bearer KEY`）；也可用环境变量 `{KEY_VARIABLE}` "
        "设置，这样不会出现在进程列表中",
        metavar="KEY",
    )
    served_model_name: str | None = SERVER.option(
        None,
        "name of the model in requests and answers; when not given, that of the delta or "
        "checkpoint",
        "请求和回答中模型的名字；不指定则取增量文件或检查点的名字",
        metavar="NAME",
    )
    max_waiting: int = LIMITS.option(
        64,
        "requests that may wait; more get status 429 with `Retry-After`",
        "可以排队的请求数；超出的请求返回 429 和 `Retry-After`",
        type=positive,
    )
    max_body: int = LIMITS.option(
        1 << 20, "largest request in bytes", "请求的最大字节数", type=positive
    )
    max_prompt_tokens: int = LIMITS.option(
        4096, "most tokens of a prompt", "提示的最大 token 数", type=positive
    )
    timeout: float = LIMITS.option(
        300.0,
        "seconds after which a request is given up, from its arrival",
        "请求从到达起的最长秒数，超时即放弃",
        type=real_number(0, exclusive=True),
    )

    def __post_init__(self) -> None:
        GenerationOptions.__post_init__(self)
        LoadedModelOptions.__post_init__(self)

    @property
    def generation(self) -> GenerationOptions:
        """The options of a request that gives none."""
        names = (field.name for field in fields(GenerationOptions))
        return GenerationOptions(**{name: getattr(self, name) for name in names})

    @property
    def key(self) -> str | None:
        """The key that requests must give; None if none is needed."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None

    @property
    def model_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.delta or self.load)
        return path.name if path.is_dir() else path.stem
