"""How fast a model draws, reads, learns and turns pictures into codes and back, beside what the machine allows.

In: a model. Out: a table of times, each beside the stock way and the floors of bandwidth and arithmetic measured in the
same run.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from unimm.evaluation.scaling import Scaling, measure_scaling
from unimm.evaluation.served import served_model, vllm_drawing
from unimm.evaluation.timing import Machine, Speed, Way, compare
from unimm.files import atomic_write
from unimm.generation import GrammarLogitsProcessor, UniMMGenerateOutput
from unimm.unified import UniMMForConditionalGeneration, compress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = ("draw", "read", "train", "tokenize", "detokenize")
PROMPT, ANSWER = 8, 16  # ids
# What a saved model is asked for; the first is timed.
REQUESTS = ("a red circle", "two green stars", "a blue square above a yellow heart", 'the word "CAKE" in red')
GUIDANCE, TOP_K = 3.0, 1_000
BEGUN = 2  # codes: the first comes from the prompt, and a step is prepared for the second
PICTURES = 4  # per batch of the codec and of a training step
BYTES = {"bfloat16": 2, "int8": 1}
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": TOP_K}


@dataclass(frozen=True)
class SpeedReport:
    """All times of one run, the shares of likeliest codes that formats of weights keep, and how many codes one pass
    settles where that is more than one.
    """

    command: str
    model: str
    clock: str
    threads: int
    gigabytes_per_second: float
    gigaflops: float
    speeds: tuple[Speed, ...]
    scaling: Scaling | None
    agreement: dict[str, float]
    codes_per_pass: float | None

    def to_markdown(self) -> str:
        """A table with what it was measured on."""
        header = [
            "| task | way | ms per unit | range | speed-up | floor, ms | times the floor |",
            "|---|---|---|---|---|---|---|",
        ]
        lines = header if self.speeds else []
        for speed in self.speeds:
            floor = "" if speed.floor is None else f"{speed.floor:.3f}"
            above = "" if speed.floor is None else f"{speed.milliseconds / speed.floor:.2f}"
            lines.append(
                f"| {speed.task} | {speed.way} | {speed.milliseconds:.3f} per {speed.unit} | {speed.lowest:.3f} to "
                f"{speed.highest:.3f} | {speed.speedup:.2f} | {floor} | {above} |"
            )
        if self.scaling is not None:
            lines += [*([""] if lines else []), self.scaling.to_markdown()]
        machine = (
            f"{self.model}; {self.clock}, threads: {self.threads}; reads {self.gigabytes_per_second:.1f} GB/s, "
            f"multiplies {self.gigaflops:.0f} GFLOP/s in this run."
        )
        beside = [f"Likeliest codes that {name} keeps: {share:.3f}." for name, share in self.agreement.items()]
        if self.codes_per_pass is not None:
            beside.append(f"Codes that one pass settles: {self.codes_per_pass:.2f}.")
        return "\n".join([*lines, "", machine, *beside, f"Measured by `{self.command}`."])

    def save(self, folder: Path) -> None:
        """Write `speed.md` and `speed.json`, and `speed.png` and `scaling.png` of what was measured."""
        with atomic_write(folder / "speed.md") as path:
            path.write_text(self.to_markdown() + "\n", encoding="utf-8")
        with atomic_write(folder / "speed.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        def write(figure: Figure, name: str) -> None:
            figure.tight_layout()
            with atomic_write(folder / name) as path:
                figure.savefig(path, dpi=90)
            pyplot.close(figure)

        if self.speeds:
            names = [f"{speed.task}: {speed.way}" for speed in self.speeds]
            figure, axis = pyplot.subplots(figsize=(8, 1 + 0.4 * len(names)))
            axis.barh(names, [speed.speedup for speed in self.speeds], color="#4477aa")
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.set_xlabel("speed-up over the first way of the task")
            write(figure, "speed.png")
        if self.scaling is not None:
            figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
            self.scaling.plot(*axes)
            write(figure, "scaling.png")


class Bench:
    """The tasks of one model.

    Args:
        model: with or without codec; tasks that need one are then refused.
        machine: that it runs on.
        rounds: of every way.
        batch: pictures drawn or read at once.
        codes: ids per picture that are drawn, more than `BEGUN`, from which the time of the whole is told; None draws
            it whole, as do models that draw by levels, whose passes differ.
        formats: of weights that are drawn with besides those of the model.
        window: of Jacobi iteration that is drawn with besides; 1 leaves it out.
        requests: ids `[1, T]` of prompts that the model knows, the first of which is timed; None for any ids.

    Raises:
        ValueError: too few codes.
    """

    def __init__(
        self,
        model: UniMMForConditionalGeneration,
        machine: Machine,
        *,
        rounds: int = 3,
        batch: int = 1,
        codes: int | None = None,
        formats: Sequence[str] = (),
        window: int = 1,
        requests: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.window = window
        self.compressed = {name: copy.deepcopy(model) for name in formats}
        for name, compressed in self.compressed.items():
            compress(compressed, name)
        self.model, self.machine, self.rounds, self.batch = model, machine, rounds, batch
        self.config = model.config
        self.by_levels = self.config.drawing_levels is not None
        vocabulary = self.config.vocabulary
        self.device = model.device
        shape = max(self.config.grammar.shapes, key=lambda shape: shape.max_positions)
        self.picture = shape.max_positions * vocabulary.num_codebooks
        if codes is not None and codes <= BEGUN:
            raise ValueError(f"codes is {codes}; draw more than {BEGUN}, after which codes are timed.")
        self.codes = self.picture if codes is None or self.by_levels else min(codes, self.picture)
        invented = torch.arange(PROMPT)[None] * 7 % (vocabulary.image_token_offset - 16) + 16
        self.knows = requests is not None
        self.requests = [ids.to(self.device) for ids in requests or [invented]]
        self.prompt = self.requests[0].expand(batch, -1)

    @torch.no_grad()
    def agreement(self) -> dict[str, float]:
        """Share of codes that are likeliest under guidance for each format too, after the same codes before them.

        Nothing of a model that draws by levels, whose codes are not asked for by those before them.
        """
        if not self.compressed or self.by_levels:
            return {}
        drawn = self._draw(self.model, self.codes).sequences
        null = drawn.new_tensor(self.config.null_prompt_ids or []).expand(self.batch, -1)
        away = torch.cat([null, drawn[:, self.prompt.shape[1] :]], dim=1)

        def likeliest(model: UniMMForConditionalGeneration) -> torch.Tensor:
            logits, other = (model(ids, logits_to_keep=self.codes + 1).logits.float() for ids in (drawn, away))
            guided = other + GUIDANCE * (logits - other)
            legal = self.config.grammar.table.to(drawn.device)[self.config.grammar.states(drawn)[:, -self.codes - 1 :]]
            return guided.masked_fill(~legal, -float("inf")).argmax(dim=-1)[:, :-1]

        exact = likeliest(self.model)
        return {name: float((likeliest(m) == exact).float().mean()) for name, m in self.compressed.items()}

    def codes_per_pass(self) -> float | None:
        """Codes of whole pictures for every pass, by the window or by levels, as the model draws by itself.

        None where every pass draws one, and where the engine does not cover the model.
        """
        if self.window == 1 and not self.by_levels:
            return None
        options = {"do_sample": True, "guidance_scale": None} if self.knows else SAMPLED
        outputs = [
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_mode="image",
                jacobi_window=self.window,
                return_dict_in_generate=True,
                **options,
            )
            for ids in self.requests
        ]
        if not all(isinstance(output, UniMMGenerateOutput) for output in outputs):
            return None
        codes = sum(int(self.config.vocabulary.is_visual(output.sequences).sum()) for output in outputs)
        return codes / sum(output.passes for output in outputs)

    def run(self, tasks: Sequence[str]) -> list[Speed]:
        """The given tasks, in order."""
        known: dict[str, Callable[[], list[Speed]]] = {
            "draw": self.draw,
            "read": self.read,
            "train": self.train,
            "tokenize": self.tokenize,
            "detokenize": self.detokenize,
        }
        return [speed for task in tasks for speed in known[task]()]

    def draw(self) -> list[Speed]:
        """Pictures under guidance: two passes by the stock processor, one doubled pass, and the engine.

        Where vLLM is installed, it draws as many rows as guidance has. A model that draws by levels has the engine
        alone, and no floor, as a pass draws several codes.
        """
        size = self.model.lm_head.weight.element_size()
        floor = None if self.by_levels else self._floor(self.batch, self.picture, size, size)
        ways = [self._way("engine", functools.partial(self._draw, self.model), floor)]
        if not self.by_levels:
            ways = [
                self._way("stock, two passes", self._draw_by_stock_guidance),
                self._way("stock, batched guidance", functools.partial(self._draw, self.model, stock=True)),
                *ways,
            ]
        if self.window > 1:
            ahead = functools.partial(self._draw, self.model, window=self.window)
            ways.append(self._way(f"engine, window {self.window}", ahead))
        for name, model in self.compressed.items():
            floor = None if self.by_levels else self._floor(self.batch, self.picture, BYTES[name], BYTES["bfloat16"])
            ways.append(self._way(f"engine, {name}", functools.partial(self._draw, model), floor))
        if (plain := served_model(self.model)) is not None:
            ways.append(self._way("vLLM, without guidance", self._served(plain)))
        return compare("draw", f"code of {self.batch}", ways, self.machine.clock, self.rounds)

    def _way(self, name: str, draw: Callable[[int], object], floor: float | None = None) -> Way:
        """A way to draw, per step of the batch."""
        run, begin = functools.partial(draw, self.codes), functools.partial(draw, BEGUN)
        return Way(name, run, self.codes, floor, begin, self.picture, BEGUN)

    def read(self) -> list[Speed]:
        """A caption of a picture, greedily."""
        ids = self._with_picture()[: self.batch]

        def answer(stock: bool) -> object:
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_mode="text",
                guidance_scale=1.0,
                max_new_tokens=ANSWER,
                eos_token_id=None,
                **GREEDY,
                stock=stock,
            )

        ways = [Way("stock", lambda: answer(True), self.batch), Way("engine", lambda: answer(False), self.batch)]
        return compare("read", "picture", ways, self.machine.clock, self.rounds)

    def train(self) -> list[Speed]:
        """Forward, backward and step on rows of text and a picture: the whole softmax, and the factored loss."""
        ids = self._with_picture()
        optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=0.0)

        def step(factored: bool) -> None:
            if factored:
                loss = self.model(ids, labels=ids).loss
            else:
                logits = self.model(ids).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        units = ids.numel()
        ways = [Way("whole softmax", lambda: step(False), units), Way("factored loss", lambda: step(True), units)]
        with torch.enable_grad():
            return compare("train", "token", ways, self.machine.clock, self.rounds)

    @torch.no_grad()
    def tokenize(self) -> list[Speed]:
        """Pixels to codes, one picture at a time and in a batch, beside the codec's layers called by hand."""
        codec = self.model.codec
        size = codec.config.image_size
        pixels = torch.linspace(-1, 1, PICTURES * 3 * size * size, device=self.device).view(PICTURES, 3, size, size)

        def layers() -> object:
            return codec.quantizer(codec.resampler.sample(codec.encoder(pixels)))

        ways = [
            Way("one by one", lambda: [codec.encode(single) for single in pixels.split(1)], PICTURES),
            Way("batch", lambda: codec.encode(pixels), PICTURES),
        ]
        ways += [Way("batch, bare layers", layers, PICTURES)] if codec.length.layout == "grid" else []
        return compare("tokenize", "picture", ways, self.machine.clock, self.rounds)

    @torch.no_grad()
    def detokenize(self) -> list[Speed]:
        """Codes to pixels, one picture at a time and in a batch, beside the codec's layers called by hand."""
        codec = self.model.codec
        size = codec.config.image_size
        codes = codec.encode(torch.zeros(PICTURES, 3, size, size, device=self.device))
        singles = [codes.select(slice(place, place + 1)) for place in range(PICTURES)]
        grid = codec.config.grid(size, size)

        def layers() -> object:
            return codec.decoder(codec.resampler.restore(codec.quantizer.lookup(codes.ids), grid))

        ways = [
            Way("one by one", lambda: [codec.pictures(single) for single in singles], PICTURES),
            Way("batch", lambda: codec.pictures(codes), PICTURES),
        ]
        ways += [Way("batch, bare layers", layers, PICTURES)] if codec.length.layout == "grid" else []
        return compare("detokenize", "picture", ways, self.machine.clock, self.rounds)

    def scaling(self) -> Scaling:
        """Pictures under guidance by the engine, more at once and of more codes; the batch of the bench is not used."""
        size = self.model.lm_head.weight.element_size()
        return measure_scaling(
            lambda batch, codes: self._draw(self.model, codes, prompt=self.prompt[:1].expand(batch, -1)),
            lambda batch, codes: self._floor(batch, codes, size, size),
            most=self.codes,
            clock=self.machine.clock,
            rounds=self.rounds,
        )

    def _draw(
        self,
        model: UniMMForConditionalGeneration,
        codes: int,
        *,
        stock: bool = False,
        window: int = 1,
        prompt: torch.Tensor | None = None,
    ) -> Any:
        """What `generate` returns, sequences and passes."""
        prompt = self.prompt if prompt is None else prompt
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_mode="image",
            guidance_scale=GUIDANCE,
            max_new_tokens=codes,
            **SAMPLED,
            return_dict_in_generate=True,
            stock=stock,
            jacobi_window=window,
        )

    def _draw_by_stock_guidance(self, codes: int) -> object:
        opening = self.prompt.new_full((self.batch, 1), self.config.boi_token_id)
        ids = torch.cat([self.prompt, opening], dim=1)
        null = self.prompt.new_tensor(self.config.null_prompt_ids or []).expand(self.batch, -1)
        negative = torch.cat([null, opening], dim=1)
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            guidance_scale=1.0,
            max_new_tokens=codes,
            logits_processor=[
                UnbatchedClassifierFreeGuidanceLogitsProcessor(
                    GUIDANCE, self.model, negative, torch.ones_like(negative)
                ),
                GrammarLogitsProcessor(self.config.grammar, self.device),
            ],
            **SAMPLED,
            stock=True,
        )

    def _served(self, plain: PreTrainedModel) -> Callable[[int], object]:
        opening, null = self.model.picture_opening(), self.config.null_prompt_ids or []
        rows = [*self.prompt.tolist(), *([null] * self.batch)]
        legal = [token for block in self.config.vocabulary.blocks for token in range(block.start, block.stop)]
        return vllm_drawing(plain, [[*row, *opening] for row in rows], legal, self.codes, top_k=TOP_K)

    def _with_picture(self) -> torch.Tensor:
        """Rows of text, a picture, and text again."""
        vocabulary = self.config.vocabulary
        shape = max(self.config.grammar.shapes, key=lambda shape: shape.max_positions)
        starts = self.prompt.new_tensor([block.start for block in vocabulary.blocks])
        sizes = self.prompt.new_tensor(vocabulary.codebook_sizes)
        positions = torch.arange(shape.max_positions, device=self.device)[:, None]
        codes = (starts + positions * 7 % sizes).flatten()
        ends = [vocabulary.boi_token_id, *shape.prefix], [vocabulary.eoi_token_id]
        opening, closing = (self.prompt.new_tensor(ids) for ids in ends)
        row = torch.cat([self.prompt[0], opening, codes, closing, self.prompt[0]])
        return row.expand(max(self.batch, PICTURES), -1)

    def _floor(self, batch: int, codes: int, bytes_per_weight: int, bytes_per_state: int) -> float:
        """Seconds per step: reading every layer, the codes' rows and the cache once, or multiplying by them."""
        layers: torch.nn.Module = self.model.model.language_model.layers
        number = sum(p.numel() for p in layers.parameters())
        rows = sum(self.config.vocabulary.codebook_sizes) / self.config.vocabulary.num_codebooks
        number += rows * self.config.text_config.hidden_size
        text = self.config.text_config
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * bytes_per_state
        read = number * bytes_per_weight + 2 * batch * (self.prompt.shape[1] + codes / 2) * cached
        multiplied = 2 * 2 * batch * number
        return max(read / self.machine.bandwidth, multiplied / self.machine.flops)
