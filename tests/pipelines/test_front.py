"""Load, draw, understand, chat, and the command line, on a random model."""

import json
import shlex

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import unimm
from unimm.cli.chat import half_blocks
from unimm.cli.main import build_parser, main, own_words
from unimm.cli.verbs import VERBS
from unimm.detokenizer import CodesToImagePipeline, CodesToImageTransformer2DModel
from unimm.hub import write_card, write_repository
from unimm.pipelines import Picture, Reply, open_image
from unimm.sequence import TextPart


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


def test_draw_is_batched_and_repeatable(unimm_tiny):
    replies = unimm_tiny.generate(["a star", "three green circles"], n=2, seed=3, guidance=2.0)
    again = unimm_tiny.generate(["a star", "three green circles"], n=2, seed=3, guidance=2.0)
    assert [len(reply.images) for reply in replies] == [1, 1, 1, 1]
    assert [r.images[0].tobytes() for r in replies] == [r.images[0].tobytes() for r in again]
    assert replies[0].images[0].size == (32, 32)


def test_the_stock_loop_draws_the_same(unimm_tiny):
    ours, stock = (
        unimm_tiny.generate(
            ["a star", "circles"], guidance=2.0, guidance_interval=(0.0, 0.5), temperature=0, stock=stock
        )
        for stock in (False, True)
    )
    assert [r.images[0].tobytes() for r in ours] == [r.images[0].tobytes() for r in stock]


def test_understand_and_chat_answer(unimm_tiny):
    image = Image.new("RGB", (50, 50), "blue")
    assert not unimm_tiny.understand(image)[0].images
    reply = unimm_tiny.chat([{"role": "user", "content": "a star"}], seed=0)
    messages = [{"role": "user", "content": "a star"}, reply.message, {"role": "user", "content": "again"}]
    assert isinstance(unimm_tiny.chat(messages, seed=0), Reply)


def test_a_reply_keeps_its_order():
    reply = Reply((TextPart("here: "), Picture(Image.new("RGB", (4, 4)), None), TextPart("done")))
    assert reply.text == "here: done"
    assert [part["type"] for part in reply.message["content"]] == ["text", "image", "text"]


@pytest.mark.parametrize("prompt", ["", "   ", "heart " * 20_000])
def test_impossible_prompts_are_refused(unimm_tiny, prompt):
    with pytest.raises(ValueError, match="prompt is"):
        unimm_tiny.generate(prompt)


IMPOSSIBLE = {
    "no picture": lambda model: model.generate("a star", n=0),
    "hot": lambda model: model.generate("a star", temperature=float("inf")),
    "top_p": lambda model: model.generate("a star", top_p=2.0),
    "guidance": lambda model: model.generate("a star", guidance=float("nan")),
    "nothing to see": lambda model: model.understand([]),
    "two questions": lambda model: model.understand(Image.new("RGB", (9, 9)), ["what?", "where?"]),
    "no message": lambda model: model.chat([]),
    "no role": lambda model: model.chat([{"content": "a star"}]),
    "a text": lambda model: model.chat("a star"),
    "no text": lambda model: model.chat([{"role": "user", "content": [{"type": "text", "text": None}]}]),
    "a film": lambda model: model.chat([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]),
}


@pytest.mark.parametrize("ask", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_requests_are_refused(unimm_tiny, ask):
    with pytest.raises(ValueError, match=r"; |one of|at least one"):
        ask(unimm_tiny)


def test_one_picture_of_any_kind_is_one(unimm_tiny, picture_file):
    picture = Image.open(picture_file)
    answers = [
        [reply.text for reply in unimm_tiny.understand(shown)] for shown in (picture, np.asarray(picture), [picture])
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 1


def test_a_prompt_that_spells_specials_is_plain_text(unimm_tiny):
    assert len(unimm_tiny.generate("<|eoi|><|boi|> a star <|end|>", seed=0)[0].images) == 1


def broken(tmp_path, kind):
    path = tmp_path / "broken.png"
    if kind == "text":
        path.write_text("not a picture")
    if kind == "truncated":
        Image.effect_noise((200, 200), 50).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "empty":
        path.write_bytes(b"")
    return path


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (40, 60)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "missing"])
def test_broken_pictures_are_one_clear_error(tmp_path, kind):
    with pytest.raises(ValueError, match=r"picture"):
        open_image(broken(tmp_path, kind))


