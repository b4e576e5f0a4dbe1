"""Of what a repository has, exactly what is needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.refs import ref
from cluster.models.refusals import Refused, Rule
from cluster.models.selection import needed


def words(text: str) -> list[str]:
    return text.split()


PIPELINE = words(
    ".gitattributes README.md model_index.json v1-5-pruned.ckpt v1-5-pruned.safetensors "
    "feature_extractor/preprocessor_config.json safety_checker/config.json "
    "safety_checker/model.safetensors safety_checker/pytorch_model.bin "
    "safety_checker/model.fp16.safetensors scheduler/scheduler_config.json "
    "text_encoder/config.json text_encoder/model.safetensors text_encoder/pytorch_model.bin "
    "text_encoder/model.fp16.safetensors text_encoder/model.onnx text_encoder/flax_model.msgpack "
    "tokenizer/merges.txt tokenizer/vocab.json tokenizer/tokenizer_config.json unet/config.json "
    "unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors "
    "unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin "
    "vae/config.json vae/diffusion_pytorch_model.safetensors "
    "vae/diffusion_pytorch_model.fp16.safetensors vae_decoder/model.onnx onnx/unet/model.onnx "
    "text_encoder/adapter_config.json text_encoder/adapter_model.safetensors "
    "images/a.png"
)
LANGUAGE = words(
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja "
    "special_tokens_map.json tokenizer.model model.safetensors.index.json "
    "model-00001-of-00002.safetensors model-00002-of-00002.safetensors consolidated.safetensors "
    "pytorch_model.bin.index.json pytorch_model-00001-of-00002.bin modeling_custom.py README.md "
    "original/consolidated.00.pth original/params.json"
)


def chosen(kind: str, paths: list[str], variant: str = "", file: str = "") -> set[str]:
    return set(needed(ref(kind, "org/name", variant, file), paths))


def test_a_pipeline_in_its_plain_variant() -> None:
    assert chosen("base", PIPELINE) == {
        "model_index.json",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_pipelines_variant() -> None:
    weights = {path for path in chosen("base", PIPELINE, "fp16") if path.endswith(".safetensors")}
    assert weights == {
        "safety_checker/model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_a_language_model_with_its_shards_and_nothing_that_runs() -> None:
    assert chosen("base", LANGUAGE) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    "shards",
    ["model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors"],
)
def test_both_ways_to_name_a_variants_shards(shards: str) -> None:
    paths = ["config.json", "model.safetensors", shards]
    assert chosen("base", paths, "fp16") == {"config.json", shards}


def test_the_table_of_shards_is_the_variants_own() -> None:
    plain = words("model.safetensors.index.json model-00001-of-00001.safetensors")
    fp16 = words("model.safetensors.index.fp16.json model.fp16-00001-of-00001.safetensors")
    assert chosen("base", ["config.json", *plain, *fp16]) == {"config.json", *plain}
    assert chosen("base", ["config.json", *plain, *fp16], "fp16") == {"config.json", *fp16}


def test_of_whole_weights_and_shards_the_one_is_taken_that_the_library_reads() -> None:
    """Transformers reads the whole file where there is one, diffusers what the table names."""
    shards = "{0}.safetensors.index.json {0}-00001-of-00001.safetensors"
    text = [*words(shards.format("model")), "model.safetensors"]
    unet = [*words(shards.format("diffusion_pytorch_model")), "diffusion_pytorch_model.safetensors"]
    assert chosen("base", ["config.json", *text]) == {"config.json", "model.safetensors"}
    assert chosen("unet", ["config.json", *unet]) == {"config.json", *unet}


def test_what_the_libraries_never_open_is_not_fetched() -> None:
    """One of these that isn't UTF-8, or no JSON, would have the whole model refused."""
    read = words(
        "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model "
        "special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt spiece.model "
        "sentencepiece.bpe.model chat_template.jinja chat_template.json tiktoken.model spm.model "
        "preprocessor_config.json model.safetensors"
    )
    unread = words(
        "notes.txt README.txt trainer_state.json training_args.json all_results.json "
        "requirements.txt adapter_config.json log.txt pytorch_model.bin.index.json license.txt"
    )
    assert chosen("base", [*read, *unread]) == set(read)


def test_networks_alone() -> None:
    files = ["config.json", "diffusion_pytorch_model.safetensors", "README.md", "x.ckpt"]
    fp16 = "diffusion_pytorch_model.fp16.safetensors"
    assert chosen("controlnet", [*files, fp16]) == set(files[:2])
    assert chosen("controlnet", [*files, fp16], "fp16") == {"config.json", fp16}
    assert chosen("vae", files) == chosen("unet", files) == set(files[:2])


