"""What the published systems weigh, on the meta device."""

import pytest

from unimm.cli.main import main
from unimm.conversion.published import weights_of


def test_xomni_has_the_published_parameters():
    weights = {weight.part: weight.numbers for weight in weights_of("xomni")}
    assert round(weights["language model"] / 1e9, 1) == 9.6
    tower, quantizer, convolutions = 1.13e9, 39.8e6, 84.9e6
    table = 128 * 128 * 1536
    assert weights["codec"] == pytest.approx(tower + table + quantizer + convolutions, rel=0.01)
    assert round(weights["detokenizer: transformer"] / 1e9, 1) == 11.9
    assert weights["detokenizer: condition"] == 3072 * 1536


def test_unknown_systems_are_named(capsys):
    assert main(["inspect", "system", "xomny"]) == 2
    assert "there are xomni, seed_llama_8b" in capsys.readouterr().err
