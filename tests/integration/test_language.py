"""Language tasks on a tiny model: the response to the byte, and the same bits always."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskUnsupported,
)
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType
from cluster.inference import language
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import LLM, SD15

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
CHAT = [{"role": "system", "content": "you tell"}, {"role": "user", "content": "what is a cat?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 40, "max_new_tokens": 12}
LONG = SAMPLED | {"max_new_tokens": 80}


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


def new_engine(root: Path) -> Engine:
    return Engine(DEVICE, ModelStore(root), time.time, Limits(2**30, 2**30, threads=1))


def order(**fields: Any) -> Order:
    task = {"model": LLM, "messages": CHAT, "generation_config": {"max_new_tokens": 12}} | fields
    return Order(AttemptId("a"), Commitment("0x01"), TaskType.LLM, json.dumps(task), None)


def run(engine: Engine, **fields: Any) -> Computed:
    return engine.run(order(**fields), lambda: False, lambda _step, _steps: None)


def answer(engine: Engine, **fields: Any) -> dict[str, Any]:
    ((name, content),) = run(engine, **fields).files
    assert name == "0.json"
    read: dict[str, Any] = json.loads(content)
    return read


def fault(engine: Engine, **fields: Any) -> ClusterError:
    with pytest.raises(ClusterError) as caught:
        run(engine, **fields)
    return caught.value


# --- the response -----------------------------------------------------------------------------


def test_the_file_is_the_response_to_the_byte(engine: Engine) -> None:
    made = run(engine)
    content = made.files[0][1]
    read = json.loads(content)
    assert content == json.dumps(read).encode()
    assert list(read) == ["model", "choices", "usage"]
    assert list(read["choices"][0]) == ["finish_reason", "message", "index"]
    assert list(read["choices"][0]["message"]) == ["role", "content"]
    assert list(read["usage"]) == ["prompt_tokens", "completion_tokens", "total_tokens"]
    assert read["model"] == LLM
    assert read["choices"][0]["message"]["role"] == "assistant"
    assert read["choices"][0]["message"]["content"]
    assert made.score == hashlib.sha256(content).digest()
    usage = read["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 12


def test_non_ascii_text_is_escaped() -> None:
    assert language.result_file({"model": "é"}) == b'{"model": "\\u00e9"}'


@pytest.mark.parametrize(
    "config",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 8, "repetition_penalty": 1.5},
        SAMPLED | {"num_return_sequences": 3},
        SAMPLED | {"top_p": 0.8, "typical_p": 0.9},
    ],
    ids=str,
)
def test_it_is_what_the_librarys_own_pipeline_makes(
    engine: Engine, tiny_models: Path, config: dict[str, Any]
) -> None:
    read = answer(engine, generation_config=config, seed=11)
    theirs = _by_the_pipeline(tiny_models / LLM, config, seed=11)
    assert [choice["message"]["content"] for choice in read["choices"]] == theirs
    assert [choice["index"] for choice in read["choices"]] == list(range(len(theirs)))


def _by_the_pipeline(folder: Path, config: dict[str, Any], seed: int) -> Sequence[str]:
    """The text-generation pipeline on the same prompt, greedy unless told to sample."""
    make: Any = transformers.pipeline
    pipe = make("text-generation", model=str(folder), device="cpu")
    prompt = pipe.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    transformers.set_seed(seed)
    made = pipe(
        prompt,
        return_tensors=True,
        **({"do_sample": False} | config),
    )
    length = len(pipe.tokenizer.encode(prompt, add_special_tokens=False))
    return [
        pipe.tokenizer.decode(
            each["generated_token_ids"][length:], skip_special_tokens=True
        ).strip()
        for each in made
    ]


def test_the_end_of_the_text_is_told_from_the_end_of_the_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(engine)["choices"][0]["finish_reason"] == "length"
    folder = engine.store.language_folder(LLM)
    tokenizer = language.load_tokenizer(folder)
    params = engine_parameters()
    prompt = [5, 6, 7]
    ended = language.Generated((*prompt, 9, tokenizer.eos_token_id))
    cut = language.Generated((*prompt, 9, 9))
    read = language.response(tokenizer, params, prompt, [ended, cut])
    assert [choice["finish_reason"] for choice in read["choices"]] == ["stop", "length"]
    assert read["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def engine_parameters() -> Any:
    from cluster.inference.parameters import parse

    return parse(TaskType.LLM, order().parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "tell the name of the sea"}]},
        {"messages": [*CHAT, {"role": "assistant", "content": "a dog"}]},
        {"tools": [TOOL]},
        {"seed": 4, "generation_config": SAMPLED},
        {"generation_config": {"max_new_tokens": 13}},
        {"dtype": "bfloat16", "generation_config": LONG},
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_every_parameter_counts(engine: Engine, changes: dict[str, Any]) -> None:
    config = LONG if changes.get("generation_config") is LONG else {"max_new_tokens": 12}
    plain = run(engine, generation_config=config)
    assert run(engine, **changes).score != plain.score
    assert run(engine, generation_config=config).score == plain.score


def test_tool_calls_and_answers_reach_the_template(engine: Engine) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    result = {"role": "tool", "tool_call_id": "7", "content": "rain"}
    asked = answer(engine, messages=[*CHAT, call, result], tools=[TOOL])
    plain = answer(engine, messages=[*CHAT, call], tools=[TOOL])
    assert asked["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


def test_a_model_without_a_template_reads_the_contents(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    (store / "org" / "model" / "chat_template.jinja").unlink()
    fresh = new_engine(store)
    read = answer(fresh, model="org/model")
    tokenizer = language.load_tokenizer(store / "org" / "model")
    expected = tokenizer.encode("you tell\nwhat is a cat?", add_special_tokens=False)
    assert read["usage"]["prompt_tokens"] == len(expected)


def _copy(root: Path, to: Path) -> Path:
    shutil.copytree(root / LLM, to / "org" / "model")
    return to


# --- the same bits ----------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from tests.integration.test_language import SAMPLED, new_engine, run
print(run(new_engine(Path(sys.argv[1])), generation_config=SAMPLED, seed=3).score.hex())
"""


