"""What the flags of evaluate.py change in how a model is run."""

from __future__ import annotations

from typing import Any

import pytest
import support

from cpm_bee.data.record_source import located
from cpm_bee.errors import RunError
from cpm_bee.evaluate import run
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate import beam_search
from cpm_bee.generate.loaded_model import LoadedModel, load_base

TINY = support.ROOT / "src" / "ckpts" / "cpm-bee-tiny"
OPTIONS = {"<option_0>": "春眠不觉晓", "<option_1>": "处处闻啼鸟"}
RECORDS = [
    located(f"f:{n}", {"input": "花" * n, "options": OPTIONS, "<ans>": "<option_1>"})
    for n in (3, 5, 4)
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_base(EvaluateOptions(dataset="-", load=str(TINY)))


def test_max_tokens_reaches_scoring_choosing_and_answering(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int | None] = {}

    def spy(module: Any, name: str, get: Any) -> None:
        original = getattr(module, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            seen[name] = get(args, kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    spy(run, "score_records", lambda args, kwargs: kwargs["max_tokens"])
    spy(run, "choose", lambda args, kwargs: kwargs["max_tokens"])
    spy(beam_search.BeamSearch, "__init__", lambda args, kwargs: args[3])
    whole = run.run_model(loaded, RECORDS, EvaluateOptions(dataset="-"))
    assert seen["score_records"] == seen["choose"] == run._MAX_TOKENS
    small = run.run_model(loaded, RECORDS, EvaluateOptions(dataset="-", max_tokens=17))
    assert seen == {"score_records": 17, "choose": 17, "__init__": 17}
    assert small.answers == whole.answers and small.choices == whole.choices


def test_a_base_with_nan_is_blamed() -> None:
    broken = load_base(EvaluateOptions(dataset="-", load=str(TINY)))
    norm = broken.base.model.get_parameter("encoder.output_layernorm.weight")
    norm.data[0] = float("nan")
    with pytest.raises(RunError, match="the weights are broken"):
        run.run_model(broken, RECORDS, EvaluateOptions(dataset="-"))
