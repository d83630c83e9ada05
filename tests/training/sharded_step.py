"""A process of two whose model is spread over both by torch's fully_shard: draws, scores, learns, and saves the whole.

torchrun --nproc-per-node 2 sharded_step.py MODEL BATCH RESULT
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unimm import UniMMForConditionalGeneration

LEARNING_RATE = 0.1


def draw_and_learn(model, batch, mine):
    """Ids drawn of a prompt, and a step over the rows of the batch that are this process's."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE)
    prompt = batch["prompt"]
    options = {"attention_mask": torch.ones_like(prompt), "generation_mode": "image", "do_sample": False}
    model.eval()
    drawn = model.generate(prompt, **options)
    model.train()
    loss = model(batch["input_ids"][mine], labels=batch["input_ids"][mine], use_cache=False).loss
    loss.backward()
    optimizer.step()
    return drawn


def main(folder, batch, result):
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = UniMMForConditionalGeneration.from_pretrained(folder)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    drawn = draw_and_learn(model, load_file(batch), slice(get_rank(), None, 2))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if get_rank() == 0:
        kept = {name: weight.contiguous() for name, weight in weights.items() if "visual" not in name}
        save_file({**kept, "drawn": drawn}, result)
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
