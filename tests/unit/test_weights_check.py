"""The check of weights and texts: whatever is wrong is refused, and what passes the package reads.

`python -m tests.unit.test_weights_check` writes the corpus anew.
"""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.models import weights_check
from cluster.models.refusals import Refused, Rule
from cluster.models.weights_check import (
    BITS,
    Tensor,
    check_file,
    check_header,
    check_table,
    check_text,
)

CORPUS = Path(__file__).parents[1] / "corpus" / "safetensors"
NUMPY = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "BOOL", "C64"}) | {
    f"U{bits}" for bits in (8, 16, 32, 64)
}


def made(header: str | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def entry(
    shape: object = (1,), start: object = 0, end: object = 1, dtype: object = "U8"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def one(**changes: object) -> bytes:
    return made(json.dumps({"a": entry() | changes}), b"x")


def raw(text: str) -> bytes:
    return made('{"a":' + text + "}", b"x")


def two(start: int, end: int, data: bytes = b"xyz") -> bytes:
    return made(json.dumps({"a": entry(), "b": entry((end - start,), start, end)}), data)


PLAIN = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
# name of the corpus's file: what it holds, and words of its refusal
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "length-cut": (b"\x02\0\0", "too short"),
    "length-beyond-file": (made("{}", size=1000), "longer than the file"),
    "length-beyond-limit": (made("{}", size=10**8 + 1), "too long"),
    "length-all-ones": (made("{}", size=2**64 - 1), "too long"),
    "length-zero": (made("{}", size=0), "begin with {"),
    "pickle": (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94.", "too long"),
    "space-first": (made(" {}"), "begin with {"),
    "byte-order-mark": (made(b"\xef\xbb\xbf{}"), "begin with {"),
    "not-utf8": (made(b'{"\xff":1}'), "not UTF-8"),
    "utf16": (made("{}".encode("utf-16-le")), "no string"),
    "list": (made("[]"), "begin with {"),
    "unended": (made('{"a":' + PLAIN), "as the format says"),
    "padded-by-nul": (made("{}\0\0"), "something follows"),
    "padded-by-newline": (made("{}\n"), "something follows"),
    "two-objects": (made("{}{}"), "something follows"),
    # what safetensors 0.8 writes of no tensors and no metadata, and cannot read
    "metadata-outside": (made('{},"__metadata__":{}}'), "something follows"),
    "same-key-twice": (raw(f'{PLAIN},"\\u0061":{PLAIN}'), "'a' is there twice"),
    "metadata-null": (made('{"__metadata__":null}'), "as the format says"),
    "metadata-number": (made('{"__metadata__":{"a":1}}'), "no string"),
    "metadata-nested": (made('{"__metadata__":{"a":{}}}'), "no string"),
    "metadata-twice": (made('{"__metadata__":{},"__metadata__":{}}'), "there twice"),
    "metadata-key-twice": (made('{"__metadata__":{"a":"","a":""}}'), "there twice"),
    "metadata-half-character": (made('{"__metadata__":{"a":"\\ud800"}}'), "not Unicode"),
    "key-not-string": (made("{1:2}"), "no string"),
    "key-foreign": (one(code="import os"), "foreign key"),
    "dtype-missing": (raw('{"shape":[1],"data_offsets":[0,1]}'), "lacks"),
    "shape-missing": (raw('{"dtype":"U8","data_offsets":[0,1]}'), "lacks"),
    "offsets-missing": (raw('{"dtype":"U8","shape":[1]}'), "lacks"),
    "dtype-twice": (raw('{"dtype":"U8",' + PLAIN[1:]), "there twice"),
    "entry-a-list": (raw('["U8",[1],[0,1]]'), "as the format says"),
    "entry-nan": (raw("NaN"), "as the format says"),
    "nested-lists": (raw("[" * 900), "as the format says"),
    "nested-objects": (made('{"a":' * 150), "foreign key"),
    "dtype-unknown": (one(dtype="F128"), "unknown dtype"),
    "dtype-object": (one(dtype={"U8": None}), "no string"),
    "shape-negative": (one(shape=[-1]), "no whole number"),
    "shape-minus-nought": (raw(PLAIN.replace("[1]", "[-0]")), "no whole number"),
    "shape-boolean": (one(shape=[True]), "no whole number"),
    "shape-fraction": (one(shape=[1.0]), "as the format says"),
    "shape-leading-nought": (raw(PLAIN.replace("[1]", "[01]")), "as the format says"),
    "shape-digits-of-other-scripts": (raw(PLAIN.replace("[1]", "[\u0661]")), "no whole number"),
    "shape-huge-number": (raw(PLAIN.replace("[1]", f"[{'9' * 900}]")), "as the format says"),
    "shape-product-overflows": (one(shape=[2**32, 2**32]), "too large"),
    "shape-overflows-behind-nought": (one(shape=[0, 2**62, 2]), "too large"),
    "shape-rank-17": (one(shape=[1] * 17), "more than 16"),
    "half-byte": (one(dtype="F4", shape=[3]), "whole byte"),
    "offsets-one": (one(data_offsets=[0]), "1 offsets"),
    "offsets-three": (one(data_offsets=[0, 1, 1]), "more than 2"),
    "offsets-backward": (one(data_offsets=[1, 0]), "-1 by its offsets"),
    "offsets-beyond-shape": (one(shape=[1], data_offsets=[0, 2]), "2 by its offsets"),
    "begins-late": (one(data_offsets=[1, 2]), "gap"),
    "gap": (two(2, 3), "gap"),
    "overlap": (two(0, 2), "overlaps"),
    "overlap-same": (two(0, 1), "overlaps"),
    "data-cut": (two(1, 9), "has 3 for them"),
    "data-left-over": (two(1, 2), "has 3 for them"),
    "data-without-tensors": (made("{}", b"x"), "has 1 for them"),
    "name-with-newline": (made(json.dumps({"a\nb": entry()}), b"x"), "control character"),
    "name-with-delete": (made(json.dumps({"a\x7f": entry()}), b"x"), "control character"),
    "name-with-raw-newline": (made('{"a\n":' + PLAIN + "}", b"x"), "damaged string"),
    "name-half-character": (made('{"\\ud800":' + PLAIN + "}", b"x"), "not Unicode"),
    "name-unended": (made('{"a'), "damaged string"),
}


def write_corpus(folder: Path) -> None:
    for name, (content, _) in HOSTILE.items():
        (folder / f"{name}.safetensors").write_bytes(content)


def refusal(content: bytes) -> str:
    with pytest.raises(Refused) as caught:
        check_header(content, len(content))
    assert caught.value.rule is Rule.HEADER
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_for_what_it_is(name: str) -> None:
    content, words = HOSTILE[name]
    assert words in refusal(content)


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.stem)
def test_the_corpus_is_refused(file: Path) -> None:
    with pytest.raises(Refused, match=rf"^{file.name}: ") as caught:
        check_file(file)
    assert caught.value.rule is Rule.HEADER


def test_the_corpus_is_what_the_table_makes() -> None:
    kept = {file.name: file.read_bytes() for file in CORPUS.iterdir()}
    assert {f"{name}.safetensors": content for name, (content, _) in HOSTILE.items()}.items() <= (
        kept.items()
    )
    assert max(map(len, kept.values())) < 1024


def test_what_passes(scratch: Path) -> None:
    header = {
        "__metadata__": {"format": "pt\n", "": "\x00"},
        "b": entry((2, 3), 0, 24, "F32"),
        "none": entry((0, 5), 24, 24, "F64"),
        "scalar": entry((), 24, 26, "BF16"),
        "ё": entry((4,), 26, 29, "F6_E2M3"),
    }
    content = made(json.dumps(header) + "   ", bytes(29))
    assert check_header(content, len(content)) == (
        Tensor("b", "F32", (2, 3), 0, 24),
        Tensor("none", "F64", (0, 5), 24, 24),
        Tensor("scalar", "BF16", (), 24, 26),
        Tensor("ё", "F6_E2M3", (4,), 26, 29),
    )
    assert refused_or_read(scratch, content)
    assert check_header(made("{}"), 10) == ()
    assert check_header(made("{ }"), 11) == ()


def test_only_the_header_is_needed() -> None:
    header = made(json.dumps({"a": entry((2**40,), 0, 2**40)}))
    assert check_header(header, len(header) + 2**40)[0].end == 2**40
    with pytest.raises(Refused, match="cut off"):
        check_header(header[:-1], len(header) + 2**40)


def test_bounds_on_numbers_of_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_check, "MAX_TENSORS", 2)
    monkeypatch.setattr(weights_check, "MAX_METADATA", 2)
    names = ("a", "b", "c")
    empty = {name: entry((0,), 0, 0) for name in names}
    said = {"__metadata__": dict.fromkeys(names, "")}
    assert "more than 2 tensors" in refusal(made(json.dumps(empty)))
    assert "more than 2 entries" in refusal(made(json.dumps(said)))
    del empty["c"], said["__metadata__"]["c"]
    content = made(json.dumps(said | empty))
    assert len(check_header(content, len(content))) == 2
    assert "1001 characters" in refusal(made(json.dumps({"n" * 1001: entry()}), b"x"))
    content = made(json.dumps({"n" * 1000: entry()}), b"x")
    assert check_header(content, len(content))


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a file"):
        check_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")
    odd = tmp_path / "odd\nname"
    odd.touch()
    with pytest.raises(Refused, match=r"^'odd\\nname': "):
        check_file(odd)