def test_same_bits_warm_cold_after_others_and_in_another_process(
    engine: Engine, tiny_models: Path
) -> None:
    first = run(engine, generation_config=SAMPLED, seed=3)
    run(engine, generation_config=SAMPLED, seed=4)
    picture = {"image_width": 64, "image_height": 64, "steps": 1, "num_images": 1}
    sd = {"base_model": SD15[0], "prompt": "a cat", "task_config": picture}
    engine.run(
        Order(AttemptId("b"), Commitment("0x02"), TaskType.SD, json.dumps(sd), None),
        lambda: False,
        lambda _step, _steps: None,
    )
    assert run(engine, generation_config=SAMPLED, seed=3).files == first.files
    assert run(new_engine(tiny_models), generation_config=SAMPLED, seed=3).files == first.files
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_models)],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.strip() == first.score.hex()


def test_the_model_is_loaded_once_and_shown_as_warm(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    assert LLM in fresh.state().on_disk
    run(fresh)
    run(fresh, seed=2)
    assert fresh.counts.loads == 1
    assert fresh.state().in_host_memory == {LLM}
    assert [key.split("|")[0] for key in fresh.state().warm] == [LLM]


# --- stopping and failing ---------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_cancelled_between_tokens(engine: Engine, beams: int) -> None:
    steps: list[tuple[int, int]] = []
    what = order(generation_config={"max_new_tokens": 50, "num_beams": beams})
    with pytest.raises(Cancelled):
        engine.run(what, lambda: len(steps) >= 2, lambda *step: steps.append(step))
    assert steps == [(1, 50), (2, 50)]


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_config": {"do_sample": True, "temperature": -1.0}},
        {"generation_config": {"num_return_sequences": 4}},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": "cat " * 4000}]},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_the_library_refuses_is_never_reported(engine: Engine, fields: dict[str, Any]) -> None:
    assert isinstance(fault(engine, **fields), TaskUnsupported)


def test_code_in_a_models_folder_is_never_run(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    config = store / "org" / "model" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"auto_map": {"AutoConfig": "theirs.Config"}}))
    refused = fault(new_engine(store), model="org/model")
    assert isinstance(refused, ModelUnavailable)
    assert refused.kind is ModelUnavailableKind.REFUSED
    (store / "org" / "model" / "theirs.py").write_text("raise SystemExit\n")
    refused = fault(new_engine(store), model="org/model")
    assert isinstance(refused, ModelUnavailable)
    assert refused.kind is ModelUnavailableKind.REFUSED


