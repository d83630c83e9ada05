"""The judge of codecs: known distances come out, traps are refused, every kind of subject runs."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from unimm.cli.main import main
from unimm.codec import VisualCodecModel, load_preset
from unimm.codes import CodeSpec
from unimm.data.photographs import photograph_squares
from unimm.data.pictures import to_pixel_values
from unimm.evaluation.classical import Rate, at_equal_bytes, curve, psnr_of
from unimm.evaluation.codec import compare, evaluate_codec, picture_sets
from unimm.evaluation.fidelity import Thumbnails, code_statistics, features, frechet, ssim
from unimm.evaluation.legibility import place_word, text_survival
from unimm.evaluation.subjects import CodecSubject, Copies, VaeSubject, read_pairs

SIDE = 32


class Blur:
    """A subject that averages squares of `cell` pixels; 1 copies exactly."""

    name, spec, lengths = "blur", None, (None,)

    def __init__(self, side, cell):
        self.side, self.cell = side, cell

    def copy(self, pictures, length=None):
        pixels = to_pixel_values(pictures)
        small = torch.nn.functional.avg_pool2d(pixels, self.cell)
        return Copies(torch.nn.functional.interpolate(small, pixels.shape[2:], mode="nearest"))


@pytest.fixture(scope="module")
def squares():
    return photograph_squares(SIDE, 120)


def test_photographs_are_cut_and_never_twice_the_same(squares):
    assert squares.shape == (120, SIDE, SIDE, 3)
    assert len(np.unique(squares.reshape(120, -1), axis=0)) == 120
    assert photograph_squares(SIDE, 5).tolist() == squares[:5].tolist()
    assert photograph_squares(700, 2).shape == (2, 700, 700, 3)  # larger than any of them


def test_scores_of_known_copies(squares):
    assert ssim(squares[:3], squares[:3]).tolist() == [1.0, 1.0, 1.0]
    shifted = np.clip(squares[:3].astype(int) + 5, 0, 255).astype(np.uint8)
    assert (ssim(shifted, squares[:3]) < 1).all()
    dark = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr_of(dark, dark + 255).tolist() == [0.0]
    assert psnr_of(dark, dark + 51)[0] == pytest.approx(20 * np.log10(5))


def test_a_frechet_distance_rises_with_the_blur_and_begins_at_its_floor(squares):
    pictures = to_pixel_values(squares)
    real = features(Thumbnails(), pictures)
    exact, blurred = (
        frechet("thumbnail4", real, features(Thumbnails(), Blur(SIDE, cell).copy(squares).pixels)) for cell in (1, 32)
    )
    assert exact.value == pytest.approx(exact.floor)
    assert blurred.value > exact.value
    assert blurred.floor == exact.floor
    assert exact.name == "FD[thumbnail4,d=48,n=60]"
    with pytest.raises(ValueError, match="take more than 97"):
        frechet("thumbnail4", real[:90], real[:90])


def test_a_frechet_distance_of_gaussians_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(40_000, 3, generator=generator).numpy()
    other = torch.randn(40_000, 3, generator=generator).numpy() * 3 + 2
    assert frechet("values", one, other).value == pytest.approx(3 * (2**2 + (3 - 1) ** 2), rel=0.03)


def test_usage_and_entropy_of_known_codes():
    spec = CodeSpec((4, 4), "grid", 4, 8)
    found = code_statistics(torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]]), spec)
    assert (found.usage, found.entropy, found.ceiling) == (5 / 8, 1.0, 2.0)
    with pytest.raises(ValueError, match="no codes"):
        code_statistics(torch.zeros(0, 2, dtype=torch.int64), spec)


def test_files_are_compared_at_no_more_bytes_than_the_codes(squares):
    points = curve("JPEG", squares[:4])
    assert [point.size for point in points] == sorted(point.size for point in points)
    assert points[0].psnr < points[-1].psnr
    assert at_equal_bytes(points, points[3].size) == points[3]
    assert at_equal_bytes([Rate(10, 1), Rate(20, 2)], 19.0) == Rate(10, 1)
    assert at_equal_bytes(points, 1) is None


def test_a_codec_is_judged_as_a_table_a_plot_and_a_sheet(squares, tmp_path):
    subject = CodecSubject(VisualCodecModel(load_preset("smallest")), "smallest")
    report = evaluate_codec(subject, {"photographs": squares}, folder=tmp_path)
    found = {measure.name: measure for measure in report.measures}
    assert found["bits per pixel"].value == pytest.approx(4 * 6 / SIDE**2)
    assert found["entropy of a code, bits"].value <= 6 == found["entropy of a code, bits"].beside
    assert "at its smallest" in found["JPEG PSNR, dB"].note  # 3 bytes are no file
    written = json.loads((tmp_path / "report.json").read_text())
    assert len(written["measures"]) == len(report.measures)
    assert "FD[thumbnail4" in (tmp_path / "report.md").read_text()
    assert Image.open(tmp_path / "rate_distortion.png").width > 100
    assert Image.open(tmp_path / "copies_photographs.png").size == (8 * SIDE, 2 * SIDE)


def test_a_folder_of_pictures_is_cut_to_squares_and_judged_in_batches(squares, tmp_path):
    (tmp_path / "mine").mkdir()
    for index, square in enumerate(squares[:20]):
        wide = np.pad(square, ((0, 0), (5, 5), (0, 0)))
        Image.fromarray(wide).save(tmp_path / "mine" / f"{index:02}.png")
    (sets,) = picture_sets((str(tmp_path / "mine"),), SIDE, 20).values()
    assert sets.tolist() == squares[:20].tolist()  # more than one batch
    assert len(picture_sets((str(tmp_path / "mine"),), SIDE, 3)["mine"]) == 3
    subject = CodecSubject(VisualCodecModel(load_preset("smallest")), "smallest")
    whole, half = ({m.name: m for m in evaluate_codec(subject, {"mine": p}).measures} for p in (sets, sets[:10]))
    both = compare("mine", [(part, subject.copy(part).pixels) for part in (sets[:10], sets[10:])], Thumbnails())
    assert whole["PSNR, dB"].value == pytest.approx(both[0].value)
    assert whole["PSNR, dB"].value != pytest.approx(half["PSNR, dB"].value)
    assert whole["codes used, share"].trials == 2 * half["codes used, share"].trials
    with pytest.raises(ValueError, match="no pictures nowhere; there are shapes"):
        picture_sets(("nowhere",), SIDE, 2)
    (tmp_path / "shapes").mkdir()
    with pytest.raises(ValueError, match="end in one name twice"):
        picture_sets(("shapes", str(tmp_path / "shapes")), SIDE, 2)


def test_too_few_pictures_for_a_distance_are_said_to_be_too_few(squares):
    measures = compare("few", [(squares[:3], to_pixel_values(squares[:3]))], Thumbnails())
    assert "take more than 97" in measures[-1].note


def test_codecs_that_do_not_copy_pixels_are_refused():
    options = {"decoder": {"kind": "features", "width": 32, "blocks": 1}}
    config = load_preset("smallest").to_dict() | options
    with pytest.raises(ValueError, match="both read and draw"):
        CodecSubject(VisualCodecModel(type(load_preset("smallest")).from_dict(config)), "features")


def test_any_vae_of_diffusers_is_judged(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    arguments = ["--vae", str(tmp_path / "vae"), "--side", "32", "--limit", "2", "--pictures", "shapes"]
    assert main(["evaluate", "codec", *arguments, "--folder", str(tmp_path / "out")]) == 0
    measures = json.loads((tmp_path / "out" / "report.json").read_text())["measures"]
    assert [measure["name"] for measure in measures] == ["PSNR, dB", "SSIM", "FD"]
    assert main(["evaluate", "codec", *arguments, "--device", "meta"]) == 1  # where nothing is computed
    assert main(["evaluate", "codec", *arguments, "--offload"]) == 2
    assert VaeSubject(tmp_path / "vae", SIDE).copy(np.zeros((1, SIDE, SIDE, 3), np.uint8)).bits is None


def test_a_codec_of_continuous_latents_is_judged_without_codes(squares):
    config = load_preset("smallest").to_dict() | {"quantizer": {"kind": "continuous"}}
    subject = CodecSubject(VisualCodecModel(type(load_preset("smallest")).from_dict(config)), "continuous")
    assert subject.spec is None
    copies = subject.copy(squares[:2])
    assert len(copies.pixels) == 2
    assert copies.ids is None


def test_folders_of_copies_are_judged_by_name(tmp_path, squares, capsys):
    for folder, change in (("real", 0), ("copies", 10)):
        (tmp_path / folder).mkdir()
        for index, square in enumerate(squares[:3]):
            Image.fromarray(np.clip(square.astype(int) + change, 0, 255).astype(np.uint8)).save(
                tmp_path / folder / f"{index}.png"
            )
    ((real, copied),) = read_pairs(tmp_path / "real", tmp_path / "copies")
    assert real.tolist() == squares[:3].tolist()
    assert copied.min() >= 10
    both = ["--references", str(tmp_path / "real"), "--copies", str(tmp_path / "copies")]
    assert main(["evaluate", "codec", *both]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert main(["evaluate", "codec", *both[:2]]) == 2
    assert "name both" in capsys.readouterr().err
    (tmp_path / "copies" / "1.png").unlink()
    with pytest.raises(ValueError, match="Only one has: 1"):
        read_pairs(tmp_path / "real", tmp_path / "copies")
    Image.new("RGB", (9, 9)).save(tmp_path / "copies" / "1.png")
    with pytest.raises(ValueError, match="in one size"):
        read_pairs(tmp_path / "real", tmp_path / "copies")


def test_words_are_as_tall_as_they_say_and_their_truth_is_known():
    picture, box = place_word("HHHHH", 16, 128, 3)
    ink = np.asarray(picture).min(axis=2) < 128
    rows = np.flatnonzero(ink.any(axis=1))
    assert abs(len(rows) - 16) <= 1
    outside = ink.copy()
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert not outside.any()
    assert place_word("HHHHH", 60, 64, 0) is None


def test_survival_stands_beside_what_the_reader_reads_in_originals():
    def reader(crop):  # reads what is sharp, and never the word BREAD
        letters = np.asarray(crop.convert("L"))
        return next(words) if letters.min() < 60 else "?"

    from unimm.evaluation.legibility import WORDS

    truth = [word if word != "BREAD" else "?" for word in WORDS for _ in range(2)]
    words = iter(truth)
    (exact,) = text_survival(Blur(128, 1), reader, heights=(16,))
    assert exact.read == exact.ceiling == pytest.approx(11 / 12)
    words = iter(truth[::2])  # a blurred word is not asked for
    (lost,) = text_survival(Blur(128, 128), reader, heights=(16,))
    assert (lost.read, lost.ceiling) == (0.0, pytest.approx(11 / 12))