def test_the_dtypes_are_the_package_s(scratch: Path) -> None:
    scratch.write_bytes(one(dtype="none"))
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.safe_open(scratch, "numpy")
    listed = str(caught.value).partition("expected one of")[2]
    assert set(re.findall(r"`(\w+)`", listed)) == BITS.keys()
    for dtype, bits in BITS.items():
        content = made(json.dumps({"a": entry((8,), 0, bits, dtype)}), bytes(bits))
        assert refused_or_read(scratch, content)


def opens(file: Path) -> None:
    """The package reads all that numpy has a type for."""
    with safetensors.safe_open(file, "numpy") as opened:
        for tensor in check_file(file):
            if tensor.dtype in NUMPY:
                assert opened.get_tensor(tensor.name).shape == tensor.shape
            else:
                assert opened.get_slice(tensor.name).get_shape() == list(tensor.shape)


def refused_or_read(file: Path, content: bytes) -> bool:
    file.write_bytes(content)
    try:
        tensors = check_file(file)
    except Refused as refused:
        assert refused.rule is Rule.HEADER
        assert str(refused).isprintable()
        return False
    assert check_header(content, len(content)) == tensors
    opens(file)
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "file.safetensors"


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
arrays = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8"]),
)
tensors = st.dictionaries(names.filter(lambda name: name != "__metadata__"), arrays, max_size=5)
metadata = st.none() | st.dictionaries(
    st.text(max_size=5), st.text(max_size=20), min_size=1, max_size=3
)