def test_missing_and_damaged_models(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    missing = fault(new_engine(store), model="org/none")
    assert isinstance(missing, ModelUnavailable)
    assert missing.kind is ModelUnavailableKind.NOT_HERE
    weights = store / "org" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = fault(new_engine(store), model="org/model")
    assert isinstance(damaged, ModelUnavailable)
    assert damaged.kind is ModelUnavailableKind.DAMAGED


@pytest.mark.parametrize(
    ("number", "expected", "kind"),
    [
        (float("nan"), ModelUnavailable, ModelUnavailableKind.DAMAGED),
        (3e38, ModelUnavailable, ModelUnavailableKind.DAMAGED),
        (6e4, TaskUnsupported, None),
    ],
)
def test_scores_that_are_no_numbers_on_any_card_are_no_cards_fault(
    tiny_models: Path, tmp_path: Path, number: float, expected: type[ClusterError], kind: object
) -> None:
    from safetensors.torch import load_file, save_file

    store = _copy(tiny_models, tmp_path)
    file = store / "org" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(number)
    save_file(tensors, file, metadata={"format": "pt"})
    fresh = new_engine(store)
    broken = fault(fresh, model="org/model", dtype="float16")
    assert isinstance(broken, expected)
    assert getattr(broken, "kind", None) is kind
    if number == 6e4:
        assert run(fresh, model="org/model", dtype="bfloat16").files


def test_auto_is_what_the_weights_are_stored_in(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    make: Any = transformers.AutoModelForCausalLM
    made = make.from_pretrained(store / "org" / "model", dtype=torch.bfloat16)
    made.save_pretrained(store / "org" / "model")
    fresh = new_engine(store)
    auto, half, full = (
        run(fresh, model="org/model", dtype=dtype, generation_config=LONG).score
        for dtype in ("auto", "bfloat16", "float32")
    )
    assert auto == half != full


def test_tokens_are_chosen_by_deterministic_algorithms_where_there_are_any(
    engine: Engine,
) -> None:
    """What has none is let pass, as in the network's runner: no card could be made to have one."""
    seen: list[tuple[bool, bool]] = []

    def look(_step: int, steps: int) -> None:
        if steps:
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))  # has none
            cudnn: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            seen.append((torch.are_deterministic_algorithms_enabled(), cudnn))

    with pytest.warns(UserWarning, match="put_"):
        engine.run(order(generation_config=SAMPLED | {"top_p": 0.5}), lambda: False, look)
    assert set(seen) == {(True, False)}
    with pytest.raises(RuntimeError, match="put_"):
        look(1, 1)


def test_stopping_leaves_torchs_settings_as_they_were(engine: Engine) -> None:
    with pytest.raises(Cancelled):
        engine.run(order(), lambda: True, lambda _step, _steps: None)
    steps: list[int] = []
    with pytest.raises(Cancelled):
        engine.run(
            order(), lambda: bool(steps), lambda step, _: steps.append(step) if step else None
        )
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_token_beyond_the_models_table_never_reaches_a_card(
    tiny_models: Path, tmp_path: Path
) -> None:
    store = _copy(tiny_models, tmp_path)
    tokenizer = language.load_tokenizer(store / "org" / "model")
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(store / "org" / "model")
    chat = [{"role": "user", "content": "<beyond>"}]
    assert isinstance(fault(new_engine(store), model="org/model", messages=chat), TaskUnsupported)


