"""One tiny checkpoint of every kind of tower, as published."""

from __future__ import annotations

import pytest
from tiny_towers import (
    make_clip_checkpoint,
    make_dinov2_checkpoint,
    make_dinov3_checkpoint,
    make_siglip_checkpoint,
    make_vit_checkpoint,
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Folders by kind; tests that change one make a copy."""
    root = tmp_path_factory.mktemp("towers")
    return {
        "clip": make_clip_checkpoint(root / "clip"),
        "siglip": make_siglip_checkpoint(root / "siglip"),
        "dinov2": make_dinov2_checkpoint(root / "dinov2"),
        "dinov2_with_registers": make_dinov2_checkpoint(root / "registers", registers=3),
        "dinov3_vit": make_dinov3_checkpoint(root / "dinov3"),
        "vit": make_vit_checkpoint(root / "vit"),
    }
