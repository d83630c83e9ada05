"""rFID and LPIPS by TorchScript files: known values come out, and other files are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_networks import FlatVgg, TinyInception, TinyVgg, save_scripted

from unimm.cli.main import main
from unimm.data.photographs import photograph_squares
from unimm.data.pictures import to_pixel_values
from unimm.evaluation.codec import compare
from unimm.evaluation.fidelity import Thumbnails, TooFewPicturesError, features, frechet, lpips_distances, rfid
from unimm.nn.scripted import Inception, Lpips

SIDE = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted")
    networks = {"inception": TinyInception(), "vgg16": TinyVgg(), "flat": FlatVgg()}
    traced = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, SIDE, SIDE))
    traced.save(folder / "traced.pt")
    torch.save(TinyVgg().state_dict(), folder / "weights.pt")
    (folder / "text.pt").write_text("no network")
    return {name: save_scripted(network, folder / f"{name}.pt") for name, network in networks.items()} | {
        name: folder / f"{name}.pt" for name in ("traced", "weights", "text", "absent")
    }


@pytest.fixture(scope="module")
def squares():
    return photograph_squares(SIDE, 130)


def brighter(pictures):
    return (pictures // 2 + 100).astype(np.uint8)


def test_rfid_is_of_whole_sets_in_the_levels_of_the_file(files, squares):
    inception, pictures = Inception(files["inception"]), to_pixel_values(squares)
    real = features(inception, pictures)
    same = rfid(real, real)
    assert same.value == pytest.approx(0, abs=1e-6)
    assert (same.name, same.floor, same.warning) == ("rFID[d=12,n=130]", None, "")
    # Features move by 60 levels of 255 where all pixels do, and their spread does not change.
    dark = np.minimum(squares, 190)
    moved = rfid(*(features(inception, to_pixel_values(p.astype(np.uint8))) for p in (dark, dark + 60)))
    assert moved.value == pytest.approx(12 * (60 / 255) ** 2, rel=1e-3)


def test_few_pictures_are_warned_of_and_too_few_refused(files, squares):
    inception, pictures = Inception(files["inception"]), to_pixel_values(squares)
    real = features(inception, pictures)
    assert "biased: 119 pictures are fewer than 10" in rfid(real[:119], real[:119]).warning
    with pytest.raises(TooFewPicturesError, match="needs more than 12 pictures, there are 12"):
        rfid(real[:12], real[:12])
    colours = features(Thumbnails(), pictures)
    assert "biased: 65 pictures" in frechet("thumbnail4", colours, colours).warning
    (few,) = [m for m in compare("few", [(squares[:3], pictures[:3])], inception) if m.name == "rFID"]
    assert few.value is None
    assert "needs more than 12" in few.note


def test_lpips_is_the_squared_distance_of_the_files_vectors(files, squares):
    lpips = Lpips(files["vgg16"])
    copies = brighter(squares[:5])
    network = torch.jit.load(files["vgg16"])
    with torch.no_grad():
        one, other = (network.conv(torch.tensor(p).permute(0, 3, 1, 2) / 255).flatten(1) for p in (copies, squares[:5]))
    by_hand = ((one - other) ** 2).sum(dim=1)
    found = lpips_distances(lpips, to_pixel_values(copies), to_pixel_values(squares[:5]))
    assert found.tolist() == pytest.approx(by_hand.tolist(), rel=1e-4)
    assert lpips_distances(lpips, to_pixel_values(copies), to_pixel_values(copies)).tolist() == [0.0] * 5
    measures = compare("some", [(squares[:5], to_pixel_values(copies))], Thumbnails(), lpips)
    (measure,) = [m for m in measures if m.name == "LPIPS"]
    assert measure.value == pytest.approx(float(by_hand.mean()), rel=1e-4)
    assert measure.note.startswith("by vgg16.pt@")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "There is no file"),
        ("text", "not a TorchScript file"),
        ("weights", "not a TorchScript file"),
        ("traced", "and not return_features"),
        ("vgg16", "takes img, resize_images, return_lpips, and not return_features"),
    ],
)
def test_other_files_than_inception_are_refused(files, name, message):
    with pytest.raises(ValueError, match=message) as error:
        Inception(files[name])
    assert "inception-2015-12-05.pt" in str(error.value)


def test_vectors_of_another_form_are_refused(files, squares):
    with pytest.raises(ValueError, match=r"makes \(2, 4, 7, 7\) of 2 pictures"):
        Lpips(files["flat"])(to_pixel_values(squares[:2]))
    with pytest.raises(ValueError, match="and not resize_images, return_lpips"):
        Lpips(files["inception"])


def test_folders_are_judged_by_the_files(files, squares, tmp_path, capsys):
    for folder, pictures in (("real", squares[:20]), ("copies", brighter(squares[:20]))):
        (tmp_path / folder).mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / folder / f"{index:02}.png")
    both = ["evaluate", "codec", "--references", str(tmp_path / "real"), "--copies", str(tmp_path / "copies")]
    given = ["--inception", str(files["inception"]), "--lpips", str(files["vgg16"])]
    assert main([*both, *given, "--folder", str(tmp_path / "out")]) == 0
    measures = {m["name"]: m for m in json.loads((tmp_path / "out" / "report.json").read_text())["measures"]}
    assert [*measures] == ["PSNR, dB", "SSIM", "LPIPS", "rFID[d=12,n=20]"]
    assert measures["rFID[d=12,n=20]"]["value"] > 0.01
    assert "by inception.pt@" in measures["rFID[d=12,n=20]"]["note"]
    assert "biased" in (tmp_path / "out" / "report.md").read_text()
    assert main(both) == 0
    assert "FID" not in capsys.readouterr().out.replace(str(tmp_path), "").split("Copies by")[-1]
    assert main([*both, *given, "--extractor", "anything"]) == 2
    assert "name --inception for rFID" in capsys.readouterr().err
    assert main([*both, "--lpips", str(files["text"])]) == 2
