"""GRPO: scores are those of the sampling, runs resume exactly, and what is off-policy or has collapsed stops."""

import dataclasses
import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import random_llm

from unimm import UniMMForConditionalGeneration, UniMMProcessor, VisualCodecModel
from unimm.codec.presets import load_preset
from unimm.config import from_dict, read_yaml
from unimm.data.worlds import HELD_OUT_PAIRS, is_held_out_word
from unimm.rewards import REWARDS, Reward, RewardMixture
from unimm.scorers.facts import SceneFacts
from unimm.training import grpo
from unimm.training.grpo import (
    DrawingGRPOTrainer,
    GrpoRecipe,
    GuardCallback,
    GuardConfig,
    check_recipe,
    group_diversity,
    grpo_arguments,
    without_idle_rows,
)
from unimm.training.policy import SamplingPolicy
from unimm.training.prompts import PromptsConfig, make_prompts
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory

PROMPTS = ["a star", "draw a picture of three green circles", ""]
pytestmark = pytest.mark.usefixtures("brightness")
SAMPLING = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "nucleus": {"top_p": 0.7},
    "guided": {"guidance_scale": 2.5},
    "all": {"temperature": 0.8, "top_p": 0.8, "guidance_scale": 1.7, "guidance_interval": (0.25, 0.75)},
}


@pytest.fixture(scope="module", params=["smallest", "smallest_product"])
def pair(request, tokenizer):
    """A random model and its processor, of one code and of two codes per position."""
    codec = VisualCodecModel(load_preset(request.param)).eval()
    return UniMMForConditionalGeneration.from_backbones(random_llm(tokenizer), codec, tokenizer)


def draw(model, processor, **sampling):
    """Sampled sequences, their mask, and the distribution that each id was drawn from, `[B, C, V]`."""
    prompt = processor.apply_chat_template(
        [[{"role": "user", "content": text}] for text in PROMPTS],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    torch.manual_seed(1)
    output = model.generate(
        **prompt,
        generation_mode="image",
        do_sample=True,
        top_k=0,
        max_new_tokens=processor.grammar.longest,
        return_dict_in_generate=True,
        output_scores=True,
        **sampling,
    )
    drawn = output.sequences.shape[1] - prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], torch.ones(len(PROMPTS), drawn, dtype=torch.long)], dim=1)
    return output.sequences, mask, torch.stack(output.scores, dim=1).log_softmax(dim=-1)


@pytest.mark.parametrize("name", SAMPLING)
def test_scores_are_those_of_the_distribution_that_was_sampled_from(pair, name):
    model, processor = pair
    ids, mask, normal = draw(model, processor, **SAMPLING[name])
    count = normal.shape[1]
    policy = SamplingPolicy(model.config.grammar, tuple(model.config.null_prompt_ids), **SAMPLING[name])
    scores = policy.score(model, ids, mask, count)
    sampled = normal.gather(2, ids[:, -count:, None]).squeeze(2)
    assert torch.allclose(scores.log_probs, sampled, atol=1e-4)
    assert torch.allclose(scores.entropies, torch.special.entr(normal.exp()).sum(dim=-1), atol=1e-3)
    assert float(sampled.exp().min()) < 0.9  # there was something to choose
    others = [other for other in SAMPLING if other != name]
    for other in others:
        policy = SamplingPolicy(model.config.grammar, tuple(model.config.null_prompt_ids), **SAMPLING[other])
        assert not torch.allclose(policy.score(model, ids, mask, count).log_probs, sampled, atol=1e-3)


def test_scores_renormalise_the_full_softmax_over_legal_ids(pair):
    model, processor = pair
    ids, mask, normal = draw(model, processor)
    count = normal.shape[1]
    scores = SamplingPolicy(model.config.grammar, ()).score(model, ids, mask, count)
    for row in range(len(ids)):
        kept = ids[row][mask[row].bool()][None]
        full = model(kept).logits[0].detach().log_softmax(dim=-1)
        for step in range(count):
            place = kept.shape[1] - count + step
            legal = model.config.grammar.allowed(kept[:, :place])[0]
            within = full[place - 1][legal].logsumexp(dim=0)
            expected = full[place - 1, kept[0, place]] - within
            assert scores.log_probs[row, step].item() == pytest.approx(float(expected), abs=1e-4)
            if step < count - 1:
                assert float(within) < -0.01  # the full softmax has mass elsewhere


