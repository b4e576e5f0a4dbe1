"""Headers of safetensors files: what passes the format's own reader takes, and nothing raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cluster.models.refusals import Refused, Rule
from cluster.models.weights_check import MAX_HEADER, Tensor, check_file, check_header, check_text

CORPUS = Path(__file__).parents[1] / "corpus" / "safetensors"


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def refusal(content: bytes) -> str:
    with pytest.raises(Refused) as caught:
        check_header(content, len(content))
    assert caught.value.rule is Rule.HEADER
    return str(caught.value)


def test_the_tensors_in_order_of_their_bytes() -> None:
    content = save({"b": np.zeros((2, 3), np.float32), "a": np.zeros(4, np.uint8)})
    found = check_header(content, len(content))
    assert {t.name: (t.dtype, t.shape) for t in found} == {"b": ("F32", (2, 3)), "a": ("U8", (4,))}
    assert found[0].start == 0
    assert found[0].end == found[1].start


def test_an_empty_file_of_the_format() -> None:
    assert check_header(packed({}), len(packed({}))) == ()
    assert check_header(packed(b"{}      "), 16) == ()
    only = packed({"__metadata__": {"format": "pt"}})
    assert check_header(only, len(only)) == ()


def test_a_scalar_and_an_empty_tensor() -> None:
    content = packed(
        {
            "s": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
            "e": {"dtype": "F16", "shape": [0, 5], "data_offsets": [8, 8]},
        },
        bytes(8),
    )
    assert Tensor("s", "I64", (), 0, 8) in check_header(content, len(content))


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x00",
    "header-beyond-file": packed(b"{}", length=1000),
    "header-of-exabytes": packed(b"{}", length=2**63),
    "header-over-limit": packed(b"{}", length=MAX_HEADER + 1),
    "not-json": packed(b"{nonsense"),
    "not-utf8": packed(b'{"\xff": 1}'),
    "an-array": packed([1, 2]),
    "leading-space": packed(b' {"a": 1}'),
    "pickle": b"\x80\x04\x95" + bytes(60),
    "zip": b"PK\x03\x04" + bytes(60),
    "twice": packed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "deep": packed(b"[" * 600),
    "deep-object": packed(b'{"a":' * 600 + b"1" + b"}" * 600),
    "nan": packed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "huge-number": packed(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 500 + b'],"data_offsets":[0,1]}}', b"x"
    ),
    "float-shape": packed(tensor(shape=[2.0]), bytes(8)),
    "bool-shape": packed(tensor(shape=[True, 2]), bytes(8)),
    "negative-shape": packed(tensor(shape=[-2]), bytes(8)),
    "overflowing-shape": packed(tensor(shape=[2**32, 2**32, 2**32]), bytes(8)),
    "rank": packed(tensor(shape=[1] * 17 + [2]), bytes(8)),
    "unknown-dtype": packed(tensor(dtype="F33"), bytes(8)),
    "dtype-no-text": packed(tensor(dtype=32), bytes(8)),
    "extra-key": packed(tensor(more=1), bytes(8)),
    "missing-key": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "offsets-backwards": packed(tensor(data_offsets=[8, 0]), bytes(8)),
    "offsets-beyond": packed(tensor(data_offsets=[0, 16]), bytes(8)),
    "offsets-three": packed(tensor(data_offsets=[0, 8, 8]), bytes(8)),
    "gap": packed(tensor(data_offsets=[4, 12]), bytes(12)),
    "overlap": packed(
        {**tensor(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "trailing-data": packed(tensor(), bytes(9)),
    "missing-data": packed(tensor(), bytes(7)),
    "metadata-of-numbers": packed({"__metadata__": {"a": 1}}),
    "metadata-list": packed({"__metadata__": ["a"]}),
    "half-a-pair": packed(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "control-in-name": packed(
        {"a\x00b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"
    ),
    "long-name": packed({"a" * 1001: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "half-a-byte": packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str) -> None:
    assert "not safetensors" in refusal(HOSTILE[name])


def test_the_corpus_is_refused_and_holds_them_all() -> None:
    """Files that stay as they are, whatever becomes of the table that they were made from."""
    files = {file.stem: file for file in CORPUS.glob("*.bin")}
    assert files.keys() >= {name for name, content in HOSTILE.items() if len(content) < 2000}
    for file in files.values():
        with pytest.raises(Refused):
            check_file(file)


def reads(content: bytes, folder: Path) -> bool:
    """Whether the format's own reader takes all of it."""
    file = folder / "x.safetensors"
    file.write_bytes(content)
    try:
        with safe_open(str(file), framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                opened.get_slice(name).get_shape()
    except (SafetensorError, OSError):
        return False
    return True


VALID = save(
    {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)},
    {"format": "pt"},
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["flip", "insert", "delete", "replace"]),
            st.integers(0, len(VALID) - 1),
            st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_passes_after_any_damage_the_formats_reader_takes(
    tmp_path: Path, changes: list[tuple[str, int, bytes]]
) -> None:
    content = bytearray(VALID)
    for how, at, new in changes:
        at %= len(content) or 1
        if how == "flip" and content:
            content[at] ^= new[0]
        elif how == "insert":
            content[at:at] = new
        elif how == "delete":
            del content[at : at + len(new)]
        else:
            content[at : at + len(new)] = new
    made = bytes(content)
    try:
        check_header(made, len(made))
    except Refused:
        return
    assert reads(made, tmp_path)


