"""Rows of any source: nothing lost, nothing repeated, and what is unreadable is counted."""

import io
import json
import tarfile

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from unimm.cli.main import main
from unimm.data import sources
from unimm.data.rows import FEATURES, read_report, read_rows, row_pictures
from unimm.data.sources import Source, tokenize_source

CAPTIONS = [f"picture {number}" for number in range(7)]


def picture(number):
    side = np.full((20 + number, 24, 3), 30 * number, dtype=np.uint8)
    return Image.fromarray(side)


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(folder):
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "caption": text}) for i, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for number in range(len(CAPTIONS)):
        (folder / f"{number}.png").write_bytes(png(number))
    return {"path": str(folder), "text": "caption"}


def parquet(folder):
    folder.mkdir()
    columns = {"image": [{"bytes": png(i)} for i in range(len(CAPTIONS))], "words": CAPTIONS}
    Dataset.from_dict(columns).to_parquet(str(folder / "part.parquet"))
    return {"path": str(folder / "part.parquet"), "text": "words"}


def web_dataset(folder):
    folder.mkdir()
    for tar, numbers in (("a.tar", range(4)), ("b.tar", range(4, 7))):
        with tarfile.open(folder / tar, "w") as file:
            for number in numbers:
                for name, content in (
                    ("png", png(number)),
                    ("json", json.dumps({"caption": CAPTIONS[number]}).encode()),
                ):
                    info = tarfile.TarInfo(f"{number}.{name}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return {"path": str(folder), "image": "png", "text": "json.caption"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_ROWS", 3)
    monkeypatch.setattr(sources, "ENCODE_BATCH", 2)
    sources.open_source.cache_clear()


@pytest.fixture(scope="module")
def codec_folder(codec, tmp_path_factory):
    from unimm.codec import VisualCodecImageProcessor

    folder = tmp_path_factory.mktemp("codec")
    for part in (codec, VisualCodecImageProcessor.for_codec(codec.config)):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", [image_folder, parquet, web_dataset])
def test_every_kind_of_source_becomes_the_same_rows(make, streaming, codec, codec_folder, tmp_path):
    source = Source(**make(tmp_path / "source"), streaming=streaming)
    report = tokenize_source(source, codec_folder, tmp_path / "rows")
    assert (report.seen, report.num_skipped) == (7, 0)
    rows = {row["captions"][0]: row for row in read_rows(tmp_path / "rows", codec)}
    assert sorted(rows) == CAPTIONS
    _, image_processor = sources.load_codec(str(codec_folder))
    for number, caption in enumerate(CAPTIONS):
        pixels = image_processor(picture(number), return_tensors="pt")["pixel_values"]
        assert row_pictures(rows[caption])[0].ids.equal(codec.encode(pixels).ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_restart_loses_and_repeats_nothing(streaming, codec, codec_folder, tmp_path, monkeypatch):
    """Killed while any shard is written; another number of processes goes on."""
    source = Source(**web_dataset(tmp_path / "source"), streaming=streaming)
    write, written = sources.write_shard, []

    def killed(rows, path, report):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(rows, path, report)

    monkeypatch.setattr(sources, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize_source(source, codec_folder, tmp_path / "rows")
    monkeypatch.setattr(sources, "write_shard", write)
    with pytest.raises(ValueError, match="goes on with what is missing"):
        read_rows(tmp_path / "rows", codec)
    before = {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(RuntimeError, match="meta"):  # the named device is used, and nothing is computed on this one
        tokenize_source(source, codec_folder, tmp_path / "other", device="meta")
    for rank in range(3):
        tokenize_source(source, codec_folder, tmp_path / "rows", rank=rank, world_size=3)
    assert {path: path.stat().st_mtime_ns for path in written} == before
    assert sorted(row["captions"][0] for row in read_rows(tmp_path / "rows", codec)) == CAPTIONS


def test_broken_pictures_are_counted_and_skipped(codec, codec_folder, tmp_path):
    source = image_folder(tmp_path / "source")
    (tmp_path / "source" / "2.png").write_bytes(png(2)[:40])
    (tmp_path / "source" / "5.png").write_text("no picture")
    report = tokenize_source(Source(**source), codec_folder, tmp_path / "rows")
    assert (report.seen, list(report.skipped.values())) == (7, [2])
    left = [row["captions"][0] for row in read_rows(tmp_path / "rows", codec)]
    assert sorted(left) == [text for place, text in enumerate(CAPTIONS) if place not in (2, 5)]


def test_messages_pass_with_and_without_a_picture(codec, codec_folder, tmp_path):
    ask = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it?"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "a square"}]}
    hello = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    columns = {
        "image": [{"bytes": png(1)}, None, None, {"bytes": png(2)}],
        "messages": [[ask, reply], [hello, reply], [ask, reply], [{"role": "judge", "content": hello["content"]}]],
    }
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "chat.parquet"))
    source = Source(str(tmp_path / "chat.parquet"), messages="messages")
    report = tokenize_source(source, codec_folder, tmp_path / "rows")
    assert report.skipped == {"1 image parts for 0 pictures": 1, "messages of another form than role and content": 1}
    rows = read_rows(tmp_path / "rows", codec).to_list()
    assert [row["messages"] for row in rows] == [[ask, reply], [hello, reply]]
    assert [len(row_pictures(row)) for row in rows] == [1, 0]


def test_messages_need_no_column_of_pictures(codec, codec_folder, tmp_path):
    hello = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a square"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": hello}) + "\n" + json.dumps({"messages": "no"}) + "\n")
    report = tokenize_source(Source(str(tmp_path / "text.jsonl"), messages="messages"), codec_folder, tmp_path / "rows")
    assert report.skipped == {"messages of another form than role and content": 1}
    (row,) = read_rows(tmp_path / "rows", codec).to_list()
    assert [message["content"][0]["text"] for message in row["messages"]] == ["hello", "a square"]
    with pytest.raises(ValueError, match="no column 'picture' for --image"):
        tokenize_source(
            Source(str(tmp_path / "text.jsonl"), image="picture", messages="messages"), codec_folder, tmp_path / "other"
        )