def test_logits_are_made_of_the_ids_of_pictures_only(pair):
    model, processor = pair
    ids, mask, normal = draw(model, processor)
    shapes = []
    handle = model.register_forward_hook(lambda module, inputs, output: shapes.append(output.logits.shape))
    SamplingPolicy(model.config.grammar, tuple(model.config.null_prompt_ids), guidance_scale=2.0).score(
        model, ids, mask, normal.shape[1]
    )
    handle.remove()
    assert len(shapes) == 2
    vocabulary = model.config.vocabulary
    assert {shape[2] for shape in shapes} == {sum(b.stop - b.start for b in vocabulary.blocks) + 1}  # and the end
    assert shapes[0][2] < vocabulary.image_token_offset
    rows = torch.tensor([1, 5, 9])
    with torch.no_grad():
        assert torch.allclose(model(ids, rows_to_keep=rows).logits, model(ids).logits[..., rows], atol=1e-5)


def test_padding_after_a_picture_scores_nothing_and_gradients_flow(pair):
    model, processor = pair
    ids, mask, normal = draw(model, processor)
    count = normal.shape[1]
    padded = torch.cat([ids, torch.full_like(ids[:, :2], model.config.pad_token_id)], dim=1)
    longer = torch.cat([mask, torch.zeros_like(mask[:, :2])], dim=1)
    policy = SamplingPolicy(model.config.grammar, ())
    scores = policy.score(model, padded, longer, count + 2)
    assert scores.log_probs[:, -2:].eq(0).all()
    assert torch.allclose(scores.log_probs[:, :-2], policy.score(model, ids, mask, count).log_probs, atol=1e-5)
    scores.log_probs.sum().backward()
    assert float(model.lm_head.weight.grad.abs().sum()) > 0
    model.zero_grad()


def test_diversity_is_the_share_of_codes_in_which_drawings_differ():
    same, half, all_differ = [[1, 2]] * 3, [[1, 2], [1, 3], [1, 4]], [[1, 2], [3, 4], [5, 6]]
    for group, expected in ((same, 0.0), (half, 0.5), (all_differ, 1.0)):
        assert group_diversity(torch.tensor(group), 3) == pytest.approx(expected)
    assert group_diversity(torch.tensor([*same, *all_differ]), 3) == pytest.approx(0.5)


def test_prompts_are_repeatable_and_never_held_out():
    shares = {"single": 1.0, "count": 1.0, "position": 1.0, "binding": 1.0, "word": 1.0}
    prompts = make_prompts(PromptsConfig(shares, seed=3), 300)
    assert prompts.to_list()[:50] == make_prompts(PromptsConfig(shares, seed=3), 50).to_list()
    facts = [SceneFacts.from_json(text) for text in prompts["facts"]]
    assert not any((thing.name, thing.colour) in HELD_OUT_PAIRS for f in facts for thing in f.objects)
    assert not any(is_held_out_word(f.word) for f in facts if f.word)
    assert 30 < sum(f.word is not None for f in facts) < 90
    assert len({row["prompt"][0]["content"] for row in prompts}) > 200
    with pytest.raises(ValueError, match="some of single, count"):
        make_prompts(PromptsConfig({"cats": 1.0}), 1)


ASKED = [
    {"prompt": 'the word "CAKE" in red', "text": "pie", "none": None},
    {"prompt": "\u201cnew\u201d above \u201cYORK\u201d", "text": "7", "none": " "},
    {"prompt": "a red heart", "text": None, "none": None},
]


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return str(path)


@pytest.mark.parametrize(("column", "words"), [(None, ["CAKE", "new YORK", None]), ("text", ["pie", "7", None])])
def test_what_a_data_set_wants_written_is_known_to_judges(prompts_file, column, words):
    prompts = make_prompts(PromptsConfig(source=prompts_file, text_column=column), 7)
    found = {(row["prompt"][0]["content"], SceneFacts.from_json(row["facts"]).word) for row in prompts}
    assert found == set(zip([row["prompt"] for row in ASKED], words, strict=True))


@pytest.mark.parametrize(
    "reward",
    ["word", pytest.param("ocr", marks=pytest.mark.skipif(find_spec("tesserocr") is None, reason="needs tesserocr"))],
)
def test_words_of_a_data_set_are_rewarded(worlds_folder, tmp_path, prompts_file, reward):
    changes = {
        "prompts": {"source": prompts_file, "text_column": "text"},
        "rewards": {reward: 1.0, "brightness": 1.0},
        "rollout": {"prompts": 3, "group_size": 2, "micro_batch": 6},
        "optimizer": {"steps": 1, "warmup": 0},
        "logging": {"every": 1, "sample_every": 9, "save_every": 1},
    }
    record = train(grpo_recipe(tmp_path, worlds_folder, "written", **changes)).metrics()[0]
    assert 0 <= record[f"rewards/{reward}/mean"] < record["rewards/brightness/mean"]


