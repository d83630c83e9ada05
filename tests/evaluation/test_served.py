"""vLLM as a way of the bench: what it is given, by a stand-in that runs it with transformers, as it cannot be a
dependency.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from unimm.evaluation.served import served_model
from unimm.evaluation.speed import Bench
from unimm.evaluation.timing import Machine
from unimm.unified import compress


class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, **options):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.most = (max_model_len, max_num_seqs)
        torch.set_num_threads(torch.get_num_threads() + 1)

    def generate(self, asked, sampling, use_tqdm):
        assert (max(len(row["prompt_token_ids"]) for row in asked) + sampling.max_tokens) <= self.most[0]
        assert len(asked) == self.most[1]
        self.given = [torch.tensor([row["prompt_token_ids"]]) for row in asked]
        return sampling


@pytest.fixture
def made(monkeypatch):
    """Those that were made."""
    made = []

    def llm(**options):
        made.append(LLM(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm, SamplingParams=SimpleNamespace))
    monkeypatch.setattr("unimm.evaluation.served.find_spec", lambda name: name)
    return made


def test_it_is_given_the_language_model_and_the_rows_of_guidance(tiny, made):
    model, _ = tiny
    threads = torch.get_num_threads()
    bench = Bench(model, Machine.measure(torch.device("cpu")), rounds=1, batch=2, codes=3)
    last = bench.draw()[-1]
    assert (last.way, torch.get_num_threads()) == ("vLLM, without guidance", threads)
    [llm] = made
    opening = model.picture_opening()
    assert [row[0, -len(opening) :].tolist() for row in llm.given] == [opening] * 4
    assert [row.shape[1] for row in llm.given] == [
        *[8 + len(opening)] * 2,
        *[len(model.config.null_prompt_ids) + len(opening)] * 2,
    ]
    with torch.no_grad():
        assert llm.model(llm.given[0]).logits.equal(model(llm.given[0]).logits)
    sampling = bench._served(served_model(model))(2)
    legal = [token for block in model.config.vocabulary.blocks for token in range(block.start, block.stop)]
    assert (sampling.allowed_token_ids, sampling.max_tokens, sampling.ignore_eos) == (legal, 2, True)


def test_models_that_are_more_than_a_language_model_are_left_out(tiny, made, monkeypatch):
    model, _ = tiny
    assert served_model(model) is not None
    stored = copy.deepcopy(model)
    compress(stored, "int8")
    assert served_model(stored) is None
    monkeypatch.setattr(model.config, "levels", [2])
    assert served_model(model) is None
