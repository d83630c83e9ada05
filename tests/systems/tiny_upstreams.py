"""Published systems at tiny size, with random weights, in the files that upstream publishes."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

import unimm
from unimm.cli.main import main
from unimm.nn.stored import NF4_BLOCK
from unimm.pipelines import Picture
from unimm.training.adapter import AdapterConfig, lora_config, merge_adapter
from unimm.training.recipe import train

GOLDEN = Path(__file__).parent.parent / "golden"
RECIPES = Path(__file__).parents[2] / "recipes" / "qwen3-0.6b"
CAPTIONS = ["a red heart above a blue star", "describe the picture", "You are a helpful assistant."] * 3


def text_tokenizer(*, rows, chat=(), after=(), max_length=512):
    """A byte-level BPE tokenizer that spells numbers by digits.

    Args:
        rows: text rows of the model; unused ones have a token too, so that what is added later stands after them.
        chat: tokens of the chat.
        after: tokens after the text rows, in order.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d|\s|[^\d\s]+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens([*chat])
    tokenizer.add_tokens([f"<spare-{place}>" for place in range(rows - tokenizer.get_vocab_size())])
    assert tokenizer.get_vocab_size() == rows
    tokenizer.add_tokens([*after])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length)


def language_model(config):
    """Weights of a random text model whose logits are far from uniform, under its own keys."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def llama_sizes(rows, width):
    """A tiny LLaMA's configuration."""
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }


def golden_weights(system, prefix=""):
    """A fixture's weights whose keys begin with a prefix, without it."""
    weights = load_file(GOLDEN / system / "weights.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def golden_io(system):
    return load_file(GOLDEN / system / "io.safetensors")


def write_shards(weights, folder):
    """Weights in two shards with an index."""
    keys = list(weights)
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    names = [f"model-{place:05d}-of-00002.safetensors" for place in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file({key: weights[key].contiguous() for key in half}, folder / name)
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def tiny_vae(*, stages=2, channels=4, **options):
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * stages,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=4,
        **options,
    )


def tiny_clip(tokenizer, width):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=width,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def prompt_tokenizer():
    """For the text encoders of a diffusion model."""
    tokenizer = text_tokenizer(rows=300, chat=["<end>"], max_length=77)
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    return tokenizer


def a_picture():
    return Image.effect_noise((90, 70), 60).convert("RGB")


def check_everyday_use(model, *, size, options=None):
    """Describe, draw and chat, as a user would."""
    picture = a_picture()
    assert isinstance(model, unimm.pipelines.UniMM)
    model.model.generation_config.max_new_tokens = 24
    (description,) = model.understand(picture, "what is it?")
    assert not description.images
    first, again, other = (
        model.generate("a red heart", seed=seed, diffusion_steps=2, **(options or {}))[0] for seed in (1, 1, 2)
    )
    for reply in (first, again, other):
        assert [image.size for image in reply.images] == [size]
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert first.images[0].tobytes() != other.images[0].tobytes()
    (drawn,) = first.parts
    assert isinstance(drawn, Picture)
    (same,) = model.decode([drawn.codes], diffusion_steps=2, seed=1, prompts=["a red heart"])
    assert same.image.tobytes() == drawn.image.tobytes()
    (elsewhere,) = model.decode([drawn.codes], diffusion_steps=2, seed=7)  # noise of its own for every call
    assert elsewhere.image.tobytes() != drawn.image.tobytes()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]}
    ]
    reply = model.chat(messages, seed=0)
    messages += [reply.message, {"role": "user", "content": "and now?"}]
    assert model.chat(messages, seed=0).parts is not None


def check_saves(folder, tmp_path):
    """By every name that the Hub knows, and once more after saving: the same numbers in the same precision."""
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "UniMMProcessor"
    model.save_pretrained(tmp_path / "saved")
    found, wanted = AutoModelForMultimodalLM.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(tensor) and found[key].dtype == tensor.dtype for key, tensor in wanted.items())