def test_bad_sources_are_refused_with_the_way_out(codec_folder, tmp_path):
    folder = image_folder(tmp_path / "source")
    with pytest.raises(ValueError, match=r"no column 'captions' for --text. Did you mean caption\?"):
        tokenize_source(Source(folder["path"], text="captions"), codec_folder, tmp_path / "rows")
    with pytest.raises(ValueError, match="a row has one"):
        tokenize_source(Source(folder["path"], text="a", messages="b"), codec_folder, tmp_path / "rows")
    tar = web_dataset(tmp_path / "tars")
    with pytest.raises(ValueError, match=r"no column 'json.words' for --text.* It has caption"):
        tokenize_source(Source(**tar | {"text": "json.words"}), codec_folder, tmp_path / "rows")
    Dataset.from_dict({"image": [{"bytes": png(1)}], "number": [3]}).to_parquet(str(tmp_path / "numbers.parquet"))
    with pytest.raises(ValueError, match="which is no picture"):
        tokenize_source(Source(str(tmp_path / "numbers.parquet"), image="number"), codec_folder, tmp_path / "rows")
    Dataset.from_dict({"image": [], "caption": []}, features=None).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match="holds no example"):
        tokenize_source(Source(str(tmp_path / "empty.parquet")), codec_folder, tmp_path / "rows")
    tokenize_source(Source(**folder), codec_folder, tmp_path / "rows")
    with pytest.raises(ValueError, match="rows of another recipe or codec"):
        tokenize_source(Source(folder["path"]), codec_folder, tmp_path / "rows")
    for number in range(7):
        (tmp_path / "source" / f"{number}.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of which became a row"):
        tokenize_source(Source(**folder), codec_folder, tmp_path / "other")


def test_a_row_with_missing_codes_is_refused():
    row = dict.fromkeys(FEATURES) | {"codes": [[1]] * 3, "height": 2, "width": 2}
    with pytest.raises(ValueError, match="3 codes for 2 x 2 cells"):
        row_pictures(row)


@pytest.mark.slow
def test_the_command_shares_the_work_among_processes(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    source = image_folder(tmp_path / "source")
    command = ["tokenize", source["path"], "-o", str(tmp_path / "rows"), "--text", "caption", "--streaming"]
    assert main([*command, "--model", str(tiny_folder), "--num-proc", "2"]) == 0
    assert "7 rows of 7 examples, 0 skipped" in capsys.readouterr().out
    assert sum(read_report(path).seen for path in (tmp_path / "rows").glob("rows-*.parquet")) == 7
