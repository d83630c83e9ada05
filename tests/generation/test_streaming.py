"""Streamed answers say what whole answers say."""

import pytest
import torch

from unimm import ImagePart, TextPart
from unimm.generation import AnswerStreamer, PictureRows, TextPiece


def stream(tiny, mode, scale):
    model, processor = tiny
    events = []
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "a red heart"}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    torch.manual_seed(1)
    ids = model.generate(
        **prompt,
        generation_mode=mode,
        guidance_scale=scale,
        do_sample=True,
        temperature=2.0,
        max_new_tokens=40,
        streamer=AnswerStreamer(model.config.grammar, processor.tokenizer, events.append),
    )
    return events, processor.parse(ids[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_grows_row_by_row(tiny, scale):
    events, parts = stream(tiny, "image", scale)
    codes = tuple((code,) for code in parts[0].codes.ids.flatten().tolist())
    assert events == [PictureRows(codes[:2], 1, (2, 2)), PictureRows(codes, 2, (2, 2))]


def test_streamed_text_and_pictures_equal_the_parsed_answer(tiny):
    events, parts = stream(tiny, None, 1.0)
    text = "".join(event.text for event in events if isinstance(event, TextPiece))
    assert text == "".join(part.text for part in parts if isinstance(part, TextPart))
    rows = sum(isinstance(event, PictureRows) for event in events)
    assert rows == sum(part.codes.ids.shape[1] // 2 for part in parts if isinstance(part, ImagePart))


def test_batches_are_refused(tiny):
    streamer = AnswerStreamer(tiny[0].config.grammar, tiny[1].tokenizer, print)
    with pytest.raises(ValueError, match="one sample at a time"):
        streamer.put(torch.zeros(2, 3, dtype=torch.int64))
