from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import ClusterError, TaskInvalid
from cluster.models.refs import ModelRef, of_model_id, ref
from cluster.models.refusals import Refused, Rule


@pytest.mark.parametrize("name", ["org/name", "gpt2", "o.r-g/n_a.m-e", "https://host/a?b=c"])
def test_names_that_are_asked_for(name: str) -> None:
    assert ref("base", name, "fp16") == ModelRef("base", name, "fp16")


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "/etc/passwd", "../x/y", "a b/c", "org/na--me", "org/x..y", "org/name\n", "é é"],
)
def test_names_that_no_hub_could_have_are_the_tasks_fault(name: str) -> None:
    with pytest.raises(TaskInvalid, match="neither a hub's id nor a URL"):
        ref("base", name)


@pytest.mark.parametrize("name", ["", "-a/b", "a/b.git", "org/.hidden", "a/" + "b" * 97, "é/x"])
def test_names_on_which_others_may_differ_are_only_refused(name: str) -> None:
    with pytest.raises(Refused) as caught:
        ref("base", name)
    assert caught.value.rule is Rule.NAME


@pytest.mark.parametrize("word", ["../x", "a/b", ".hidden", "a b", "x" * 101, "a\0"])
def test_variants_and_files_that_could_be_paths_are_refused(word: str) -> None:
    for fields in ({"variant": word}, {"file": word}):
        with pytest.raises(Refused) as caught:
            ref("lora", "org/name", **fields)
        assert caught.value.rule is Rule.NAME


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        ("base:org/name", ModelRef("base", "org/name")),
        ("base:org/name+fp16", ModelRef("base", "org/name", "fp16")),
        ("lora:https://host/a+b?c=d", ModelRef("lora", "https://host/a+b?c=d")),
        ("controlnet:org/x", ModelRef("controlnet", "org/x")),
    ],
)
def test_model_ids_of_the_chain(model_id: str, expected: ModelRef) -> None:
    assert of_model_id(model_id) == expected


@pytest.mark.parametrize(
    "model_id", ["", "base", "base:", "vae:org/x", "base:a/b/c", "base:x+../y"]
)
def test_what_the_chain_says_is_never_the_tasks_fault(model_id: str) -> None:
    with pytest.raises(Refused):
        of_model_id(model_id)


@given(st.text(max_size=200))
def test_any_text_is_a_model_id_or_refused(text: str) -> None:
    for model_id in (text, f"base:{text}"):
        try:
            found = of_model_id(model_id)
        except Refused:
            continue
        assert found.key.isascii()
        assert not set(found.key) & set("/\\\0 ")


@given(st.text(max_size=120), st.text(max_size=120), st.text(max_size=40))
def test_keys_are_plain_folder_names_and_differ_as_the_refs_do(a: str, b: str, c: str) -> None:
    made = []
    for fields in ((a, c), (b, c), (a, "")):
        try:
            made.append(ref("base", *fields))
        except ClusterError:
            continue
    assert len({each.key for each in made}) == len(set(made))
    assert all(0 < len(each.key) < 100 and not each.key.startswith(".") for each in made)


@pytest.mark.parametrize(
    "name",
    ["https://host/x\nevil line", "https://host/\x1b[31m", "https://host/\ud800", "https://hóst/x",
     "https://host/a b", "https://host/" + "x" * 2048],
)  # fmt: skip
def test_links_that_are_not_plain_are_refused_in_one_plain_line(name: str) -> None:
    for fields in (("lora", name), (f"lora:{name}",)):
        with pytest.raises(Refused) as caught:
            ref(*fields) if len(fields) == 2 else of_model_id(*fields)
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://user:SECRET@host/x.safetensors", "https://host/x.safetensors"),
        ("https://SECRET@host/x", "https://host/x"),
        ("https://a:SECRET@b:SECRET@host/x@2", "https://host/x@2"),
        ("https://host/x#token=SECRET", "https://host/x"),
        ("https://host?key=SECRET", "https://host"),
        ("https://host/x?u=https://y/SECRET#SECRET", "https://host/x"),
    ],
)
def test_a_links_credentials_and_fragment_are_shown_to_nobody(name: str, shown: str) -> None:
    assert ModelRef("lora", name).shown == shown
    assert str(ModelRef("lora", name)) == f"lora:{shown}"


def test_a_long_link_is_shown_in_short_and_has_its_own_key() -> None:
    a, b = (ref("lora", "https://host/" + "x" * 1000 + letter) for letter in "ab")
    assert len(str(a)) < 300
    assert a.key != b.key


def test_a_links_query_is_shown_to_nobody() -> None:
    link = ref("lora", "https://host/file?token=SECRET", file="a.safetensors")
    assert "SECRET" not in str(link) + link.key
    assert str(link) == "lora:https://host/file+a.safetensors"
