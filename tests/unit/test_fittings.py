"""What a model folder holds besides networks, as it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from cluster.inference import pipelines


def test_images_are_prepared_alike_whatever_else_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchvision is installed, the library's plain name is another class, of other bits."""
    monkeypatch.setattr(transformers, "CLIPImageProcessor", None)
    folder = tmp_path / "feature_extractor"
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    made = pipelines._feature_extractor(tmp_path)
    assert type(made) is transformers.CLIPImageProcessorPil
    assert np.asarray(made(Image.new("RGB", (40, 30)))["pixel_values"]).shape == (1, 3, 224, 224)
