from __future__ import annotations

import pickle
import pickletools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data import record_pickle
from cpm_bee.data.record_pickle import decode, encode
from cpm_bee.errors import InputError
from cpm_bee.tokenizer import escape

texts = st.text(st.sampled_from("a<春"), max_size=20).map(escape)
trees = st.recursive(texts, lambda inner: st.dictionaries(texts, inner, max_size=3), max_leaves=6)

# ------------------------------------------------------------------ harmless pickles


class Runs:
    """Unpickled by the plain loader, it runs a function."""

    def __reduce__(self) -> tuple:
        return print, ("this ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value", [{"<ans>": Runs()}, Runs(), {"<ans>": print}, {"<ans>": {1 + 2j}}]
)
def test_a_pickle_that_names_anything_is_refused(
    value: object, protocol: int, capfd: pytest.CaptureFixture[str]
) -> None:
    payload = pickle.dumps(value, protocol=protocol)
    with pytest.raises(InputError, match="refused"):
        decode(payload)
    assert capfd.readouterr().out == ""


names = st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=1, max_size=20)


@given(names, names, st.sampled_from(["GLOBAL", "STACK_GLOBAL", "INST"]))
def test_every_opcode_that_finds_a_class_is_refused(module: str, name: str, opcode: str) -> None:
    if opcode == "STACK_GLOBAL":
        parts = [part.encode() for part in (module, name)]
        named = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"
    elif opcode == "GLOBAL":
        named = f"c{module}\n{name}\n".encode()
    else:
        named = f"(i{module}\n{name}\n".encode()
    with pytest.raises(InputError, match="could run code and is refused"):
        decode(b"\x80\x04" + named + b".")


@pytest.mark.parametrize("payload", [b"\x80\x04Pname\n.", b"\x80\x04\x8c\x01aQ."])
def test_persistent_ids_are_refused(payload: bytes) -> None:
    with pytest.raises(InputError, match="outside object and is refused"):
        decode(payload)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_an_input_error(payload: bytes) -> None:
    with pytest.raises(InputError):
        decode(payload)


@given(st.data())
def test_any_damage_is_a_record_or_an_input_error(data: st.DataObject) -> None:
    payload = bytearray(encode({"input": "春", "options": {"<option_0>": "a"}, "<ans>": "b"}))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode(bytes(payload)), dict)
    except InputError as error:
        assert str(error)


def test_a_small_pickle_cannot_take_all_memory_or_time() -> None:
    with pytest.raises(InputError, match='no "<ans>"'):
        decode(b"\x80\x04}r\xff\xff\xff\xff.")  # memo number 2**32 - 1
    node: dict = {"<ans>": ""}
    for _ in range(50):
        node = {"a": node, "b": node, "<ans>": ""}
    with pytest.raises(InputError, match="several places"):
        decode(pickle.dumps(node))
    node["a"] = node
    with pytest.raises(InputError, match="several places"):
        decode(pickle.dumps(node))


# ------------------------------------------------------------------ the quick reader


def outcome(payload: bytes) -> tuple[str, object]:
    try:
        return "record", decode(payload)
    except InputError as error:
        return "error", str(error)


def both_outcomes(payload: bytes) -> list[tuple[str, object]]:
    """Of the usual way, and of the careful reader alone."""
    usual = outcome(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_pickle, "_is_plain", lambda _: False)
        return [usual, outcome(payload)]


@given(st.dictionaries(texts, trees, max_size=4), st.integers(0, 300))
def test_what_we_write_is_read_quickly(fields: dict, long: int) -> None:
    record = {**fields, "long": "春" * long, "<ans>": "a"}
    assert record_pickle._is_plain(encode(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(record_pickle, "_decode_carefully")
        assert decode(encode(record)) == record


@given(st.data())
def test_both_readers_agree_on_damaged_pickles(data: st.DataObject) -> None:
    payload = bytearray(encode({"input": "春", "options": {"input": "春"}, "<ans>": "b"}))
    operations = st.sampled_from([*record_pickle._SIZES, *b"\x8cX."]) | st.integers(0, 255)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(operations)
    first, second = both_outcomes(bytes(payload))
    assert first == second


operations = [bytes([o]) + b"\0" * (size - 1) for o, size in record_pickle._SIZES.items()]
operations += [b"\x8c\x01a", b"\x8c\x05<ans>", b"h\x01"]


@given(st.lists(st.sampled_from(operations), max_size=20))
def test_both_readers_agree_on_any_operations(chosen: list[bytes]) -> None:
    first, second = both_outcomes(b"\x80\x04" + b"".join(chosen) + b".")
    assert first == second


def test_all_other_operations_are_left_to_the_careful_reader() -> None:
    known = {ord(o.code) for o in pickletools.opcodes}
    accepted = {o for o in range(256) if record_pickle._is_plain(bytes([o]) + b"\0" * 8 + b".")}
    usual = {ord(o) for o in "(}squhj"} | {0x80, 0x94, 0x95, 0x8C, ord("X")}
    assert accepted <= usual <= known
    for number in known - usual - {ord(".")}:
        for size in range(12):
            assert not record_pickle._is_plain(b"\x80\x04}" + bytes([number]) + b"\0" * size + b".")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a"], "a record is a JSON object"),
        ({"<ans>": 1}, "value of /<ans>: expected text"),
        ({"input": "a"}, 'there is no "<ans>"'),
        ({"<ans>": "a<b"}, "not closed"),
    ],
)
def test_a_pickle_of_something_else_is_refused(value: object, reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        decode(pickle.dumps(value))
    with pytest.raises(InputError, match="3 bytes follow"):
        decode(encode({"<ans>": ""}) + b"abc")
