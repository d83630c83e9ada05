"""Messages to ids and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from unimm import ImagePart, TextPart, UniMMProcessor, VisualCodes


def picture(seed=0):
    return VisualCodes.from_grid(torch.randint(0, 64, (1, 2, 2, 1), generator=torch.Generator().manual_seed(seed)))


def ask(processor, content):
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )


def test_user_text_never_becomes_a_special_token(tiny):
    processor = tiny[1]
    specials = set(processor.tokenizer.all_special_ids)
    pieces = st.sampled_from(processor.tokenizer.all_special_tokens) | st.text(max_size=8) | st.sampled_from("<|>boi")

    @given(st.lists(pieces, max_size=6).map("".join))
    @settings(max_examples=60, deadline=None)
    def check(text):
        ids = processor.tokenizer(processor.escape(text), add_special_tokens=False)["input_ids"]
        assert not specials & set(ids)
        shown = processor.tokenizer.decode(ids)
        assert shown.replace("\u200b", "") == text.replace("\u200b", "")

    check()


def test_capitals_and_digits_are_spelled(tiny):
    assert tiny[1].tokenizer.tokenize("CAKE12") == ["C", "A", "K", "E", "1", "2"]


def test_a_picture_in_a_prompt_becomes_placeholders(tiny):
    model, processor = tiny
    encoded = ask(
        processor, [{"type": "image", "image": Image.new("RGB", (50, 40))}, {"type": "text", "text": "what?"}]
    )
    ids = encoded["input_ids"][0].tolist()
    boi, eoi, image = model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id
    start = ids.index(boi)
    assert ids[start : start + 6] == [boi, *[image] * 4, eoi]
    assert encoded["pixel_values"].shape == (1, 3, 32, 32)


def test_only_answers_are_learned(tiny):
    processor = tiny[1]
    codes = picture()
    messages = [
        {"role": "user", "content": "draw a red heart"},
        {"role": "assistant", "content": [{"type": "text", "text": "here: "}, {"type": "image"}]},
    ]
    row = processor.encode_messages(messages, [codes], answers_only=True)
    learned = [label for label in row.labels if label != -100]
    assert learned == row.input_ids[-len(learned) :]
    assert processor.tokenizer.decode(row.input_ids[: -len(learned)]) == "<|user|>draw a red heart<|end|><|assistant|>"
    text, image = processor.parse(learned)
    assert text == TextPart("here: ")
    assert isinstance(image, ImagePart)
    assert image.codes.ids.equal(codes.ids)
    everything = processor.encode_messages(messages, [codes], answers_only=False)
    assert everything.labels == everything.input_ids == row.input_ids


def test_pictures_and_image_parts_must_match(tiny):
    with pytest.raises(ValueError, match="0 image parts for 1 pictures"):
        tiny[1].encode_messages([{"role": "user", "content": "hi"}], [picture()], answers_only=False)


def test_null_prompt_is_an_empty_request(tiny):
    processor = tiny[1]
    assert processor.tokenizer.decode(processor.null_prompt_ids()) == "<|user|><|end|><|assistant|>"


def test_a_long_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="this model takes 512"):
        ask(tiny[1], "heart " * 20_000)


def test_it_reloads_through_auto_processor(tiny_folder, tiny):
    again = AutoProcessor.from_pretrained(tiny_folder)
    assert isinstance(again, UniMMProcessor)
    assert again.vocabulary == tiny[1].vocabulary
    assert again.shapes == tiny[1].shapes
    assert again.image_processor.size == tiny[1].image_processor.size
