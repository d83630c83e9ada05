"""Checkpoints of many shards: read lazily, written shard by shard, stopped and gone on with, refused without room."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import FIXTURES

from unimm.conversion import convert, restore
from unimm.conversion.weights import StoredTensor

GOLDEN = Path(__file__).parent.parent / "golden"
WITH_UNUSED_ROWS = (
    "atoken",
    "dualtoken",
    "evotok",
    "omnitokenizer",
)  # of codebooks, or for frames, which converting leaves out
LM = GOLDEN / "xomni_lm"


def shard(weights, folder, *, size, ending="safetensors"):
    """Weights over several files with an index, as `save_pretrained` names them."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    shards, places = [{}], {}
    for key, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > size:
            shards.append({})
        shards[-1][key] = tensor
    for number, part in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))
    return len(shards)


@pytest.fixture
def source(tmp_path):
    """The language model of X-Omni without its weights."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(LM / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one file gives."""
    return load_file(convert("xomni_lm", LM, tmp_path_factory.mktemp("whole") / "out").target / "model.safetensors")


def written(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(tensor.equal(other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_in_shards_out(ending, source, whole, tmp_path):
    assert shard(load_file(LM / "weights.safetensors"), source, size=60_000, ending=ending) > 3
    target = convert("xomni_lm", source, tmp_path / "out", shard_bytes=80_000).target
    assert len(list(target.glob("model-*.safetensors"))) > 2
    assert equal(written(target), whole)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert not list(target.rglob(".*"))
    back = restore("xomni_lm", target, tmp_path / "back")
    assert sorted(path.name for path in back.iterdir() if path.suffix == f".{ending}") == sorted(
        path.name for path in source.iterdir() if path.suffix == f".{ending}"
    )


@pytest.mark.parametrize("system", sorted(FIXTURES))
def test_every_system_goes_back_bit_by_bit(system, golden, tmp_path):
    target = convert(system, golden(system), tmp_path / "out", accept_licence=True).target
    if system in WITH_UNUSED_ROWS:
        with pytest.raises(ValueError, match="Keep upstream's file"):
            restore(system, target, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        return
    back = load_file(restore(system, target, tmp_path / "back") / "weights.safetensors")
    dropped = json.loads((target / "conversion.json").read_text())["dropped"]
    given = load_file(golden(system) / "weights.safetensors")
    assert equal(back, {key: tensor for key, tensor in given.items() if key not in dropped})
    assert (tmp_path / "back" / "config.json").is_file()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(source, tmp_path):
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can run code"):
        convert("xomni_lm", source, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    torch.save({"epoch": 3}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something else than named tensors"):
        convert("xomni_lm", source, tmp_path / "out")


def test_shards_that_are_missing_or_twice_there_are_named(source, tmp_path):
    shard(load_file(LM / "weights.safetensors"), source, size=60_000)
    first = next(source.glob("model-00001*"))
    shutil.copy(source / "model-00002-of-00005.safetensors", tmp_path / "kept")
    shutil.copy(first, source / "model-00002-of-00005.safetensors")
    with pytest.raises(ValueError, match="remove one of them"):
        convert("xomni_lm", source, tmp_path / "out")
    (source / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="get all 5 shards"):
        convert("xomni_lm", source, tmp_path / "out")
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no index of shards"):
        convert("xomni_lm", source, tmp_path / "out")


def test_a_killed_conversion_goes_on_where_it_stopped(source, whole, tmp_path, monkeypatch):
    shard(load_file(LM / "weights.safetensors"), source, size=60_000)
    reads, read = [], StoredTensor.read

    def read_or_die(stored):
        if len(reads) == 40:
            raise KeyboardInterrupt
        reads.append(stored.name)
        return read(stored)

    monkeypatch.setattr(StoredTensor, "read", read_or_die)
    with pytest.raises(KeyboardInterrupt):
        convert("xomni_lm", source, tmp_path / "out", shard_bytes=80_000)
    assert not (tmp_path / "out").exists()
    unfinished = tmp_path / ".out-unfinished"
    done = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("model-*")}
    assert done
    (unfinished / ".model-half.safetensors").write_bytes(b"half")
    reads.clear()
    monkeypatch.setattr(StoredTensor, "read", lambda stored: reads.append(stored.name) or read(stored))
    target = convert("xomni_lm", source, tmp_path / "out", shard_bytes=80_000).target
    assert len(reads) < len(whole)
    assert {name: (target / name).stat().st_mtime_ns for name in done} == done
    assert equal(written(target), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_another_source_does_not_go_on_with_what_is_there(source, tmp_path, monkeypatch):
    shard(load_file(LM / "weights.safetensors"), source, size=60_000)
    unfinished = tmp_path / ".out-unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"another model's")
    (unfinished / ".key").write_text("another key")
    target = convert("xomni_lm", source, tmp_path / "out").target
    assert load_file(target / "model.safetensors")


def test_a_full_disk_leaves_nothing(source, tmp_path):
    shard(load_file(LM / "weights.safetensors"), source, size=60_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ValueError, match="is full"):
            convert("xomni_lm", source, tmp_path / "out", shard_bytes=80_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def peak(work):
    """Bytes by which the resident memory rises while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")

    def kibibytes(field):
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith(field)).split()[1])

    before = kibibytes("VmRSS")
    work()
    return 1024 * (kibibytes("VmHWM") - before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_stays_below_one_and_a_half_shards(source, tmp_path):
    args = {
        "vocab_size": 8000,
        "image_vocab_size": 2000,
        "mm_vocab_size": 2064,
        "num_mm_adap_layers": 1,
        "num_mm_head_layers": 1,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    (source / "config.json").write_text(json.dumps(args))
    shapes = {f"{name}.weight": (8000, 512) for name in ("model.lm_embed_tokens", "lm_head")}
    shapes |= {f"{name}.weight": (2064, 512) for name in ("model.mm_embed_tokens", "mm_head")}
    shapes |= {f"model.{name}_norm.weight": (512,) for name in ("lm", "mm")}
    for layer in range(8):
        sides = {"q": 512, "k": 128, "v": 128}
        shapes |= {f"model.layers.{layer}.self_attn.{n}_proj.weight": (side, 512) for n, side in sides.items()}
        shapes |= {f"model.layers.{layer}.self_attn.{n}_proj.bias": (side,) for n, side in sides.items()}
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (512, 512)
        shapes |= {f"model.layers.{layer}.mlp.{n}_proj.weight": (2048, 512) for n in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (512, 2048)
        shapes |= {f"model.layers.{layer}.{n}_layernorm.weight": (512,) for n in ("input", "post_attention")}
    assert shard({key: torch.ones(shape) for key, shape in shapes.items()}, source, size=48_000_000) >= 3
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert peak(lambda: convert("xomni_lm", source, tmp_path / "out")) < 1.5 * largest
