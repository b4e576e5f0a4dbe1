"""The ways to make a ControlNet's image ready, as the network's schema has them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.core.errors import TaskInvalid
from cluster.core.types import TaskType
from cluster.inference.controlnet_parameters import METHODS, Preprocess
from cluster.inference.parameters import SDParameters, parse

NETWORKS = """
canny scribble_hed scribble_hedsafe softedge_hedsafe depth_midas mlsd openpose openpose_face
openpose_faceonly openpose_full openpose_hand scribble_pidinet softedge_pidinet scribble_pidisafe
softedge_pidisafe normal_bae lineart_coarse lineart_realistic lineart_anime depth_zoe depth_leres
depth_leres++ shuffle mediapipe_face
"""


def preprocess(value: object) -> Preprocess | None:
    fields: dict[str, Any] = {"base_model": "o/m", "prompt": "a cat", "task_config": {}}
    fields["controlnet"] = {"model": "o/c", "preprocess": value}
    params = parse(TaskType.SD, json.dumps(fields))
    assert isinstance(params, SDParameters)
    assert params.controlnet is not None
    return params.controlnet.preprocess


def test_the_methods_are_the_networks() -> None:
    assert set(METHODS) == set(NETWORKS.split())
    assert preprocess(None) is None


@pytest.mark.parametrize("method", NETWORKS.split())
def test_each_method_alone(method: str) -> None:
    made = preprocess({"method": method, "novelty": 1})
    assert made is not None
    assert made.method == method
    assert type(made).__name__ != "Other"
    assert getattr(made, "args", None) is None
    assert preprocess({"method": method, "args": None}) == made


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("canny", {"low_threshold": 100, "high_threshold": 200}),
        ("mlsd", {"thr_v": 10, "thr_d": 10}),
        ("scribble_pidinet", {"apply_filter": False}),
        ("softedge_pidisafe", {"apply_filter": False}),
        ("depth_zoe", {"gamma_corrected": False}),
        ("depth_leres++", {"thr_a": 0, "thr_b": 0}),
        ("shuffle", {"h": None, "w": None, "f": None}),
        ("mediapipe_face", {"max_faces": 1, "min_confidence": 50}),
    ],
)
def test_arguments_have_the_networks_defaults(method: str, defaults: dict[str, Any]) -> None:
    made = preprocess({"method": method, "args": {}})
    assert made is not None
    assert made.model_dump() == {"method": method, "args": defaults}


@pytest.mark.parametrize("method", ["softedge_hed", "dwpose", "teed", "", "Canny"])
def test_a_method_that_newer_nodes_may_know_is_not_the_tasks_fault(method: str) -> None:
    made = preprocess({"method": method, "args": {"any": ["thing"]}})
    assert made is not None
    assert (type(made).__name__, made.method) == ("Other", method)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "canny",
        7,
        {"method": None},
        {"method": 7},
        {"method": ["canny"]},
        {"args": {}},
        {"method": "canny", "args": []},
        {"method": "canny", "args": {"low_threshold": "low"}},
        {"method": "canny", "args": {"low_threshold": 0.5}},
        {"method": "shuffle", "args": {"f": "x"}},
        {"method": "mlsd", "args": {"thr_v": 0}},
        {"method": "mlsd", "args": {"thr_v": 101}},
    ],
    ids=str,
)
def test_what_no_version_takes_is_the_tasks_fault(value: object) -> None:
    with pytest.raises(TaskInvalid, match=r"controlnet\.preprocess"):
        preprocess(value)
