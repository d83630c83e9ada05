"""The model's contract: loading, precision, pixels, loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3Config,
)

from unimm import ImagePart, UniMMForConditionalGeneration, VisualCodecModel
from unimm.codec import load_preset
from unimm.unified import UniMMConfig, factored_cross_entropy


def ids_of(model, batch=2, length=9):
    return torch.randint(8, model.config.image_token_offset, (batch, length))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText])
def test_every_auto_class_loads_the_same_weights(auto, tiny, tiny_folder):
    model = auto.from_pretrained(tiny_folder)
    ids = ids_of(model)
    assert isinstance(model, UniMMForConditionalGeneration)
    assert model(ids).logits.equal(tiny[0](ids).logits)
    assert AutoModel.from_pretrained(tiny_folder).config.model_type == "unimm"


def test_a_bf16_load_keeps_the_codec_exact(tiny, tiny_folder):
    model = AutoModelForMultimodalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.visual.parameters()} == {torch.float32}
    assert model.codec.encode(pixels).ids.equal(tiny[0].codec.encode(pixels).ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_codec_exact(tiny, dtype):
    model = copy.deepcopy(tiny[0]).to(dtype)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert model.lm_head.weight.dtype == dtype
    assert {weight.dtype for weight in model.visual.parameters()} == {torch.float32}
    assert model.codec.fingerprint() == tiny[0].codec.fingerprint()
    assert model.codec.encode(pixels).ids.equal(tiny[0].codec.encode(pixels).ids)


def test_the_codec_stays_frozen_and_in_eval_mode(tiny):
    model = tiny[0]
    model.train()
    assert not model.visual.training
    assert not any(weight.requires_grad for weight in model.visual.parameters())
    model.eval()


def test_a_loaded_codec_is_frozen_too(tiny_folder):
    model = UniMMForConditionalGeneration.from_pretrained(tiny_folder)
    assert not any(weight.requires_grad for weight in model.visual.parameters())
    assert model.lm_head.weight.requires_grad


def test_placeholders_become_the_codes_of_the_pictures(tiny):
    model = tiny[0]
    config, pixels = model.config, torch.rand(2, 3, 32, 32) * 2 - 1
    span = [config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id]
    ids = torch.tensor([[9, *span, 10], [11, *span, 12]])
    codes = model.codec.encode(pixels).ids[..., 0] + config.image_token_offset
    explicit = ids.clone()
    explicit[:, 2:6] = codes
    assert model(ids, pixel_values=pixels).logits.equal(model(explicit).logits)
    with pytest.raises(ValueError, match="one image part per picture"):
        model(ids, pixel_values=pixels[:1])


def test_the_loss_is_cross_entropy_within_each_block(tiny):
    model = tiny[0]
    vocabulary = model.config.vocabulary
    codes = torch.randint(vocabulary.image_token_offset, vocabulary.image_token_end, (2, 4))
    ids = torch.cat([ids_of(model, 2, 5), codes], dim=1)
    labels = ids.clone()
    labels[:, :2] = -100
    output = model(ids, labels=labels)
    logits = model(ids).logits[:, :-1]
    text = F.cross_entropy(logits[:, 1:4, : vocabulary.image_token_offset].flatten(0, 1), ids[:, 2:5].flatten())
    block = logits[:, 4:, vocabulary.image_token_offset : vocabulary.image_token_end]
    image = F.cross_entropy(block.flatten(0, 1), (codes - vocabulary.image_token_offset).flatten())
    torch.testing.assert_close(output.text_loss, text)
    torch.testing.assert_close(output.image_loss, image)
    torch.testing.assert_close(output.loss, (6 * text + 8 * image) / 14)


def test_parts_of_a_batch_sum_to_the_whole(tiny):
    model = tiny[0]
    hidden, labels = torch.randn(4, 7, 32), ids_of(model, 4, 7)
    weight, vocabulary = model.lm_head.weight, model.config.vocabulary
    whole = factored_cross_entropy(hidden, weight, labels, vocabulary).loss
    targets = torch.tensor(4 * 6)
    halves = [
        factored_cross_entropy(hidden[part], weight, labels[part], vocabulary, num_targets=targets).loss
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a multiple of 128"):
        UniMMConfig(text_config={"model_type": "qwen3", "vocab_size": 300}, image_token_offset=256, codebook_sizes=[64])


def test_decode_image_tokens_needs_a_whole_picture(tiny):
    with pytest.raises(ValueError, match="no whole picture"):
        tiny[0].decode_image_tokens(torch.tensor([9, 10]))


def test_code_rows_begin_with_the_geometry_of_the_codes(tiny):
    model = tiny[0]
    vocabulary = model.config.vocabulary
    (vectors,) = model.codec.code_vectors()
    near = torch.cdist(vectors, vectors) < torch.cdist(vectors, vectors).quantile(0.1)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        rows = F.normalize(weight[vocabulary.image_token_offset : vocabulary.image_token_end].float(), dim=1)
        alike = rows @ rows.T
        others = ~torch.eye(64, dtype=torch.bool)
        assert alike[near & others].mean() > alike[~near].mean() + 0.1
        text_norm = weight[: vocabulary.image_token_offset].norm(dim=1).mean()
        torch.testing.assert_close(
            weight[vocabulary.image_token_offset : vocabulary.image_token_end].norm(dim=1).mean(), text_norm
        )


def test_two_codes_per_position_are_read_drawn_and_learned(tokenizer):
    torch.manual_seed(0)
    codec = VisualCodecModel(load_preset("smallest_product")).eval()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    model, processor = UniMMForConditionalGeneration.from_backbones(
        AutoModelForCausalLM.from_config(config), codec, tokenizer
    )
    assert model.config.vocabulary.codebook_sizes == (16, 8)
    picture = Image.new("RGB", (32, 32), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what color is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    pixels = inputs["pixel_values"]
    placed = model.model.place_pictures(inputs["input_ids"], pixels)
    (read,) = (part for part in processor.parse(placed[0]) if isinstance(part, ImagePart))
    assert read.codes.ids.equal(codec.encode(pixels).ids)

    output = model(placed, labels=placed)
    logits = model(placed).logits[0, :-1]
    targets = placed[0, 1:]
    losses = []
    for block in model.config.vocabulary.blocks:
        inside = (targets >= block.start) & (targets < block.stop)
        assert int(inside.sum()) == 4
        losses.append(F.cross_entropy(logits[inside][:, block], targets[inside] - block.start))
    torch.testing.assert_close(output.image_loss, sum(losses) / 2)

    drawn = model.generate(**inputs, generation_mode="image", do_sample=True, max_new_tokens=20)
    (part,) = (part for part in processor.parse(drawn[0, inputs["input_ids"].shape[1] :]))
    assert part.complete
    torch.testing.assert_close(
        model.decode_image_tokens(drawn[0, inputs["input_ids"].shape[1] :]), codec.decode(part.codes)
    )