def test_a_loras_file_by_name_by_convention_or_alone() -> None:
    usual = "pytorch_lora_weights.safetensors"
    assert chosen("lora", ["a.safetensors", usual]) == {usual}
    assert chosen("lora", ["a.safetensors", "README.md"]) == {"a.safetensors"}
    assert chosen("lora", ["a.safetensors", usual], file="a.safetensors") == {"a.safetensors"}


@pytest.mark.parametrize(
    ("paths", "file"),
    [
        (["a", "checkpoint-1"], "checkpoint-1"),
        (["a", "optimizer", "my_scheduler"], "optimizer"),
        (["deep/down/in/a", "checkpoint-1"], "checkpoint-1"),
        (["a b", "checkpoint-1"], "checkpoint-1"),
        (["in/a", "checkpoint-1"], ""),
    ],
    ids=str,
)
def test_a_lora_in_whose_place_others_take_another_file_is_refused(
    paths: list[str], file: str
) -> None:
    with pytest.raises(Refused, match="other nodes take"):
        chosen("lora", with_ending(paths), file=f"{file}.safetensors" if file else "")


@pytest.mark.parametrize(
    ("paths", "file"),
    [
        (["a", "checkpoint-1"], "a"),
        (["a", "b"], "b"),
        (["a", "b", "checkpoint-1"], "checkpoint-1"),
        (["checkpoint-1", "checkpoint-2"], "checkpoint-2"),
    ],
    ids=str,
)
def test_a_named_lora_among_several_is_taken_where_nobody_guesses_another(
    paths: list[str], file: str
) -> None:
    wanted = f"{file}.safetensors"
    assert chosen("lora", with_ending(paths), file=wanted) == {wanted}


def test_what_a_link_leads_to_is_guessed_by_nobody() -> None:
    lora = ref("lora", "https://host/a.zip", None, "checkpoint-1.safetensors")
    assert needed(lora, with_ending(["a", "checkpoint-1"])) == ("checkpoint-1.safetensors",)


def with_ending(names: list[str]) -> list[str]:
    return [f"{name}.safetensors" for name in names]


@pytest.mark.parametrize(
    ("kind", "paths", "fields", "rule"),
    [
        ("lora", ["a.safetensors", "b.safetensors"], {}, Rule.FILE_KIND),
        ("lora", ["a.bin"], {"file": "a.bin"}, Rule.FILE_KIND),
        ("lora", ["pytorch_lora_weights.bin"], {}, Rule.FILE_KIND),
        ("base", ["model_index.json", "unet/diffusion_pytorch_model.bin"], {}, Rule.FILE_KIND),
        ("base", ["config.json", "pytorch_model.bin"], {}, Rule.FILE_KIND),
        ("textual_inversion", ["learned_embeds.bin"], {}, Rule.FILE_KIND),
        ("base", ["config.json", *(f"model-{i:05}-of-00999.safetensors" for i in range(600))], {},
         Rule.FILE_KIND),
    ],
)  # fmt: skip
def test_what_could_run_code_is_refused(
    kind: str, paths: list[str], fields: dict[str, str], rule: Rule
) -> None:
    with pytest.raises(Refused) as caught:
        chosen(kind, paths, **fields)
    assert caught.value.rule is rule


@pytest.mark.parametrize(
    ("kind", "paths", "fields"),
    [
        ("base", ["README.md"], {}),
        ("base", [], {}),
        ("base", ["config.json", "model.safetensors"], {"variant": "fp16"}),
        ("lora", ["a.safetensors"], {"file": "b.safetensors"}),
        ("controlnet", ["diffusion_pytorch_model.safetensors"], {}),
        ("textual_inversion", ["a.safetensors"], {}),
    ],
)
def test_what_is_not_there(kind: str, paths: list[str], fields: dict[str, str]) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        chosen(kind, paths, **fields)
    assert caught.value.kind is ModelUnavailableKind.NOT_HERE


def test_a_part_without_the_variant_is_a_lack() -> None:
    lacking = [path for path in PIPELINE if path != "vae/diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(ModelUnavailable, match="vae's weights"):
        chosen("base", lacking, "fp16")


@given(st.lists(st.text(max_size=40), max_size=12), st.sampled_from(["base", "lora", "unet"]))
def test_only_plain_paths_are_ever_chosen(paths: list[str], kind: str) -> None:
    hostile = [f"../{path}" for path in paths] + [f"unet/{path}" for path in paths] + paths
    usual = ["model_index.json", "config.json", "diffusion_pytorch_model.safetensors"]
    try:
        found = chosen(kind, [*hostile, *usual])
    except ModelUnavailable:
        return
    for path in found:
        assert path.isascii()
        assert ".." not in path.split("/")
        assert not path.startswith("/")
        assert path.count("/") <= 1
