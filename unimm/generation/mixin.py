"""`generate` with the grammar always on and guidance batched: small overrides around the stock loop, and the engine."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from unimm.generation.continuous import continuous_config
from unimm.generation.engine import Decoder, Engine, Unconditional, is_covered, pad_left
from unimm.generation.processors import EVERYWHERE, ClassifierFreeGuidance, GrammarLogitsProcessor, check_interval

GENERATION_MODES = (None, "text", "image")
INNER_ARGUMENTS = {"guidance", "grammar"}  # what `generate` makes of its arguments
OWN_ARGUMENTS = (*INNER_ARGUMENTS, "stock", "jacobi_window")
# Prompts in another form than ids, and caches that the caller holds, are for the stock loop.
STOCK_ARGUMENTS = ("past_key_values", "position_ids", "inputs_embeds", "image_positions")


@dataclass
class UniMMGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns from the engine under `return_dict_in_generate`.

    Args:
        passes: of the model after the prompt; with a `jacobi_window` or levels fewer than there are new ids.
    """

    passes: int | None = None


class UniMMGenerationMixin(GenerationMixin):
    """For models whose config has `grammar`, `vocabulary` and `null_prompt_ids`."""

    def decoder(self) -> Decoder | None:
        """A decoder for one batch of the engine; None where the model can only take the stock loop."""
        return None

    def take_back(self, decoder: Decoder) -> None:
        """Keep what a decoder has prepared for the next batch, where that is worth its memory."""

    def placed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Ids with the codes of the pictures in place of placeholders."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        guidance_scale: float | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        generation_mode: str | None = None,
        stock: bool = False,
        jacobi_window: int = 1,
        grid: tuple[int, int] | None = None,
        num_codes: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text and pictures; the arguments of transformers' `generate`, and these.

        Greedy and sampled answers come from the `Engine` where it covers the model, the processors and the criteria,
        and from the stock loop elsewhere: the same ids under greedy decoding, the same distribution under sampling.
        The engine returns no cache.

        Args:
            guidance_scale: strength of guidance inside pictures, or one per sample `[B]`; 1 or None turns it off.
            guidance_interval: share of a picture's codes that is guided, (start, end) in [0, 1]: an approximation, for
                which the engine reads no unconditional rows after the end of a picture that ends the answer. None takes
                the generation config's, or the whole picture.
            negative_prompt_ids: what to steer away from, `[B, U]`, padded on the left; the empty request by default.
            generation_mode: `image` opens a picture at once and stops at its end, `text` opens none, None lets the
                model decide.
            stock: take the stock loop in any case.
            jacobi_window: codes of a picture that one pass of the engine guesses and checks: the same drawing in
                fewer passes of more rows each, which pays where arithmetic is idle. With `return_dict_in_generate`
                the engine's output says how many there were, `passes`.
            grid: (rows, columns) of the picture that mode `image` opens; the model's own default, or choice, if None.
            num_codes: positions of every picture, each of K codes: where the codec decodes the first ones alone, the
                picture is closed after so many, coarser and sooner. None leaves it to the model.

        Raises:
            ValueError: no ids `[B, T]`, an unknown mode, a grid or number of codes that no legal picture has, a window
                below 1 or beside the stock loop, an interval that is none, guidance that is no number or not one per
                sample, guidance with beam search, assisted or prompt-lookup decoding, or a model that draws by levels
                where the engine cannot.
        """
        if unknown := INNER_ARGUMENTS & kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(unknown))} is no argument; guidance_scale guides, and grid gives a size."
            )
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode is {generation_mode!r}; it must be image, text or None.")
        if jacobi_window < 1 or (stock and jacobi_window > 1):
            raise ValueError(
                f"jacobi_window is {jacobi_window} and stock {stock}; give 1 or more, and 1 with stock=True."
            )
        if jacobi_window > 1:
            self._refuse_levels("a jacobi_window")
        grammar = self.config.grammar if num_codes is None else self.config.grammar.of_length(num_codes)
        config = copy.deepcopy(generation_config or self.generation_config)
        if generation_mode == "image":
            config.max_new_tokens = grammar.longest  # an argument of the caller's comes after
        kwargs = config.update(**kwargs)
        if guidance_scale is None:
            guidance_scale = config.guidance_scale
        if guidance_interval is None:
            guidance_interval = config.to_dict().get("guidance_interval") or EVERYWHERE
        guidance_interval = check_interval(guidance_interval)
        config.guidance_scale = 1.0  # what is None, the stock loop fills in from the model and then guides by itself
        kwargs["jacobi_window"], kwargs["grammar"] = jacobi_window, grammar
        input_ids = kwargs.pop("input_ids", inputs)
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
            raise ValueError(
                "The prompt has no ids [B, T]; give input_ids, also beside inputs_embeds: the grammar reads them."
            )
        vocabulary = self.config.vocabulary
        if generation_mode == "text":
            config.suppress_tokens = [*(config.suppress_tokens or []), vocabulary.boi_token_id]
        if generation_mode == "image":
            opening = self.picture_opening(grid, num_codes)
            input_ids, kwargs["attention_mask"] = append_tokens(input_ids, kwargs.get("attention_mask"), opening)
            config.eos_token_id = vocabulary.eoi_token_id
        kwargs = self._picture_inputs(input_ids, kwargs)
        kwargs["stock"] = stock or any(kwargs.get(name) is not None for name in STOCK_ARGUMENTS)
        if guidance_scale is None or (isinstance(guidance_scale, (int, float)) and guidance_scale == 1):
            return super().generate(input_ids, config, **kwargs)
        check_guidance(guidance_scale, len(input_ids))
        self._refuse_unguidable(config, kwargs)
        negative = self._negative_prompt(negative_prompt_ids, input_ids)
        if generation_mode == "image":
            negative = append_tokens(negative, None, opening)[0]
        if isinstance(guidance_scale, torch.Tensor):
            guidance_scale = guidance_scale.to(input_ids.device).repeat_interleave(config.num_return_sequences or 1)
        guidance = ClassifierFreeGuidance(grammar, guidance_scale, guidance_interval)
        return super().generate(
            input_ids,
            config,
            unconditional_ids=negative,
            unconditional_mask=(negative != vocabulary.pad_token_id).long(),
            guidance=guidance,
            **kwargs,
        )

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> ContinuousBatchingManager:
        """As in transformers, where `generate_batch` and its manager come from, with the grammar on every request.

        A request whose ids end in `picture_opening` and whose `eos_token_id` is that of `<eoi>` draws, one with
        `draws=False` writes, and others decide; see `ContinuousGrammar`. Pictures in a prompt stand there as codes
        (`placed`).

        Raises:
            ValueError: guidance or asynchronous batching (see `continuous_config`), or a model that draws by levels.
        """
        self._refuse_levels("continuous batching")
        config = continuous_config(continuous_batching_config, generation_config or self.generation_config)
        return super().init_continuous_batching(generation_config, config, workload_hints)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in OWN_ARGUMENTS})

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        stock, window = model_kwargs.pop("stock", False), model_kwargs.pop("jacobi_window", 1)
        config = generation_config
        recorded = config.output_attentions or config.output_hidden_states or config.output_logits
        choices = config.cache_implementation is not None or not config.use_cache or config.compile_config is not None
        free = not (stock or synced_gpus or self.training or recorded or choices)
        decoder = self.decoder() if free and is_covered(logits_processor, stopping_criteria) else None
        if decoder is None:
            if self.config.vocabulary.boi_token_id not in (config.suppress_tokens or []):
                self._refuse_levels("the stock loop or what needs it")
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        mask = model_kwargs.get("attention_mask")
        negative, negative_mask = model_kwargs.get("unconditional_ids"), model_kwargs.get("unconditional_mask")
        ends = [token for criterion in stopping_criteria for token in _stop_ids(criterion)]
        engine = Engine(
            decoder,
            next(processor.grammar for processor in logits_processor if isinstance(processor, GrammarLogitsProcessor)),
            logits_processor,
            do_sample=bool(config.do_sample),
            pad_token_id=self.config.vocabulary.pad_token_id,
            stop_ids=frozenset(ends),
            window=window,
            levels=self.config.drawing_levels,
        )
        drawn = engine.generate(
            input_ids,
            self.placed(input_ids, model_kwargs.get("pixel_values")),
            torch.ones_like(input_ids) if mask is None else mask,
            None if negative is None or negative_mask is None else Unconditional(negative, negative_mask),
            max_length=config.max_length,
            streamer=streamer,
            keep_scores=bool(config.return_dict_in_generate and config.output_scores),
        )
        self.take_back(decoder)
        if not config.return_dict_in_generate:
            return drawn.sequences
        return UniMMGenerateOutput(sequences=drawn.sequences, scores=drawn.scores, passes=drawn.passes)

    def _refuse_levels(self, unable: str) -> None:
        """Say that a model which draws by levels cannot draw so."""
        if self.config.drawing_levels is not None:
            raise ValueError(f"Its configuration has levels, by which the engine alone draws, not {unable}.")

    def _refuse_unguidable(self, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        beams, lookup = config.num_beams or 1, config.prompt_lookup_num_tokens
        if beams > 1 or lookup or kwargs.get("assistant_model") is not None:
            raise ValueError(
                "Guidance runs two rows per sample, which beam search, assisted and prompt-lookup decoding cannot "
                "follow; use greedy or sampled decoding, or guidance_scale=1."
            )

    def picture_opening(self, grid: tuple[int, int] | None = None, num_codes: int | None = None) -> list[int]:
        """Ids that mode `image` opens a picture with: `<boi>`, and the size where it is not left to the model.

        Raises:
            ValueError: a grid that no legal picture, or none of so many positions, has.
        """
        chosen = grid or (self.config.default_grid if num_codes is None else None)
        grammar = self.config.grammar if num_codes is None else self.config.grammar.of_length(num_codes)
        size = () if chosen is None else grammar.shape_of(tuple(chosen)).prefix
        return [self.config.vocabulary.boi_token_id, *size]

    def _picture_inputs(self, input_ids: torch.Tensor, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is given for the pictures of a prompt that it reads otherwise than as ids."""
        return model_inputs

    def _negative_prompt(self, negative: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
        if negative is None:
            null_prompt = self.config.null_prompt_ids or [self.config.vocabulary.boi_token_id]
            negative = torch.tensor([null_prompt], device=input_ids.device)
        return negative.to(input_ids.device).expand(input_ids.shape[0], -1)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        device: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        stock = super()._get_logits_processor(
            generation_config, *args, device=device, model_kwargs=model_kwargs, **kwargs
        )
        own = model_kwargs if model_kwargs is not None else {}
        guidance, chosen = own.pop("guidance", None), own.pop("grammar", None)
        grammar = GrammarLogitsProcessor(chosen or self.config.grammar, device or self.device)
        return LogitsProcessorList([*([guidance] if guidance else []), grammar, *stock])

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        unconditional_ids: torch.Tensor | None = None,
        unconditional_mask: torch.Tensor | None = None,
        guidance: ClassifierFreeGuidance | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Stock inputs; under guidance the batch is doubled, the unconditional rows below the conditional ones."""
        if unconditional_ids is not None and unconditional_mask is not None:
            if attention_mask is None:  # the stock loop drops a mask of ones
                attention_mask = torch.ones_like(input_ids)
            # The mask of the unconditional rows has grown by the tokens generated so far, which both halves share.
            generated = unconditional_mask.shape[1] - unconditional_ids.shape[1]
            shared = input_ids[:, input_ids.shape[1] - generated :]
            rows = (input_ids, torch.cat([unconditional_ids, shared], dim=1))
            masks = (attention_mask, unconditional_mask)
            length = max(row.shape[1] for row in rows)
            input_ids = torch.cat([pad_left(row, length, self.config.vocabulary.pad_token_id) for row in rows])
            attention_mask = torch.cat([pad_left(mask, length, 0) for mask in masks])
            if inputs_embeds is not None and is_first_iteration:  # features in the place of some ids of the prompt
                beginning = inputs_embeds.new_zeros(len(inputs_embeds), length - inputs_embeds.shape[1], 1)
                conditional = torch.cat([beginning.expand(-1, -1, inputs_embeds.shape[2]), inputs_embeds], dim=1)
                unconditional = self.get_input_embeddings()(input_ids[len(inputs_embeds) :])
                inputs_embeds = torch.cat([conditional, unconditional])
            kwargs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
            next_sequence_length = None if is_first_iteration else next_sequence_length
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if (mask := model_kwargs.get("unconditional_mask")) is not None:
            model_kwargs["unconditional_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return model_kwargs


def check_guidance(scale: Any, batch: int) -> None:
    """Raise `ValueError` where guidance is no finite number, nor a tensor of one for each of `batch` samples."""
    if isinstance(scale, torch.Tensor):
        good = scale.shape == (batch,) and bool(scale.isfinite().all())
    else:
        good = isinstance(scale, Real) and math.isfinite(scale)
    if not good:
        raise ValueError(
            f"guidance_scale is {scale!r}; give a finite number, or a tensor of one for each of the {batch} samples."
        )


def _stop_ids(criterion: StoppingCriteria) -> list[int]:
    return criterion.eos_token_id.tolist() if isinstance(criterion, EosTokenCriteria) else []


def append_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T]` ids and mask with the same tokens after every row."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    appended = input_ids.new_tensor(tokens).expand(len(input_ids), -1)
    return torch.cat([input_ids, appended], dim=1), torch.cat([mask, torch.ones_like(appended)], dim=1)
