"""A repository loads without `import unimm`; the tour writes what it promises."""

import subprocess
import sys

import pytest
from PIL import Image

from unimm.demo import tour
from unimm.demo.tour import PROMPTS
from unimm.evaluation import Figure, Report
from unimm.hub import write_repository

LOADS = """
import sys
from transformers import {auto}
loaded = {auto}.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(loaded).__name__)
"""


@pytest.fixture(scope="module")
def repository(tiny_folder, tmp_path_factory):
    return write_repository(tiny_folder, tmp_path_factory.mktemp("hub") / "repository")


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoConfig", "UniMMConfig"),
        ("AutoModelForMultimodalLM", "UniMMForConditionalGeneration"),
        ("AutoProcessor", "UniMMProcessor"),
    ],
)
def test_a_fresh_process_loads_the_repository(repository, auto, name, tmp_path):
    command = [sys.executable, "-c", LOADS.format(auto=auto), str(repository)]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith(name), done.stderr


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
