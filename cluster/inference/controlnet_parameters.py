"""How a ControlNet's image is made ready: the network's methods, told apart by `method`.

The network's schema refuses a method that it doesn't list, but it lists more with each version
(`softedge_hed` and `dwpose` are written down there and not listed yet), and a newer node runs older
tasks by its own list. So a method that is not known here is read as `Other`, which is not run, and
never the task's fault; only a method that isn't a text is.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Percent = Annotated[float, Field(gt=0, le=100)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class CannyArgs(_Schema):
    low_threshold: int = 100
    high_threshold: int = 200


class Canny(_Schema):
    method: Literal["canny"]
    args: CannyArgs | None = None


class ShuffleArgs(_Schema):
    """Height, width and grain of the flow, in pixels; None: the image's own, and 256."""

    h: int | None = None
    w: int | None = None
    f: int | None = None


class Shuffle(_Schema):
    method: Literal["shuffle"]
    args: ShuffleArgs | None = None


class MLSDArgs(_Schema):
    thr_v: Percent = 10
    thr_d: Percent = 10


class MLSD(_Schema):
    method: Literal["mlsd"]
    args: MLSDArgs | None = None


class PidiNetArgs(_Schema):
    apply_filter: bool = False


class PidiNet(_Schema):
    method: Literal[
        "scribble_pidinet", "softedge_pidinet", "scribble_pidisafe", "softedge_pidisafe"
    ]
    args: PidiNetArgs | None = None


class DepthZoeArgs(_Schema):
    gamma_corrected: bool = False


class DepthZoe(_Schema):
    method: Literal["depth_zoe"]
    args: DepthZoeArgs | None = None


class LeresArgs(_Schema):
    thr_a: int = 0
    thr_b: int = 0


class DepthLeres(_Schema):
    method: Literal["depth_leres", "depth_leres++"]
    args: LeresArgs | None = None


class MediapipeFaceArgs(_Schema):
    max_faces: int = 1
    min_confidence: Percent = 50


class MediapipeFace(_Schema):
    method: Literal["mediapipe_face"]
    args: MediapipeFaceArgs | None = None


class WithoutArgs(_Schema):
    method: Literal[
        "scribble_hed",
        "scribble_hedsafe",
        "softedge_hedsafe",
        "depth_midas",
        "openpose",
        "openpose_face",
        "openpose_faceonly",
        "openpose_full",
        "openpose_hand",
        "normal_bae",
        "lineart_coarse",
        "lineart_realistic",
        "lineart_anime",
    ]


class Other(_Schema):
    """A method that this software doesn't know, with arguments of whatever kind."""

    method: str


_KINDS: Final = (
    Canny,
    Shuffle,
    MLSD,
    PidiNet,
    DepthZoe,
    DepthLeres,
    MediapipeFace,
    WithoutArgs,
)
METHODS: Final = {
    method: kind.__name__
    for kind in _KINDS
    for method in kind.model_fields["method"].annotation.__args__  # type: ignore[union-attr]
}
"""The network's methods, and the class here that reads each."""


def _kind(value: object) -> str | None:
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    return METHODS.get(method, Other.__name__) if isinstance(method, str) else None


Preprocess = Annotated[
    Annotated[Canny, Tag("Canny")]
    | Annotated[Shuffle, Tag("Shuffle")]
    | Annotated[MLSD, Tag("MLSD")]
    | Annotated[PidiNet, Tag("PidiNet")]
    | Annotated[DepthZoe, Tag("DepthZoe")]
    | Annotated[DepthLeres, Tag("DepthLeres")]
    | Annotated[MediapipeFace, Tag("MediapipeFace")]
    | Annotated[WithoutArgs, Tag("WithoutArgs")]
    | Annotated[Other, Tag("Other")],
    Discriminator(_kind),
]