def test_a_text_that_outgrows_the_model_is_never_reported() -> None:
    seen: list[tuple[int, int]] = []
    ours = language._Ours()
    watch = language._Watch(10, 100, 12, lambda *step: seen.append(step), ours)
    watch(torch.zeros((1, 12), dtype=torch.long), None)
    with pytest.raises(TaskUnsupported):
        watch(torch.zeros((1, 13), dtype=torch.long), None)
    assert seen == [(2, 100), (3, 100)]
    # The last token is never looked up again.
    language._Watch(10, 3, 12, lambda *_: None, ours)(torch.zeros((1, 13), dtype=torch.long), None)


def test_missing_weights_are_never_made_up(tiny_models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    store = _copy(tiny_models, tmp_path)
    file = store / "org" / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    lacking = fault(new_engine(store), model="org/model")
    assert isinstance(lacking, ModelUnavailable)
    assert lacking.kind is ModelUnavailableKind.DAMAGED


def test_a_models_own_settings_are_part_of_it(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    shutil.copytree(store / "org" / "model", store / "org" / "twin")
    settings = store / "org" / "twin" / "generation_config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps(said | {"do_sample": True, "temperature": 9.0}))
    fresh = new_engine(store)
    first = answer(fresh, model="org/model")["choices"]
    assert answer(fresh, model="org/twin")["choices"] != first
    assert fresh.counts.loads == 2


def _with_settings(store: Path, **settings: object) -> None:
    file = store / "org" / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static", "max_cache_len": 4096},
        {"cache_implementation": "offloaded_static"},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"disable_compile": False, "custom_generate": "acme/theirs"},
    ],
    ids=str,
)
def test_how_it_is_computed_is_not_for_the_model_to_say(
    tiny_models: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    """On a card a static cache would have the network compiled."""
    store = _copy(tiny_models, tmp_path)
    expected = run(new_engine(store), model="org/model", generation_config=SAMPLED).score
    _with_settings(store, **how)
    fresh = new_engine(store)
    assert run(fresh, model="org/model", generation_config=SAMPLED).score == expected
    (loaded,) = (part.module for part in fresh._pool._parts.values())
    own: Any = loaded.generation_config
    assert own.disable_compile
    assert own.cache_implementation is None


@pytest.mark.parametrize(
    "setting",
    [
        {"cache_implementation": "quantized"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"watermarking_config": {"greenlist_ratio": 0.5}},
        {"max_time": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_makes_other_tokens_elsewhere_is_refused(
    tiny_models: Path, tmp_path: Path, setting: dict[str, object], file: str
) -> None:
    store = _copy(tiny_models, tmp_path)
    settings = store / "org" / "model" / file
    settings.write_text(json.dumps(json.loads(settings.read_text()) | setting))
    refused = fault(new_engine(store), model="org/model")
    assert isinstance(refused, ModelUnavailable)
    assert refused.kind is ModelUnavailableKind.REFUSED
    assert next(iter(setting)) in str(refused)


@pytest.mark.parametrize(
    "setting", [{"dola_layers": "high"}, {"penalty_alpha": 0.6, "top_k": 4}, {"stop_strings": "a"}]
)
def test_what_the_library_does_no_more_is_never_reported(
    tiny_models: Path, tmp_path: Path, setting: dict[str, object]
) -> None:
    store = _copy(tiny_models, tmp_path)
    _with_settings(store, **setting)
    assert isinstance(fault(new_engine(store), model="org/model"), TaskUnsupported)


def test_the_prompt_is_read_with_special_tokens_and_counted_without(
    tiny_models: Path, tmp_path: Path
) -> None:
    """As by the library's pipeline: a tokenizer that begins each text does so here, too."""
    from tokenizers.processors import TemplateProcessing

    store = _copy(tiny_models, tmp_path)
    folder = store / "org" / "model"
    tokenizer = language.load_tokenizer(folder)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", special_tokens=[begin]
    )
    tokenizer.save_pretrained(folder)
    read = answer(new_engine(store), model="org/model")
    text = read["choices"][0]["message"]["content"]
    assert [text] == _by_the_pipeline(folder, {"max_new_tokens": 12}, seed=0)