def check_stored(folder, *, size, options=None):
    """Stored in eight and in four bits, idle parts waiting on the CPU: the same codes, near logits, pictures."""
    exact, ids = unimm.load(folder), torch.arange(5, 15)[None]
    pixels = exact.processor.image_processor(a_picture(), return_tensors="pt")["pixel_values"]
    for weights, tolerance in (("int8", 0.05), ("nf4", 0.8)):
        stored = unimm.load(folder, weights=weights, offload=True)
        stored.model.generation_config.max_new_tokens = 24
        kinds = {type(module).__name__ for module in stored.model.model.language_model.modules()}
        assert kinds & {"Int8Linear", "Linear4bit"}
        assert stored.model.codec.encode(pixels).ids.equal(exact.model.codec.encode(pixels).ids)
        with torch.no_grad():
            near, wanted = stored.model(ids).logits.float(), exact.model(ids).logits.float()
        assert not near.equal(wanted)
        assert float((near - wanted).norm() / wanted.norm()) < tolerance
        (drawn,) = stored.generate("a red heart", seed=1, diffusion_steps=2, **(options or {}))
        assert [image.size for image in drawn.images] == [size]
        assert stored.understand(drawn.images, "what is it?")
        denoiser = getattr(stored.detokenizer.pipeline, "transformer", None) or stored.detokenizer.pipeline.unet
        left = [module for module in denoiser.modules() if type(module) is nn.Linear]
        assert all(weights == "nf4" and module.in_features % NF4_BLOCK for module in left)


def check_lora(folder, codes, *, answers_only=True):
    """Two steps of an adapter: the loss falls, code rows move, text rows stay bit by bit."""
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForMultimodalLM, AutoProcessor))
    model.float()
    messages = [
        {"role": "user", "content": "draw a star"},
        {"role": "assistant", "content": [{"type": "text", "text": "here: "}, {"type": "image"}]},
    ]
    row = processor.encode_messages(messages, [codes], answers_only=answers_only)
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    before = model.get_input_embeddings().weight.detach().clone()
    config = AdapterConfig(rank=2, alpha=4.0)
    adapted = get_peft_model(model, lora_config(model, config))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    after, vocabulary = merge_adapter(adapted, config, folder).get_input_embeddings().weight, model.config.vocabulary
    assert after[: vocabulary.image_token_offset].equal(before[: vocabulary.image_token_offset])
    moved = (after != before).any(dim=1)
    assert moved[vocabulary.to_token_ids(codes.ids).flatten()].all()


def check_recipes(folder, tmp_path, *, answers_only="true"):
    """The recipes of adapters and of reinforcement learning run two steps, their sheets drawn by the system itself."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    a_picture().save(pictures / "heart.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "heart.png", "text": "a red heart"}')
    assert (
        main(["tokenize", str(pictures), "-o", str(tmp_path / "rows"), "--model", str(folder), "--text", "text"]) == 0
    )
    shared = [
        f"run.directory={tmp_path}",
        f"init_from={folder}",
        "optimizer={steps: 2, lr: 1.0e-2, warmup: 0}",
        "logging={every: 1, sample_every: 2, save_every: 2}",
        "bf16=false",
        "sampling={temperature: 1.0, top_p: 1.0, guidance_scale: 1.0}",
    ]
    adapter = "adapter={rank: 2, alpha: 4.0, frozen: float32}"
    rows = f"data.sources={{{tmp_path / 'rows'}: 1.0}}"
    small = ["pack_length=null", "batch_size=2", "micro_batch=1", "attention=null", "gradient_checkpointing=false"]
    tasks = ["tasks={draw: 1.0, read: 0.0, show: 0.0}", f"answers_only={answers_only}"]
    rollout = [
        "rollout={prompts: 1, group_size: 2, micro_batch: 2}",
        "rewards={brightness: 1.0}",
        "alignment_model=null",
    ]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a heart"}\n{"prompt": "a red one"}\n')
    asked = f"prompts.source={tmp_path / 'prompts.jsonl'}"
    before = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, options in (("sft_lora", [adapter, rows, *small, *tasks]), ("grpo", [*rollout, asked])):
        directory = train(RECIPES / f"{name}.yaml", [*shared, *options])
        assert len([record for record in directory.metrics() if "loss" in record]) == 2
        assert (directory.samples / "step-00000002.png").exists()
        model = AutoModelForMultimodalLM.from_pretrained(directory.model, dtype=torch.float32)
        changed = {key for key, weight in model.state_dict().items() if not weight.equal(before[key])}
        assert changed
        assert not any(key.startswith("model.visual.") for key in changed)
        if name == "sft_lora":
            text = slice(0, model.config.vocabulary.image_token_offset)
            assert model.lm_head.weight[text].equal(before["lm_head.weight"][text])
