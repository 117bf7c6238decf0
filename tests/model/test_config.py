from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig

SIZES = {
    "vocab_size": 30,
    "dim_model": 12,
    "num_heads": 2,
    "dim_head": 5,
    "dim_ff": 14,
    "num_layers": 2,
}


def from_dict(**values: object) -> ModelConfig:
    return ModelConfig.from_dict(values, "config.json")


def problems(**values: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        from_dict(**values)
    header, *lines = str(caught.value).splitlines()
    assert header == "the model config cannot be used:"
    assert all(line.startswith("  config.json: ") for line in lines)
    return [line.removeprefix("  config.json: ") for line in lines]


def test_defaults() -> None:
    config = from_dict(**SIZES)
    assert config.position_bias_num_buckets == config.position_bias_num_segment_buckets == 256
    assert (config.position_bias_max_distance, config.eps, config.half) == (2048, 1e-6, False)
    assert (config.dropout_p, config.distance_scale, config.mask_modules) == (0.0, 16, ())


def test_hugging_face_names() -> None:
    ours = {"hidden_size": "dim_model", "num_hidden_layers": "num_layers"}
    ours["num_attention_heads"] = "num_heads"
    theirs = {**SIZES, "model_type": "cpmbee", "mask_modules": None, "distance_scale": 8}
    for name, native in ours.items():
        theirs[name] = theirs.pop(native)
    config = from_dict(**theirs)
    assert config == from_dict(**SIZES, distance_scale=8)


def test_all_that_is_wrong_is_listed_at_once() -> None:
    found = problems(
        vocab_size="many",
        dim_model=13,
        num_heads=True,
        dim_head=0,
        num_layers=2,
        dropout_p=1,
        position_bias_num_buckets=3,
        position_bias_num_segment_buckets=0,
        position_bias_max_distance=2.5,
        eps=0,
        half="yes",
        mask_modules=[[True, False]],
        distance_scale=float("nan"),
    )
    assert found == [
        '"dim_ff" is missing',
        "\"vocab_size\" must be a whole number from 1, this is 'many'",
        '"dim_model" must be an even whole number above 0, this is 13',
        '"num_heads" must be a whole number from 1, this is True',
        '"dim_head" must be a whole number from 1, this is 0',
        '"dropout_p" must be a number from 0 to below 1, this is 1',
        '"position_bias_num_buckets" must be a whole number from 4, this is 3',
        '"position_bias_num_segment_buckets" must be a whole number from 1, this is 0',
        '"position_bias_max_distance" must be a whole number from 1, this is 2.5',
        '"eps" must be a number above 0, this is 0',
        "\"half\" must be true or false, this is 'yes'",
        '"distance_scale" must be a number above 0, this is nan',
        '"mask_modules" has 1 pairs for 2 layers',
    ]


def test_nothing_at_all() -> None:
    assert problems() == [f'"{name}" is missing' for name in SIZES]


@pytest.mark.parametrize("masks", [3, [True, False], [[True]], [["false", "false"]] * 2, "ab"])
def test_malformed_masks(masks: object) -> None:
    (problem,) = problems(**SIZES, mask_modules=masks)
    assert problem.startswith('"mask_modules" must be a list of pairs of true or false')


def test_masks() -> None:
    config = from_dict(**SIZES, mask_modules=[[0, 1], [True, False]])
    assert config.mask_modules == ((False, True), (True, False))
    assert [config.has_attention(i) for i in range(2)] == [True, False]
    assert [config.has_ffn(i) for i in range(2)] == [False, True]
    whole = from_dict(**SIZES)
    assert all(whole.has_attention(i) and whole.has_ffn(i) for i in range(2))


def test_distances_that_no_bucket_could_tell_apart() -> None:
    (problem,) = problems(**SIZES, position_bias_max_distance=64)
    assert "more than a quarter of the 256 position_bias_num_buckets, this is 64" in problem
    assert from_dict(**SIZES, position_bias_max_distance=65)


def test_a_written_config_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    masks = ((False, True), (True, False))
    for config in (tiny.make_config(), tiny.make_config(mask_modules=masks, distance_scale=4)):
        path.write_text(json.dumps(config.to_dict()))
        assert ModelConfig.load(path) == config
    native = set(tiny.make_config().to_dict())
    assert not {"mask_modules", "distance_scale"} & native  # other tools do not know them


BROKEN = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[1]",
    "nested without end": b"[" * 100_000,
    "a number without end": b'{"eps": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: (not a JSON file|a model config is)"):
        ModelConfig.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model config \(see --model-config\)"):
        ModelConfig.load(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="this is a folder; a file is needed"):
        ModelConfig.load(tmp_path)
