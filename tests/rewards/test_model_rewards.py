"""Rewards that judge by a model, a server or an OCR."""

import base64
import importlib.util
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from unimm import UniMMForConditionalGeneration, UniMMProcessor
from unimm.data.worlds import ShapesWorld
from unimm.rewards import Drawing, aesthetic, load_ocr, load_self_vqascore, remote
from unimm.rewards.ocr import text_marks
from unimm.rewards.self_vqascore import QUESTION
from unimm.scorers.facts import SceneFacts
from unimm.training.prompts import JudgesConfig, choose_rewards


def drawings(number=3):
    shown = [ShapesWorld(seed=2).example(index) for index in range(number)]
    return [Drawing(e.image, e.captions[0], e.facts) for e in shown]


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        ([("cake", 90)], 1.0),
        ([("CAKE", 20)], 0.0),
        ([("CAKE", 90), ("x", 20)], 1.0),
        ([("CAKE", 90), ("CAKE", 90)], (2 / 3 + 1 - 5 / 9) / 2),
        ([("LAKE", 90)], 0.75 / 2),
        ([], 0.0),
    ],
)
def test_text_is_marked_word_by_word_and_letter_by_letter(words, marks):
    assert text_marks(words, "CAKE") == pytest.approx(marks)


@pytest.mark.skipif(importlib.util.find_spec("tesserocr") is not None, reason="tesserocr is here")
def test_ocr_names_what_to_install():
    with pytest.raises(ValueError, match="pip install tesserocr"):
        load_ocr()


@pytest.mark.skipif(importlib.util.find_spec("tesserocr") is None, reason="needs tesserocr")
def test_ocr_reads_a_drawn_word():
    image = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(image).text((40, 20), "CAKE", fill="black", font=ImageFont.load_default(48))
    blank = Image.new("RGB", (256, 96), "white")
    asked = [Drawing(shown, "a word", SceneFacts(word=word)) for shown, word in ((image, "CAKE"), (image, "RIVER"))]
    one, other, nothing = load_ocr()([*asked, Drawing(blank, "a word", SceneFacts(word="CAKE"))])
    assert one == 1.0
    assert 0 < other < 0.3
    assert nothing == 0.0


class Brightness(BaseHTTPRequestHandler):
    """Answers by the mean brightness of each picture, or what `path` says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in body["images"]]
        scores = [picture.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for picture in pictures]
        answer = {"/short": scores[1:], "/wide": [2.0] * len(scores), "/text": body["prompts"]}.get(self.path, scores)
        payload = b"nothing" if self.path == "/broken" else json.dumps({"scores": answer}).encode()
        self.send_response(500 if self.path == "/error" else 200)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    running = HTTPServer(("127.0.0.1", 0), Brightness)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server_judges(server):
    shades = [Drawing(Image.new("RGB", (8, 8), (v, v, v)), "a", SceneFacts()) for v in (0, 51, 255)]
    assert remote(server)(shades) == [0.0, 0.2, 1.0]
    assert remote(server)([Drawing(None, "a", SceneFacts())]) == [0.0]
    mixture = choose_rewards({"remote": 1.0}, None, JudgesConfig(remote=server), "unused")
    assert mixture.total(shades) == [0.0, 0.2, 1.0]


@pytest.mark.parametrize("path", ["short", "wide", "text", "broken", "error"])
def test_answers_of_another_form_are_refused(server, path):
    with pytest.raises(ValueError, match=r"must answer|gave no JSON"):
        remote(f"{server}/{path}")(drawings())


def test_an_address_without_server_is_refused():
    with pytest.raises(ValueError, match="begins with http"):
        remote("localhost:80")
    with HTTPServer(("127.0.0.1", 0), Brightness) as closed:
        port = closed.server_port
    with pytest.raises(ValueError, match="start it"):
        remote(f"http://127.0.0.1:{port}")(drawings())


@pytest.mark.parametrize("labels", [["score"], ["not_aesthetic", "aesthetic"]])
def test_a_classifier_judges(labels):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        id2label=dict(enumerate(labels)),
    )
    model, processor = ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    scores = aesthetic(model, processor)(drawings())
    for score, drawing in zip(scores, drawings(), strict=True):
        with torch.no_grad():
            logits = model(**processor(images=[drawing.image], return_tensors="pt")).logits[0]
        odds = logits[0] if len(labels) == 1 else logits[1] - logits[0]
        assert score == pytest.approx(float(odds.sigmoid()), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_classifier_of_other_things_is_refused():
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.id2label = {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match="labels cat, dog"):
        aesthetic(ViTForImageClassification(config), ViTImageProcessorPil())


def test_a_model_judges_by_its_own_reading(worlds_folder):
    model = UniMMForConditionalGeneration.from_pretrained(worlds_folder).eval()
    processor = UniMMProcessor.from_pretrained(worlds_folder)
    shown = drawings()
    scores = load_self_vqascore(str(worlds_folder))(shown)
    yes, no = (processor.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ("yes", "no"))
    for score, drawing in zip(scores, shown, strict=True):
        text = {"type": "text", "text": QUESTION.format(prompt=drawing.prompt)}
        message = {"role": "user", "content": [{"type": "image", "image": drawing.image}, text]}
        # One at a time and without padding.
        inputs = processor.apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        assert score == pytest.approx(float((logits[yes] - logits[no]).sigmoid()), abs=1e-5)
    assert len(set(scores)) == 3


@pytest.mark.parametrize("name", ["alignment", "aesthetic", "remote"])
def test_a_reward_without_its_judge_is_refused(name):
    with pytest.raises(ValueError, match="without its judge; set"):
        choose_rewards({name: 1.0}, None, JudgesConfig(), "unused")


def test_a_misspelt_reward_is_answered_with_all_there_are():
    with pytest.raises(ValueError, match=r"rewards are .*'scne': 1.0.* some of scene, .*alignment, .*self_vqascore"):
        choose_rewards({"scne": 1.0, "word": 1.0}, None, JudgesConfig(), "unused")