def test_rewards_that_judge_no_prompt_are_refused(worlds_folder, tmp_path, prompts_file):
    changes = {"prompts": {"source": prompts_file}, "rewards": {"scene": 1.0}}
    with pytest.raises(ValueError, match="none of them judges one of the 8 prompts"):
        train(grpo_recipe(tmp_path, worlds_folder, "unjudged", **changes))


def grpo_recipe(folder, model, name, **changes):
    recipe = {
        "task": "grpo",
        "run": {"name": name, "directory": str(folder)},
        "init_from": str(model),
        "prompts": {"categories": {"single": 0.5, "word": 0.5}},
        "rewards": {"scene": 1.0, "word": 1.0, "brightness": 1.0},
        "rollout": {"prompts": 2, "group_size": 4, "micro_batch": 4},
        "guards": {"diversity": 0.0, "entropy": 0.0},
        "optimizer": {"steps": 4, "lr": 1e-2, "warmup": 1},
        "logging": {"every": 1, "sample_every": 2, "save_every": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def curve(directory):
    names = ("loss", "reward", "entropy", "kl", "diversity")
    return [[record.get(name) for name in names] for record in directory.metrics() if "entropy" in record]


def test_a_run_trains_resumes_exactly_and_shows_what_it_did(worlds_folder, tmp_path):
    path = grpo_recipe(tmp_path, worlds_folder, "first")
    first = train(path)
    names = {item.name for item in first.root.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "plots", "samples", "model", "finished.json"} <= names
    assert {item.name for item in first.samples.iterdir()} == {"step-00000002.png", "step-00000004.png"}
    before = curve(first)
    records = [record for record in first.metrics() if "entropy" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["ratio_deviation"] < 1e-3
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert records[-1]["kl"] > 1e-6
    assert 0 < records[-1]["rollout_time"] < records[-1]["step_time"]
    assert {"rewards/scene/mean", "rewards/brightness/mean", "group_reward_std"} <= set(records[-1])
    old, new = (UniMMForConditionalGeneration.from_pretrained(source) for source in (worlds_folder, first.model))
    assert not old.lm_head.weight.equal(new.lm_head.weight)
    assert old.generation_config.temperature == new.generation_config.temperature
    (first.root / "finished.json").unlink()
    shutil.rmtree(first.checkpoints / "checkpoint-4")
    assert curve(train(path)) == before


def test_a_model_that_draws_by_levels_is_scored_by_them(worlds_folder, tmp_path):
    shutil.copytree(worlds_folder, tmp_path / "levels")
    config = json.loads((tmp_path / "levels" / "config.json").read_text())
    (tmp_path / "levels" / "config.json").write_text(json.dumps(config | {"levels": [1, 3, 12]}))
    directory = train(grpo_recipe(tmp_path, tmp_path / "levels", "run", optimizer={"steps": 2, "lr": 1e-2}))
    records = [record for record in directory.metrics() if "entropy" in record]
    assert records[0]["ratio_deviation"] < 1e-3
    assert UniMMForConditionalGeneration.from_pretrained(directory.model).config.levels == [1, 3, 12]
    with pytest.raises(ValueError, match="stock scoring knows nothing of"):
        train(grpo_recipe(tmp_path, tmp_path / "levels", "stock", objective={"score_under_grammar": False}))


def test_stock_scoring_can_be_compared(worlds_folder, tmp_path):
    directory = train(grpo_recipe(tmp_path, worlds_folder, "stock", objective={"score_under_grammar": False}))
    assert directory.metrics()[0]["ratio_deviation"] > 0.01


@pytest.mark.parametrize(
    ("sampling", "objective"),
    [
        ({"guidance_scale": 2.0, "temperature": 0.9}, {"kl": 0.1, "updates": 2}),
        ({"top_p": 0.8}, {"kl": 0.0}),
    ],
)
def test_guided_cut_and_repeated_rollouts_train(worlds_folder, tmp_path, sampling, objective):
    directory = train(
        grpo_recipe(
            tmp_path, worlds_folder, "run", sampling=sampling, objective=objective, optimizer={"steps": 2, "warmup": 0}
        )
    )
    assert directory.metrics()[0]["ratio_deviation"] < 1e-3
    assert len(curve(directory)) == 2


def test_drawings_that_teach_nothing_are_left_out_and_change_nothing(worlds_folder, tmp_path, monkeypatch):
    def half(images, drawings):  # all equal in the first of two groups
        return [0.5] * 4 + [float(np.asarray(image).mean() / 255) for image in images[4:]]

    monkeypatch.setitem(REWARDS, "half", Reward("half", 0.0, 1.0, lambda facts: True, half))
    options = {"objective": {"kl": 0.0}, "rewards": {"half": 1.0}, "optimizer": {"steps": 1, "lr": 1e-2, "warmup": 0}}
    left_out = train(grpo_recipe(tmp_path, worlds_folder, "some", **options))
    monkeypatch.setattr(grpo, "without_idle_rows", lambda inputs: (inputs, 1.0))
    whole = train(grpo_recipe(tmp_path, worlds_folder, "all", **options))
    one, other, before = (
        UniMMForConditionalGeneration.from_pretrained(source).state_dict()
        for source in (left_out.model, whole.model, worlds_folder)
    )
    assert any(not one[name].equal(before[name]) for name in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)


def test_only_rows_with_an_advantage_are_kept_and_at_least_one():
    rows = {"advantages": torch.tensor([0.0, 2.0, 0.0, -1.0]), "ids": torch.arange(8).view(4, 2), "steps": 3}
    kept, share = without_idle_rows(rows)
    assert kept["ids"].tolist() == [[2, 3], [6, 7]]
    assert (share, kept["steps"]) == (0.5, 3)
    idle, share = without_idle_rows(rows | {"advantages": torch.zeros(4)})
    assert (idle["advantages"].tolist(), share) == ([0.0], 0.25)


def test_a_run_that_scores_another_distribution_is_stopped_at_its_first_step(worlds_folder, tmp_path):
    recipe = from_dict(GrpoRecipe, read_yaml(grpo_recipe(tmp_path, worlds_folder, "off")))
    model = UniMMForConditionalGeneration.from_pretrained(worlds_folder)
    directory, rewards = RunDirectory(recipe.run), RewardMixture.choose(recipe.rewards, REWARDS)
    trainer = DrawingGRPOTrainer(
        model=model,
        processor=UniMMProcessor.from_pretrained(worlds_folder),
        recipe=recipe,
        arguments=grpo_arguments(recipe, directory, rewards, 20),
        prompts=make_prompts(recipe.prompts, 8),
        rewards=rewards,
        callbacks=[],
    )
    trainer.policy = dataclasses.replace(trainer.policy, temperature=1.2)
    with pytest.raises(ValueError, match="another distribution"):
        trainer.train()


def test_a_collapsed_run_stops(worlds_folder, tmp_path, capsys):
    guards = {"diversity": 0.0, "entropy": 100.0, "patience": 2}
    directory = train(grpo_recipe(tmp_path, worlds_folder, "collapsed", guards=guards))
    assert len(curve(directory)) == 2
    assert "entropy stayed below guards.entropy" in capsys.readouterr().out
    assert directory.finished
    assert (directory.model / "model.safetensors").is_file()


def test_a_guard_forgives_one_good_line_and_remembers_over_a_restart(tmp_path):
    directory = RunDirectory(RunConfig("run", str(tmp_path)))
    directory.root.mkdir()
    config = GuardConfig(diversity=0.5, entropy=0.0, patience=3)
    guard, control = GuardCallback(directory, config), SimpleNamespace(should_training_stop=False)
    guard.on_train_begin(None, None, control)
    for step, diversity in enumerate((0.1, 0.1, 0.9, 0.1, 0.1)):
        record = {"step": step, "diversity": diversity, "entropy": 1.0, "group_reward_std": 1.0}
        directory.log(record)
        guard.on_log(None, None, control, logs=record)
    guard.on_log(None, None, control, logs={"train_runtime": 1.0})
    assert guard.tripped is None
    for again in (guard, GuardCallback(directory, config)):
        if again is not guard:
            again.on_train_begin(None, None, control)
        again.on_log(None, None, control, logs=record)
        assert again.tripped == "diversity"
    assert control.should_training_stop


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"prompts": 2, "group_size": 1, "micro_batch": 2}}, "groups need 2"),
        ({"rollout": {"prompts": 2, "group_size": 4, "micro_batch": 3}}, "must divide 2 x 4 = 8"),
        ({"objective": {"updates": 3}}, "save_every must be a multiple"),
        ({"sampling": {"top_p": 0.9}}, "set top_p: 1, or objective.kl: 0"),
        ({"rewards": {"beauty": 1.0}}, "some of scene"),
        ({"prompts": {"categories": {}}}, "some of single"),
        ({"reward": {"scene": 1.0}}, "Did you mean rewards"),
    ],
)
def test_bad_recipes_are_refused(worlds_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(grpo_recipe(tmp_path, worlds_folder, "bad", **changes))


def test_the_shipped_recipe_parses(request):
    recipe = from_dict(GrpoRecipe, read_yaml(request.config.rootpath / "recipes" / "tiny" / "grpo.yaml"))
    check_recipe(recipe)
    RewardMixture.choose(recipe.rewards, REWARDS)
