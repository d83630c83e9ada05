"""Visual stages learn from any pictures, and keep the last ones back."""

import numpy as np
import pytest
import yaml
from PIL import Image
from test_stages import TINY_CODEC

from unimm.codec import VisualCodecConfig
from unimm.data.pictures import to_pixel_values
from unimm.training.pool import PoolConfig, prepare_pool
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory

CODEC = VisualCodecConfig(image_size=32, **TINY_CODEC)


@pytest.fixture
def pictures(tmp_path):
    """Twelve readable pictures of their own greys, and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (40, 36), (20 * number,) * 3).save(folder / f"{number:02d}.png")
    (folder / "05b.png").write_text("no picture")
    return folder


def test_a_source_is_read_once_and_its_last_pictures_are_held_out(pictures, tmp_path):
    directory = RunDirectory(RunConfig("run", str(tmp_path)))
    pool = prepare_pool(PoolConfig(source=str(pictures), pool_size=9), CODEC, directory, seed=0, held_out=3)
    assert pool.pictures.shape == (9, 32, 32, 3)
    assert [int(picture[0, 0, 0]) for picture in pool.pictures] == [20 * number for number in range(9)]
    greys = np.array([[[[20 * number] * 3]] for number in (9, 10, 11)], dtype=np.uint8)
    assert pool.held_out["source"][:, :, :1, :1].equal(to_pixel_values(greys))


def test_too_few_pictures_and_no_source_are_refused(pictures, tmp_path):
    directory = RunDirectory(RunConfig("run", str(tmp_path)))
    with pytest.raises(ValueError, match="12 readable pictures"):
        prepare_pool(PoolConfig(source=str(pictures), pool_size=10), CODEC, directory, seed=0, held_out=3)
    assert not list(directory.root.glob("*.npy"))
    with pytest.raises(ValueError, match="name one of them"):
        PoolConfig()


def test_a_codec_learns_from_a_folder_of_pictures(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("unimm.training.codec.HELD_OUT", 4)
    recipe = {
        "task": "codec",
        "run": {"name": "codec", "directory": str(tmp_path)},
        "data": {"source": str(pictures), "pool_size": 8, "batch_size": 2},
        "model": {"image_size": 32, **TINY_CODEC},
        "optimizer": {"steps": 2, "warmup": 0},
        "logging": {"every": 1, "validate_every": 2, "save_every": 2},
        "bf16": False,
    }
    (tmp_path / "codec.yaml").write_text(yaml.safe_dump(recipe))
    directory = train(tmp_path / "codec.yaml")
    assert "psnr_source" in yaml.safe_load((directory.root / "finished.json").read_text())
