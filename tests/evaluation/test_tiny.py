"""The tiny benchmark draws as it is told, and chooses among drawings by reward."""

import pytest
from PIL import Image

import unimm
from unimm.cli.main import main
from unimm.evaluation.tiny import DRAWING, choose, evaluate_tiny, held_out, measure_drawing
from unimm.pipelines import Picture, Reply

TASKS = {task.name: task for task in DRAWING}


@pytest.fixture(scope="module")
def model(worlds_folder):
    """Random, of pictures as large as the worlds'."""
    return unimm.load(worlds_folder)


def reply(image):
    return Reply((Picture(image, None),))


@pytest.mark.parametrize("name", ["single", "count", "position", "word"])
def test_of_several_drawings_the_one_as_asked_is_chosen(name):
    task = TASKS[name]
    asked, other, third = held_out(task.world, task.category, 3)
    drawn = [other.image, Image.new("RGB", (128, 128), "white"), asked.image, third.image]
    assert choose([reply(image) for image in drawn], asked) is asked.image
    assert choose([reply(other.image)], asked) is other.image
    blank = [Image.new("RGB", (128, 128), "white") for _ in range(2)]
    assert choose([reply(image) for image in blank], asked) is blank[0]


def test_drawings_are_as_many_and_as_cold_as_asked(model):
    def pictures(**options):
        figure, drawn = measure_drawing(model, TASKS["position"], 3, **options)
        assert figure.trials == len(drawn) == 3
        assert [caption for _, caption, _ in drawn] == [e.captions[0] for e in held_out("shapes", "position", 3)]
        return [image.tobytes() for image, _, _ in drawn]

    own, again, cold = pictures(), pictures(temperature=1.0), pictures(temperature=0.0)
    assert own == again != cold
    greedy = model.generate([e.captions[0] for e in held_out("shapes", "position", 3)], temperature=0)
    assert cold == [reply.images[0].tobytes() for reply in greedy]
    assert pictures(best_of=4) != own


def test_how_was_drawn_is_in_the_report(model, worlds_folder, tmp_path, capsys):
    arguments = ["evaluate", "tiny", "--limit", "1", "--temperature", "0.7", "--best-of", "2"]
    assert main([*arguments, "--model", str(worlds_folder), "--folder", str(tmp_path)]) == 0
    command = "`unimm evaluate tiny --limit 1 --temperature 0.7 --best-of 2`"
    assert command in capsys.readouterr().out
    assert command in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="best_of is 0"):
        evaluate_tiny(model, command="x", limit=1, best_of=0)