@settings(max_examples=80)
@given(tensors, metadata)
def test_what_the_package_writes_passes(
    scratch: Path, written: dict[str, np.ndarray], said: dict[str, str] | None
) -> None:
    safetensors.numpy.save_file(written, scratch, said)
    found = {tensor.name: tensor.shape for tensor in check_file(scratch)}
    assert found == {name: array.shape for name, array in written.items()}
    opens(scratch)


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_random_bytes(scratch: Path, content: bytes) -> None:
    refused_or_read(scratch, content)
    refused_or_read(scratch, made(content))
    refused_or_read(scratch, made(b'{"a":' + content))


SEED = made(
    '{"__metadata__":{"k":"v"},"w\\u00e9":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    '"n":{"dtype":"I64","shape":[0],"data_offsets":[8,8]},'
    '"b":{"shape":[3],"dtype":"BOOL","data_offsets":[8,11]}}  ',
    bytes(11),
)
HEADER = SEED[8:-11]
pieces = st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b" ", b"\\", b"0", b"1", b"-"])


def mutated(data: st.DataObject) -> bytes:
    header = bytearray(HEADER)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header) - 1))
        match data.draw(st.sampled_from(["flip", "put", "delete", "repeat"])):
            case "flip":
                header[at] ^= 1 << data.draw(st.integers(0, 7))
            case "put":
                header[at:at] = data.draw(pieces | st.binary(min_size=1, max_size=2))
            case "delete":
                del header[at : at + data.draw(st.integers(1, 4))]
            case _:
                header[at:at] = header[at : at + 20]
    return bytes(header)


@settings(max_examples=400)
@given(st.data())
def test_mutated_headers(scratch: Path, data: st.DataObject) -> None:
    refused_or_read(scratch, made(mutated(data), bytes(11)))