NUMBERS = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.booleans(), st.none())
SAID = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F16", "BOOL", "F4", "C64", "X", "", 3]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "more": st.none(),
    },
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(st.one_of(st.just("__metadata__"), st.text(max_size=5)), SAID, max_size=3),
    st.binary(max_size=40),
)
def test_what_passes_of_made_up_headers_the_formats_reader_takes(
    tmp_path: Path, header: dict[str, Any], data: bytes
) -> None:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    made = packed(raw, data)
    try:
        check_header(made, len(made))
    except Refused:
        return
    assert reads(made, tmp_path)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_otherwise(content: bytes) -> None:
    for made in (content, packed(content), packed(b"{" + content)):
        try:
            check_header(made, len(made))
        except Refused:
            continue


DTYPES = (
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_,
)  # fmt: skip


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    )
)
def test_what_the_formats_writer_makes_passes(
    tensors: dict[str, tuple[type[np.generic], list[int]]],
) -> None:
    content = save({name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()})
    found = check_header(content, len(content))
    assert {t.name: t.shape for t in found} == {n: tuple(s) for n, (_, s) in tensors.items()}


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"a": [1, 2.5, null]}'),
        ("a.json", '{"é": 1}'.encode()),
        ("merges.txt", b"a b\nc d"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00"),
        ("chat_template.jinja", b"{{ messages }}"),
    ],
)
def test_text_that_goes_with_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    check_text(tmp_path / name, 1000)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.json", b"{", Rule.FILE_KIND),
        ("a.json", b"", Rule.FILE_KIND),
        ("a.json", b"[" * 900, Rule.FILE_KIND),
        ("a.json", b'{"a": NaN}', Rule.FILE_KIND),
        ("a.txt", b"\xff\xfe", Rule.FILE_KIND),
        ("a.txt", b"a\0b", Rule.FILE_KIND),
        ("tokenizer.model", b"\x80\x04pickle", Rule.FILE_KIND),
        ("tokenizer.model", b"PK\x03\x04", Rule.FILE_KIND),
        ("a.txt", b"x" * 1001, Rule.FILE_SIZE),
    ],
)
def test_text_that_is_none(tmp_path: Path, name: str, content: bytes, rule: Rule) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused) as caught:
        check_text(tmp_path / name, 1000)
    assert caught.value.rule is rule
