"""A repository loads without `import unimm`; the tour writes what it promises."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from remote_code import check_loads_without_unimm

from unimm.cli.main import main
from unimm.demo import tour
from unimm.demo.tour import PROMPTS
from unimm.evaluation import Figure, Report
from unimm.hub import write_repository, write_run_repository


@pytest.fixture(scope="module")
def repository(tiny_folder, tmp_path_factory):
    return write_repository(tiny_folder, tmp_path_factory.mktemp("hub") / "repository")


def test_a_fresh_process_loads_the_repository(repository, tmp_path):
    check_loads_without_unimm(repository, tmp_path)


def test_a_repository_does_not_tell_where_it_was_made(repository, tiny_folder):
    assert "_name_or_path" in (tiny_folder / "config.json").read_text()
    for path in repository.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished run directory, as training leaves it."""
    root = tmp_path_factory.mktemp("runs") / "tiny-run"
    shutil.copytree(tiny_folder, root / "model")
    recipe = {
        "task": "sft",
        "init_from": "runs/earlier/model",
        "data": {"sources": {"rows/captions": 0.7, "rows/chat": 0.3}, "worlds": {}},
        "optimizer": {"steps": 12},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "environment.json").write_text(json.dumps({"python": "3.11", "revision": "abc", "torch": "2.13"}))
    (root / "finished.json").write_text(json.dumps({"step": 12, "loss": 0.125, "image_loss": 0.25}))
    for name in ("plots/metrics.png", "samples/step-00000006.png", "samples/step-00000012.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (int(name[-6:-4]) if "step" in name else 4, 4)).save(root / name)
    return root


def test_a_run_is_laid_out_with_a_card_of_its_own(run, tmp_path):
    folder = write_run_repository(run, tmp_path / "out", repository="someone/my-model", licence="mit")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    for words in (
        "# my-model",
        "`sft`",
        "runs/earlier/model",
        "rows of `rows/captions`, weight 0.7",
        "| loss | 0.125 |",
    ):
        assert words in card
    assert "12 steps" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["optimizer"] == {"steps": 12}
    assert all((folder / name).is_file() for name in re.findall(r"\]\((\w+\.png)\)", card))
    assert Image.open(folder / "samples.png").width == 12


def test_a_run_is_laid_out_by_a_command(run, tmp_path, capsys):
    assert main(["push", str(run), "someone/my-model", "--folder", str(tmp_path / "out")]) == 0
    assert "# my-model" in (tmp_path / "out" / "README.md").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")


def test_what_cannot_be_pushed_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="owner/name"):
        write_run_repository(run, tmp_path / "out", repository="my-model")
    with pytest.raises(ValueError, match="no finished run"):
        write_run_repository(run / "model", tmp_path / "out", repository="someone/my-model")


@pytest.mark.slow
def test_a_pushed_repository_loads_by_its_name(run, tmp_path):
    """Laid out as the Hub's own cache, and read without network and without the repository's folder."""
    cache = tmp_path / "home" / "hub" / "models--someone--my-model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    write_run_repository(run, cache / "snapshots" / ("0" * 40), repository="someone/my-model")
    script = "import unimm; print(type(unimm.load('someone/my-model').model).__name__)"
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "UniMMForConditionalGeneration", done.stderr


def test_the_tour_writes_its_pictures(unimm_tiny, tmp_path, capsys):
    tour(unimm_tiny, tmp_path)
    assert Image.open(tmp_path / "contact_sheet.png").width > 4 * 64
    assert len(list(tmp_path.glob("*.png"))) >= len(PROMPTS) + 2
    printed = capsys.readouterr().out
    assert "described" in printed
    assert str(tmp_path) in printed


def test_a_report_states_its_intervals_and_its_command(tmp_path):
    figures = (Figure("drawing", "count", 0.5, 200, 0.8, 0.99), Figure("codec", "PSNR", 31.0, 400, 30.0, unit="dB"))
    report = Report("unimm evaluate tiny", figures)
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| drawing | count | 0.500 | 0.431 to 0.569 | 0.800 | 0.990 | 200 |" in text
    assert "31.0 dB" in text
    assert "`unimm evaluate tiny`" in text