def test_single_changed_bytes_that_pass_are_read(scratch: Path) -> None:
    """Some changes do no harm (another name, another dtype of that size): both sides are seen."""
    chosen = random.Random(4)  # noqa: S311
    passed = [
        refused_or_read(scratch, made(HEADER[:at] + bytes([byte]) + HEADER[at + 1 :], bytes(11)))
        for at in range(len(HEADER))
        for byte in chosen.sample(range(128), 4)
    ]
    assert 0 < sum(passed) < len(passed)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-2, 2**65),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
lengths = st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**62, 2**63, 2**64]), max_size=4)


@settings(max_examples=300)
@given(st.data())
def test_changed_values(scratch: Path, data: st.DataObject) -> None:
    header = json.loads(HEADER)
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(values)
    else:
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "k"]))
        header[name][key] = data.draw(lengths | st.sampled_from(sorted(BITS)) | values)
    refused_or_read(scratch, made(json.dumps(header), bytes(11)))


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(BITS)),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 2**31, 2**60, 2**63 - 1, 2**63]), max_size=5),
)
def test_shapes_that_pass_are_read(scratch: Path, dtype: str, shape: list[int]) -> None:
    size = int(np.prod(np.array(shape, object))) * BITS[dtype] // 8 if shape else BITS[dtype] // 8
    header = json.dumps({"a": entry(shape, 0, size, dtype)})
    refused_or_read(scratch, made(header, bytes(size) if size < 10_000 else b""))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.json", b"", Rule.FILE_KIND),
        ("a.json", b"{", Rule.FILE_KIND),
        ("a.json", b'{"a":\xff}', Rule.FILE_KIND),
        ("a.json", "{}".encode("utf-16"), Rule.FILE_KIND),
        ("a.json", b"[" * 9_000, Rule.FILE_KIND),
        ("a.json", b'{"a":' * 1_800, Rule.FILE_KIND),
        ("a.json", b"[" * 101 + b"]" * 101, Rule.FILE_KIND),
        ("a.json", b'{"a":' * 101 + b"1" + b"}" * 101, Rule.FILE_KIND),
        ("a.json", b"9" * 5_000, Rule.FILE_KIND),
        ("a.json", b"{}" + b" " * 10_000, Rule.FILE_SIZE),
        (".json", b"no", Rule.FILE_KIND),
        ("a.txt", b"a\0b", Rule.FILE_KIND),
        ("a.txt", b"\x80\x04\x95", Rule.FILE_KIND),
        ("a.txt", b"\xed\xa0\x80", Rule.FILE_KIND),
        ("a.txt", b"x" * 10_001, Rule.FILE_SIZE),
    ],
)
def test_a_companion_is_refused(tmp_path: Path, name: str, content: bytes, rule: Rule) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(Refused, match=rf"^{re.escape(name)}: ") as caught:
        check_text(file, 10_000)
    assert caught.value.rule is rule


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{}"),
        ("a.json", b"\xef\xbb\xbf{}"),
        ("a.json", b"[" * 100 + b"]" * 100),
        ("a.json", b'{"time_step_limit": [0.0, Infinity]}'),
        ("merges.txt", "#version: 0.2\nĠ t\n".encode()),
        ("chat_template.jinja", b"{{ bos_token }}"),
        ("a.txt", b"x" * 10_000),
        ("empty.txt", b""),
    ],
)
def test_a_companion_passes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    check_text(tmp_path / name, 10_000)


def test_a_folder_is_no_companion(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a file") as caught:
        check_text(tmp_path, 10_000)
    assert caught.value.rule is Rule.FILE_KIND


if __name__ == "__main__":
    write_corpus(CORPUS)


# --- tables of tokenizers -------------------------------------------------------------------------


def test_a_tokenizers_table_is_binary_and_neither_pickle_nor_archive(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\xff")
    check_table(file, 100)
    for content, most, rule in (
        (b"\x80\x04pickle", 100, Rule.FILE_KIND),
        (b"PK\x03\x04", 100, Rule.FILE_KIND),
        (b"x" * 101, 100, Rule.FILE_SIZE),
    ):
        file.write_bytes(content)
        with pytest.raises(Refused) as caught:
            check_table(file, most)
        assert caught.value.rule is rule
