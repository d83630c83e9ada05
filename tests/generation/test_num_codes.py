"""Pictures of fewer codes, by codecs whose first codes alone stand for the picture."""

import pytest
import torch
from conftest import random_llm

from unimm import ImagePart, UniMMForConditionalGeneration, VisualCodecModel
from unimm.codec import VisualCodecConfig
from unimm.pipelines import UniMM

SEQUENCE = {"tokens": 6, "rows": 2, "columns": 2}


def front(tokenizer, *, prefixes):
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=16,
        encoder={"kind": "patches", "patch": 8, "width": 16},
        resampler={"kind": "registers", "dim": 3, **SEQUENCE, "depth": 1, "num_heads": 2, "mlp_width": 24},
        quantizer={"kind": "fsq", "levels": [4, 4, 3], "project": False},
        length={"kind": "sequence", **SEQUENCE, "prefixes": prefixes},
        decoder={"kind": "mask_vit", "dim": 3, **SEQUENCE, "patch": 8, "width": 16, "depth": 1, "num_heads": 2},
    )
    codec = VisualCodecModel(config).eval()
    return UniMM(*UniMMForConditionalGeneration.from_backbones(random_llm(tokenizer), codec, tokenizer))


@pytest.fixture(scope="module")
def nested(tokenizer):
    return front(tokenizer, prefixes=True)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "guidance_interval": (0.0, 0.5)}, {"stock": True}])
def test_a_picture_ends_after_so_many_codes(nested, options):
    whole = nested.generate("a star", temperature=0, num_codes=6, **options)[0].parts[0]
    assert whole.codes.ids.shape == (1, 6, 1)
    pictures = []
    for number in (1, 3):
        (reply,) = nested.generate("a star", temperature=0, num_codes=number, **options)
        assert reply.parts[0].codes.ids.shape == (1, number, 1)
        if "guidance_interval" not in options:  # which is a share of the shorter picture then
            assert reply.parts[0].codes.ids.equal(whole.codes.ids[:, :number])
        pictures.append(reply.images[0])
    assert pictures[0].size == whole.image.size == (16, 16)
    assert pictures[0].tobytes() != pictures[1].tobytes() != whole.image.tobytes()


def test_the_first_codes_are_those_of_the_whole_picture(nested):
    ids = nested.processor.drawing_inputs(["a star", "two green circles"])
    options = {"generation_mode": "image", "do_sample": True, "top_k": 0, "guidance_scale": 2.0, "jacobi_window": 3}
    drawn = []
    for number in (6, 4):
        torch.manual_seed(5)
        drawn.append(nested.model.generate(**ids, **options, num_codes=number)[:, ids["input_ids"].shape[1] :])
    eoi = nested.model.config.eoi_token_id
    assert drawn[0][:, 1:5].equal(drawn[1][:, 1:5])
    assert (drawn[0][:, -1] == eoi).all()
    assert (drawn[1][:, -1] == eoi).all()
    assert drawn[1].shape[1] == 6


def test_a_model_of_a_sequence_codec_reads_and_is_trained_on_its_pictures(nested):
    model, processor = nested.model, nested.processor
    image = torch.rand(3, 16, 16)
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}
    inputs = processor.chat_inputs([[message]])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 6
    codes = model.codec.encode(inputs["pixel_values"])
    row = processor.encode_messages([message], [codes], answers_only=False)
    asked = model.placed(inputs["input_ids"], inputs["pixel_values"])[0].tolist()
    assert asked[: len(row.input_ids)] == row.input_ids  # what opens the answer follows
    (part,) = (part for part in processor.parse(row.input_ids) if isinstance(part, ImagePart))
    assert part.complete
    assert part.codes.ids.equal(codes.ids)


def test_lengths_that_the_codec_cannot_decode_are_refused(nested, tokenizer, unimm_tiny):
    for number in (0, 7):
        with pytest.raises(ValueError, match="pictures have 1 to 6"):
            nested.generate("a star", num_codes=number)
    whole = front(tokenizer, prefixes=False)
    with pytest.raises(ValueError, match="pictures have 6"):
        whole.generate("a star", num_codes=3)
    assert whole.generate("a star", temperature=0, num_codes=6)[0].images
    with pytest.raises(ValueError, match="positions"):
        unimm_tiny.generate("a star", num_codes=3)
    assert unimm_tiny.generate("a star", temperature=0, num_codes=4)[0].images
