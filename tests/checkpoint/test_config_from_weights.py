"""The config from tensors; whole checkpoints: tests/test_pretrained.py."""

from cpm_bee.checkpoint.config_from_weights import layers_present


def test_layers_present() -> None:
    names = ["encoder.layers.0.ffn.a", "encoder.layers.3.self_att.b", "encoder.layers.0.ffn.c"]
    names += ["encoder.output_layernorm.weight", "encoder.layers.99999999999.ffn.a"]
    expected = [(False, True), (False, False), (False, False), (True, False)]
    assert layers_present(names) == expected
    assert layers_present([]) == []