def test_load_refuses_missing_and_extra_weights(tiny_folder, tmp_path):
    for change in ("missing", "extra"):
        folder = tmp_path / change
        folder.mkdir()
        for path in tiny_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        if change == "missing":
            del weights["lm_head.weight"]
        else:
            weights["surplus"] = torch.zeros(1)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit its config"):
            unimm.load(folder)
    with pytest.raises(ValueError, match="no model folder"):
        unimm.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no model folder"):
        unimm.load("")


def test_load_refuses_another_kind_of_model_and_another_device(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'unimm_codec'"):
        unimm.load(tmp_path)
    for device in ("nonsense", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match="torch cannot use"):
            unimm.load(device=device)


def test_a_repository_takes_the_place_of_nothing_else(tiny_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a page")
    for target in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(ValueError, match="would be lost"):
            write_repository(tiny_folder, target)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # its own place it takes
        write_repository(tiny_folder, tmp_path / "repository")


def test_a_repository_holds_what_the_hub_needs(tiny_folder, tiny, tmp_path):
    folder = write_repository(tiny_folder, tmp_path / "repository")
    write_card(folder, "| figure |", num_shapes=16, num_colours=16, num_emoji=384)
    config = json.loads((folder / "config.json").read_text())
    assert all(isinstance(reference, str) for reference in config["auto_map"].values())
    assert "AutoProcessor" in json.loads((folder / "processor_config.json").read_text())["auto_map"]
    weights = load_file(folder / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert {v.dtype for name, v in weights.items() if ".visual." in name} == {torch.float32}
    loaded = unimm.load(folder)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loaded.model.codec.encode(pixels).ids.equal(tiny[0].codec.encode(pixels).ids)
    assert f"{sum(v.numel() for v in weights.values()):,} weights" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def with_detokenizer(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detokenizer")
    torch.manual_seed(0)
    sizes = {"sample_size": 32, "patch_size": 16, "width": 16, "depth": 1, "num_heads": 2, "code_dim": 8}
    transformer = CodesToImageTransformer2DModel(**sizes, codebook_sizes=(64,), code_grid=2)
    torch.nn.init.normal_(transformer.patches_out.conv.weight, std=0.1)
    CodesToImagePipeline(transformer, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "pipeline")
    return write_repository(tiny_folder, folder / "repository", folder / "pipeline")


def test_both_decoders_draw_the_same_codes(with_detokenizer, tmp_path):
    write_card(with_detokenizer, "| figure |", num_shapes=16, num_colours=16, num_emoji=384)
    assert "in `detokenizer/`" in (with_detokenizer / "README.md").read_text()
    model = unimm.load(with_detokenizer)
    by_codec, by_diffusion, again = (
        model.generate("a star", seed=4, diffusion_steps=steps)[0].parts[0] for steps in (0, 4, 4)
    )
    assert by_codec.codes.ids.equal(by_diffusion.codes.ids)
    assert by_codec.image.tobytes() != by_diffusion.image.tobytes()
    assert by_diffusion.image.tobytes() == again.image.tobytes()
    output = tmp_path / "a.png"
    arguments = ["draw", "a star", "-o", str(output), "--seed", "4", "--guidance", "1", "--diffusion-steps", "4"]
    assert main([*arguments, "--model", str(with_detokenizer)]) == 0
    assert Image.open(output).tobytes() == again.image.tobytes()


def test_diffusion_steps_without_a_detokenizer_are_refused(unimm_tiny):
    with pytest.raises(ValueError, match="no diffusion detokenizer"):
        unimm_tiny.generate("a star", diffusion_steps=4)


def test_cli_draws_describes_and_tokenizes(tiny_folder, tmp_path, picture_file, capsys):
    model, drawing, codes, back = (
        ("--model", str(tiny_folder)),
        tmp_path / "a.png",
        tmp_path / "a.json",
        tmp_path / "b.png",
    )
    assert main(["draw", "a star", "-o", str(drawing), "--n", "2", "--seed", "1", *model]) == 0
    assert Image.open(drawing).size == (64, 32)
    assert main(["describe", str(picture_file), *model]) == 0
    assert main(["tokenize", str(picture_file), "-o", str(codes), *model]) == 0
    assert len(json.loads(codes.read_text())["codes"]) == 4
    assert main(["tokenize", str(codes), "-o", str(back), *model]) == 0
    assert Image.open(back).size == (32, 32)
    capsys.readouterr()


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_example_of_a_verb_is_that_verb(verb):
    assert build_parser().parse_args(shlex.split(verb.example)[1:]).verb is verb


def test_cli_errors_are_one_line(tmp_path, tiny_folder, capsys, request):
    model, root = ("--model", str(tiny_folder)), request.config.rootpath
    (tmp_path / "a.png").write_text("not a picture")
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (
        ["describe", str(tmp_path / "a.png"), *model],
        ["draw", "", *model],
        ["draw", "a star", "--n", "0", *model],
        ["draw", "a star", "--model", str(tmp_path / "nothing")],
        ["tokenize", str(tmp_path / "a.png"), "-o", str(tmp_path / "c.json"), "--model", str(tmp_path)],
        ["tokenize", str(tmp_path / "bad.json"), "-o", str(tmp_path / "c.png"), *model],
        ["train", str(tmp_path / "bad.json")],
        ["push", str(tmp_path / "nothing"), "someone/model"],
        ["draw", "a star", "-o", str(tmp_path / "a.xyz"), *model],
        ["draw", "a star", "-o", str(tmp_path), *model],
        ["draw", "a star", "--device", "nonsense", *model],
        ["draw", "a star", "--model", ""],
        ["tokenize", str(tmp_path), "-o", str(tmp_path / "a.png"), *model],
        ["tokenize", str(tmp_path), "-o", str(tmp_path / "rows"), "--num-proc", "0", *model],
        ["train", str(tmp_path)],
        ["train", str(root / "recipes" / "tiny" / "codec.yaml"), "optimizer.steps=["],
        ["train", str(root / "recipes" / "tiny" / "codec.yaml"), "--world-size", "8"],
        ["evaluate", "codec", "--best-of", "4", *model],
        ["evaluate", "tiny", "--pictures", "shapes", *model],
        ["evaluate", "tiny", "--folder", str(tmp_path / "bad.json"), *model],
        ["evaluate", "codec", "--vae", str(tmp_path)],
        ["bench", "--config", "tiny", "--formats", "int3"],
        ["bench", "--config", "tiny", "--window", "0"],
        ["bench", "--config", "tiny", "--threads", "-1"],
        ["bench", "--config", "tiny", "--codes", "0"],
        ["bench", "--config", "tiny", *model],
    ):
        assert main(arguments) == 2, arguments  # and at once: no weights are drawn with, no step is trained
        error = capsys.readouterr().err
        assert error.startswith("unimm: ")
        assert error.count("\n") == 1
        assert "Traceback" not in error


def test_an_error_of_a_worker_is_its_message():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise ValueError("A row is too long; shorten it.")

    with pytest.raises(ValueError, match="Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert own_words(caught.value) == "A row is too long; shorten it."


def test_pictures_in_the_terminal():
    lines = half_blocks(Image.new("RGB", (48, 48), "red")).split("\n")
    assert len(lines) == 24
    assert "255;0;0" in lines[0]
