"""How fast a model draws, reads, learns and turns pictures into codes and back, beside what the machine allows.

In: a model. Out: a table of times, each beside the stock way and the floors of bandwidth and arithmetic measured in the
same run. The ways of one task take turns, round by round, so that other work on the machine meets all of them.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from unimm.files import atomic_write
from unimm.generation import GrammarLogitsProcessor
from unimm.unified import UniMMForConditionalGeneration, compress

TASKS = ("draw", "read", "train", "tokenize", "detokenize")
PROMPT, ANSWER = 8, 16  # ids
GUIDANCE, TOP_K = 3.0, 1_000
PICTURES = 4  # per batch of the codec and of a training step
BYTES = {"bfloat16": 2, "int8": 1}
READ_BYTES = {"cpu": 2**28, "cuda": 2**32}  # many times the last cache
PRODUCT = 1_024
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": TOP_K}


@dataclass(frozen=True)
class Way:
    """One way to do a task.

    Args:
        name: of the way.
        run: does it once.
        units: how many units one run does.
        floor: seconds per unit below which no way of this precision can be; None where nothing is said.
        begin: does only the first unit, for a way that stops early: what it takes is spread over `whole` units.
        whole: units of a run that would not stop.
    """

    name: str
    run: Callable[[], object]
    units: int
    floor: float | None = None
    begin: Callable[[], object] | None = None
    whole: int = 0

    def seconds(self, clock: Callable[[], float]) -> float:
        """Of one unit."""
        if self.begin is None or self.units == self.whole:
            return _seconds(self.run, clock) / self.units
        first, taken = _seconds(self.begin, clock), _seconds(self.run, clock)
        each = (taken - first) / (self.units - 1)
        return (first + (self.whole - 1) * each) / self.whole


@dataclass(frozen=True)
class Speed:
    """What was measured of one way.

    Args:
        task, way: what, and how.
        unit: of what.
        milliseconds: per unit, median over the rounds.
        lowest, highest: of the rounds.
        speedup: over the first way of the task, median of the rounds' ratios.
        floor: milliseconds per unit that bandwidth and arithmetic of this run allow; None where nothing is said.
    """

    task: str
    way: str
    unit: str
    milliseconds: float
    lowest: float
    highest: float
    speedup: float
    floor: float | None


@dataclass(frozen=True)
class SpeedReport:
    """All times of one run, and the shares of likeliest codes that formats of weights keep."""

    command: str
    model: str
    clock: str
    threads: int
    gigabytes_per_second: float
    gigaflops: float
    speeds: tuple[Speed, ...]
    agreement: dict[str, float]

    def to_markdown(self) -> str:
        """A table with what it was measured on."""
        lines = [
            "| task | way | ms per unit | range | speed-up | floor, ms | times the floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for speed in self.speeds:
            floor = "" if speed.floor is None else f"{speed.floor:.3f}"
            above = "" if speed.floor is None else f"{speed.milliseconds / speed.floor:.2f}"
            lines.append(
                f"| {speed.task} | {speed.way} | {speed.milliseconds:.3f} per {speed.unit} | {speed.lowest:.3f} to "
                f"{speed.highest:.3f} | {speed.speedup:.2f} | {floor} | {above} |"
            )
        machine = (
            f"{self.model}; {self.clock}, threads: {self.threads}; reads {self.gigabytes_per_second:.1f} GB/s, "
            f"multiplies {self.gigaflops:.0f} GFLOP/s in this run."
        )
        agreeing = [f"Likeliest codes that {name} keeps: {share:.3f}." for name, share in self.agreement.items()]
        return "\n".join([*lines, "", machine, *agreeing, f"Measured by `{self.command}`."])

    def save(self, folder: Path) -> None:
        """Write `speed.md`, `speed.json` and `speed.png`."""
        with atomic_write(folder / "speed.md") as path:
            path.write_text(self.to_markdown() + "\n", encoding="utf-8")
        with atomic_write(folder / "speed.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = [f"{speed.task}: {speed.way}" for speed in self.speeds]
        figure, axis = pyplot.subplots(figsize=(8, 1 + 0.4 * len(names)))
        axis.barh(names, [speed.speedup for speed in self.speeds], color="#4477aa")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_xlabel("speed-up over the first way of the task")
        figure.tight_layout()
        with atomic_write(folder / "speed.png") as path:
            figure.savefig(path, dpi=90)
        pyplot.close(figure)


@dataclass(frozen=True)
class Machine:
    """What this run finds the machine to be.

    Args:
        bandwidth: bytes per second of reading memory.
        flops: per second of a large float32 product.
        clock: processor seconds for one thread, which other work disturbs little, else seconds of the wall.
    """

    bandwidth: float
    flops: float
    clock: Callable[[], float]

    @classmethod
    def measure(cls, device: torch.device) -> Machine:
        """Read a large block and multiply two large matrices, a few times each."""
        single = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if single else time.perf_counter
        number = READ_BYTES.get(device.type, READ_BYTES["cpu"])
        block = torch.ones(number // 4, device=device)
        square = torch.ones(PRODUCT, PRODUCT, device=device)
        reading = min(_seconds(lambda: block.sum().item(), clock) for _ in range(5))
        multiplying = min(_seconds(lambda: (square @ square)[0, 0].item(), clock) for _ in range(5))
        return cls(number / reading, 2 * PRODUCT**3 / multiplying, clock)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin


def compare(task: str, unit: str, ways: Sequence[Way], clock: Callable[[], float], rounds: int) -> list[Speed]:
    """Let the ways take turns; the first run of each is not counted."""
    for way in ways:
        way.run()
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, taken, strict=True):
            times.append(1000 * way.seconds(clock))
    return [
        Speed(
            task=task,
            way=way.name,
            unit=unit,
            milliseconds=statistics.median(times),
            lowest=min(times),
            highest=max(times),
            speedup=statistics.median(first / own for first, own in zip(taken[0], times, strict=True)),
            floor=None if way.floor is None else 1000 * way.floor,
        )
        for way, times in zip(ways, taken, strict=True)
    ]


class Bench:
    """The tasks of one model.

    Args:
        model: with or without codec; tasks that need one are then refused.
        machine: that it runs on.
        rounds: of every way.
        batch: pictures drawn or read at once.
        codes: ids per picture that are drawn, from which the time of the whole is told; None draws it whole.
        formats: of weights that are drawn with besides those of the model.
        window: of Jacobi iteration that is drawn with besides; 1 leaves it out.
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
    ) -> None:
        self.window = window
        self.compressed = {name: copy.deepcopy(model) for name in formats}
        for name, compressed in self.compressed.items():
            compress(compressed, name)
        self.model, self.machine, self.rounds, self.batch = model, machine, rounds, batch
        self.config = model.config
        vocabulary = self.config.vocabulary
        self.device = model.device
        shape = max(self.config.grammar.shapes, key=lambda shape: shape.max_positions)
        self.picture = shape.max_positions * vocabulary.num_codebooks
        self.codes = min(codes or self.picture, self.picture)
        text = torch.arange(PROMPT) * 7 % (vocabulary.image_token_offset - 16) + 16
        self.prompt = text.to(self.device).expand(batch, -1)

    @torch.no_grad()
    def agreement(self) -> dict[str, float]:
        """Share of codes that are likeliest under guidance for each format too, after the same codes before them."""
        drawn = self._draw(self.model, self.codes, stock=False)
        null = drawn.new_tensor(self.config.null_prompt_ids or []).expand(self.batch, -1)
        away = torch.cat([null, drawn[:, PROMPT:]], dim=1)

        def likeliest(model: UniMMForConditionalGeneration) -> torch.Tensor:
            logits, other = (model(ids, logits_to_keep=self.codes + 1).logits.float() for ids in (drawn, away))
            guided = other + GUIDANCE * (logits - other)
            legal = self.config.grammar.table.to(drawn.device)[self.config.grammar.states(drawn)[:, -self.codes - 1 :]]
            return guided.masked_fill(~legal, -float("inf")).argmax(dim=-1)[:, :-1]

        exact = likeliest(self.model)
        return {name: float((likeliest(m) == exact).float().mean()) for name, m in self.compressed.items()}

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
        """Pictures under guidance: two passes by the stock processor, one doubled pass, and the engine."""
        size = self.model.lm_head.weight.element_size()
        ways = [
            self._way("stock, two passes", self._draw_by_stock_guidance),
            self._way("stock, batched guidance", functools.partial(self._draw, self.model, stock=True)),
            self._way("engine", functools.partial(self._draw, self.model, stock=False), self._floor(size, size)),
        ]
        if self.window > 1:
            ahead = functools.partial(self._draw, self.model, stock=False, window=self.window)
            ways.append(self._way(f"engine, window {self.window}", ahead))
        for name, model in self.compressed.items():
            floor = self._floor(BYTES[name], BYTES["bfloat16"])
            ways.append(self._way(f"engine, {name}", functools.partial(self._draw, model, stock=False), floor))
        return compare("draw", f"code of {self.batch}", ways, self.machine.clock, self.rounds)

    def _way(self, name: str, draw: Callable[[int], object], floor: float | None = None) -> Way:
        """A way to draw, per step of the batch."""
        run, begin = functools.partial(draw, self.codes), functools.partial(draw, 1)
        return Way(name, run, self.codes, floor, begin, self.picture)

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
        """Pixels to codes, one picture at a time and in a batch."""
        codec = self.model.codec
        size = codec.config.image_size
        pixels = torch.linspace(-1, 1, PICTURES * 3 * size * size, device=self.device).view(PICTURES, 3, size, size)
        ways = [
            Way("one by one", lambda: [codec.encode(single) for single in pixels.split(1)], PICTURES),
            Way("batch", lambda: codec.encode(pixels), PICTURES),
        ]
        return compare("tokenize", "picture", ways, self.machine.clock, self.rounds)

    @torch.no_grad()
    def detokenize(self) -> list[Speed]:
        """Codes to pixels, one picture at a time and in a batch."""
        codec = self.model.codec
        size = codec.config.image_size
        codes = codec.encode(torch.zeros(PICTURES, 3, size, size, device=self.device))
        singles = [codes.select(slice(place, place + 1)) for place in range(PICTURES)]
        ways = [
            Way("one by one", lambda: [codec.pictures(single) for single in singles], PICTURES),
            Way("batch", lambda: codec.pictures(codes), PICTURES),
        ]
        return compare("detokenize", "picture", ways, self.machine.clock, self.rounds)

    def _draw(self, model: UniMMForConditionalGeneration, codes: int, *, stock: bool, window: int = 1) -> torch.Tensor:
        return model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            generation_mode="image",
            guidance_scale=GUIDANCE,
            max_new_tokens=codes,
            **SAMPLED,
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

    def _floor(self, bytes_per_weight: int, bytes_per_state: int) -> float:
        """Seconds per step: reading every layer, the codes' rows and the cache once, or multiplying by them."""
        layers: torch.nn.Module = self.model.model.language_model.layers
        number = sum(p.numel() for p in layers.parameters())
        rows = sum(self.config.vocabulary.codebook_sizes) / self.config.vocabulary.num_codebooks
        number += rows * self.config.text_config.hidden_size
        text = self.config.text_config
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * bytes_per_state
        read = number * bytes_per_weight + 2 * self.batch * (PROMPT + self.codes / 2) * cached
        multiplied = 2 * 2 * self.batch * number
        return max(read / self.machine.bandwidth, multiplied / self.machine.flops)
