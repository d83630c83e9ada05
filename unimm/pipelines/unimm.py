"""Draw, understand, chat: a model and its processor behind three calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from unimm.codes import VisualCodes
from unimm.sequence import ImagePart, TextPart, UniMMProcessor
from unimm.unified import UniMMForConditionalGeneration

if TYPE_CHECKING:  # diffusers takes seconds to import and most drawings never need it
    from unimm.detokenizer import Drawer

DETOKENIZER_FOLDER = "detokenizer"
# transformers warns of sampling settings beside greedy decoding unless they are its own defaults.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the codes that it was decoded from."""

    image: Image.Image
    codes: VisualCodes


@dataclass(frozen=True)
class Reply:
    """An answer: text and pictures, in order."""

    parts: tuple[TextPart | Picture, ...]

    @property
    def text(self) -> str:
        """All text, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart)).strip()

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, RGB."""
        return [part.image for part in self.parts if isinstance(part, Picture)]

    @property
    def message(self) -> dict[str, Any]:
        """The reply as an assistant's chat message, to continue a conversation with."""
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image", "image": part.image}
            for part in self.parts
        ]
        return {"role": "assistant", "content": content}


class UniMM:
    """One model that reads and draws.

    Args:
        model: with its codec.
        processor: of the model.
        folder: that the model was loaded from; its detokenizer, if there is one, lies in `detokenizer/`.
        weights, offload: of the detokenizer too; see `unimm.load`.
    """

    def __init__(
        self,
        model: UniMMForConditionalGeneration,
        processor: UniMMProcessor,
        folder: Path | None = None,
        *,
        weights: str | None = None,
        offload: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.folder = folder
        self.weights = weights
        self.offload = offload
        self._home = model.device

    @property
    def device(self) -> torch.device:
        """Where the model works; parts of it may wait elsewhere."""
        return self._home if self.offload else self.model.device

    @property
    def makes_pixels(self) -> bool:
        """Whether there is a way from codes to pixels: the codec's, or a detokenizer."""
        return self.codec_draws or self._has_detokenizer

    @property
    def _has_detokenizer(self) -> bool:
        return self.folder is not None and (self.folder / DETOKENIZER_FOLDER / "model_index.json").is_file()

    @cached_property
    def detokenizer(self) -> Drawer:
        """The diffusion detokenizer, loaded when it is first used.

        Raises:
            ValueError: the model has none.
        """
        if self.folder is None or not self._has_detokenizer:
            way_out = "draw with diffusion_steps=0, by its codec." if self.codec_draws else "convert it with one."
            raise ValueError(f"This model has no diffusion detokenizer; {way_out}")
        from unimm.detokenizer import load_drawer

        drawer = load_drawer(self.folder / DETOKENIZER_FOLDER, dtype=self.model.dtype, weights=self.weights)
        if self.offload:
            drawer.pipeline.enable_model_cpu_offload(device=self.device)
        else:
            drawer.pipeline.to(self.device)
        return drawer

    def _place_language_model(self, device: torch.device) -> None:
        """Bring the language model to where it works, or to where it waits."""
        if self.offload:
            if device.type == "cpu":
                self.model.release()
            self.model.model.language_model.to(device)
            self.model.lm_head.to(device)

    @property
    def codec_draws(self) -> bool:
        """Whether the codec decodes to pixels."""
        return self.model.codec.config.draws_pixels

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        diffusion_steps: int = 0,
        stock: bool = False,
        size: tuple[int, int] | None = None,
        num_codes: int | None = None,
    ) -> list[Reply]:
        """Draw: `n` replies of one picture each per prompt, prompt by prompt.

        Args:
            prompts: what to draw, one or several; they run as one batch.
            n: pictures per prompt.
            seed: repeats the drawings; None draws anew.
            guidance: strength of classifier-free guidance, 1 is none.
            guidance_interval: share of a picture's codes that is guided, (0, 1) is the whole; see the model's
                `generate`.
            temperature, top_p: of sampling; temperature 0 is greedy. None of the four: as the model's generation
                config says.
            diffusion_steps: 0 decodes by the codec in one pass, or where it makes no pixels by the detokenizer with as
                many steps as published; any other number draws by the diffusion detokenizer.
            stock: by the stock loop of transformers instead of the engine.
            size: (height, width) in pixels; the model's own default, or choice, if None.
            num_codes: positions of every picture; fewer are coarser and sooner drawn, where the codec decodes the first
                ones alone. None leaves it to the model.

        Raises:
            ValueError: an empty prompt, one that is longer than the model takes, n below 1, sampling outside its range,
                a size or number of codes that it cannot draw, an interval that is none, or no detokenizer for diffusion
                steps.
        """
        if n < 1:
            raise ValueError(f"n is {n}; draw at least one picture per prompt.")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not listed or not all(prompt.strip() for prompt in listed):
            raise ValueError("The prompt is empty; say what to draw, for example 'a red heart'.")
        asked = [prompt for prompt in listed for _ in range(n)]
        inputs = self.processor.drawing_inputs(asked)
        rows = self._answer(
            inputs,
            seed=seed,
            mode="image",
            guidance=guidance,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_p=top_p,
            stock=stock,
            size=size,
            num_codes=num_codes,
        )
        return self._replies(rows, diffusion_steps=diffusion_steps, seed=seed, prompts=asked)

    def understand(
        self, images: Image.Image | Sequence[Image.Image], questions: str | Sequence[str] = "describe the picture"
    ) -> list[Reply]:
        """Answer a question about each picture, greedily.

        Args:
            images: one picture or several.
            questions: one for all, or one per picture.

        Raises:
            ValueError: no picture, or another number of questions.
        """
        listed = list(images) if isinstance(images, (list, tuple)) else [images]
        asked = [questions] * len(listed) if isinstance(questions, str) else list(questions)
        if not listed or len(asked) != len(listed):
            raise ValueError(
                f"There are {len(listed)} pictures and {len(asked)} questions; give a picture or more, and one "
                "question for all or one for each."
            )
        requests = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(listed, asked, strict=True)
        ]
        return self._replies(
            self._answer(
                self.processor.chat_inputs(requests), seed=None, mode="text", guidance=1.0, temperature=0.0, top_p=1.0
            )
        )

    def answer(self, prompts: Sequence[str], *, seed: int | None = None) -> list[Reply]:
        """Answers to several one-turn requests in one batch, sampled without guidance or truncation; the model decides
        where it draws.
        """
        requests = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = self._answer(
            self.processor.chat_inputs(requests), seed=seed, mode=None, guidance=1.0, temperature=1.0, top_p=1.0
        )
        return self._replies(rows, seed=seed, prompts=list(prompts))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        seed: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> Reply:
        """The next turn of a conversation; the model decides where it draws."""
        rows = self._answer(
            self.processor.chat_inputs([messages]),
            seed=seed,
            mode=None,
            guidance=guidance,
            temperature=temperature,
            top_p=top_p,
        )
        return self._replies(rows, seed=seed, prompts=[_text(messages[-1])])[0]

    @torch.no_grad()
    def _answer(
        self,
        inputs: BatchFeature,
        *,
        seed: int | None,
        mode: str | None,
        guidance: float | None,
        temperature: float | None,
        top_p: float | None,
        guidance_interval: tuple[float, float] | None = None,
        stock: bool = False,
        size: tuple[int, int] | None = None,
        num_codes: int | None = None,
    ) -> list[list[int]]:
        """Generated ids of every request, the picture's opening included.

        Raises:
            ValueError: sampling outside its range.
        """
        _check_sampling(temperature, top_p)
        if seed is not None:
            torch.manual_seed(seed)
        given = {"temperature": temperature, "top_p": top_p}
        sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        sampling["do_sample"] = True
        if temperature == 0:
            sampling = GREEDY
        self._place_language_model(self.device)
        output = self.model.generate(
            **inputs.to(self.device),
            generation_mode=mode,
            guidance_scale=guidance,
            guidance_interval=guidance_interval,
            stock=stock,
            grid=None if size is None else self.processor.grid_of(*size),
            num_codes=num_codes,
            **sampling,
        )
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def _replies(
        self,
        rows: list[list[int]],
        *,
        diffusion_steps: int = 0,
        seed: int | None = None,
        prompts: Sequence[str] | None = None,
    ) -> list[Reply]:
        parsed = [
            [part for part in self.processor.parse(row) if isinstance(part, TextPart) or part.complete] for row in rows
        ]
        asked = prompts or [""] * len(parsed)
        drawn = [
            (part.codes, prompt)
            for parts, prompt in zip(parsed, asked, strict=True)
            for part in parts
            if isinstance(part, ImagePart)
        ]
        pictures = iter(
            self.decode(
                [codes for codes, _ in drawn],
                diffusion_steps=diffusion_steps,
                seed=seed,
                prompts=[prompt for _, prompt in drawn],
            )
        )
        return [
            Reply(tuple(next(pictures) if isinstance(part, ImagePart) else part for part in parts)) for parts in parsed
        ]

    @torch.no_grad()
    def decode(
        self,
        codes: Sequence[VisualCodes],
        *,
        diffusion_steps: int = 0,
        seed: int | None = None,
        prompts: Sequence[str] | None = None,
    ) -> list[Picture]:
        """Pictures of single codes: one pass of the codec, or so many steps of the diffusion detokenizer.

        Args:
            codes: of one picture each.
            diffusion_steps: 0 for the codec; of a codec that makes no pixels, for as many steps as published.
            seed: of the detokenizer's noise; picture i takes seed + i.
            prompts: what each was drawn for, which some detokenizers read too.

        Raises:
            ValueError: diffusion steps of a model without detokenizer.
        """
        pictures = []
        for index, single in enumerate(codes):
            placed = single.to(self.device)
            if diffusion_steps or not self.codec_draws:
                self._place_language_model(torch.device("cpu"))
                generator = None if seed is None else torch.Generator().manual_seed(seed + index)
                image = self.detokenizer.draw(
                    placed,
                    self.model.codec,
                    prompt=prompts[index] if prompts else "",
                    steps=diffusion_steps,
                    generator=generator,
                )
                pictures.append(Picture(image, single))
                continue
            pixels = self.model.codec.pictures(placed)[0]
            levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            pictures.append(Picture(Image.fromarray(np.ascontiguousarray(levels)), single))
        return pictures


def _check_sampling(temperature: float | None, top_p: float | None) -> None:
    if not 0 <= (temperature or 0) < math.inf or not 0 <= (top_p or 0) <= 1:
        raise ValueError(
            f"temperature is {temperature} and top_p {top_p}; give a temperature of 0, which is greedy, or more, and a "
            "top_p from 0 to 1, or None for the model's own."
        )


def _text(message: dict[str, Any]) -> str:
    """The text of a message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
