"""Crops of the sample photographs, and a codec that learns from them."""

import numpy as np
import pytest
import yaml
from PIL import Image

from unimm.data.photographs import HELD_OUT, random_crop, write_crops
from unimm.training.recipe import train


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs") / "crops"
    write_crops(folder, side=32, number=12)
    return folder


def test_a_crop_is_a_part_of_its_photograph_at_the_wanted_size():
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (100, 200, 3))
    for seed in range(8):
        crop = np.asarray(random_crop(picture, 32, np.random.default_rng(seed))).astype(int)
        assert crop.shape == (32, 32, 3)
        steps = np.diff(crop[0, :, 0])
        assert (steps >= 0).all() or (steps <= 0).all()  # mirrored or not, never shuffled
        assert 30 <= np.ptp(crop) <= 130  # 30 to 100 of 200 columns


def test_crops_are_numbered_and_a_full_folder_is_left_alone(crops):
    names = sorted(path.name for path in crops.iterdir())
    assert names == [f"{index:06d}.png" for index in range(12 + HELD_OUT)]
    assert {Image.open(crops / name).size for name in names} == {(32, 32)}
    with pytest.raises(ValueError, match="is not empty"):
        write_crops(crops, side=32, number=1)
    with pytest.raises(ValueError, match="number is 0"):
        write_crops(crops.parent / "none", side=32, number=0)


def test_a_codec_learns_from_them_and_is_measured_on_the_others(crops, tmp_path):
    recipe = {
        "task": "codec",
        "run": {"name": "photographs", "directory": str(tmp_path)},
        "model": {
            "image_size": 32,
            "encoder": {"kind": "patches", "patch": 16, "width": 16},
            "resampler": {"kind": "grid", "dim": 4},
            "quantizer": {"kind": "fsq", "levels": [4, 4]},
            "decoder": {"kind": "vit", "patch": 16, "width": 16, "depth": 1, "num_heads": 2},
        },
        "data": {"source": str(crops), "pool_size": 12, "batch_size": 4},
        "optimizer": {"steps": 2, "lr": 1e-3, "warmup": 1},
        "logging": {"every": 1, "validate_every": 2, "save_every": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    directory = train(path)
    pool = np.load(directory.root / "pool.npy")
    assert pool.shape == (12 + HELD_OUT, 32, 32, 3)
    assert (pool[-1] == np.asarray(Image.open(crops / f"{11 + HELD_OUT:06d}.png"))).all()
    assert any("psnr_source" in record for record in directory.metrics())
