"""The unified model: a text backbone over one row space, with the codec beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from unimm.codec import VisualCodecModel
from unimm.codes import VisualCodes
from unimm.generation import UniMMGenerationMixin
from unimm.generation.engine import Decoder
from unimm.sequence import IGNORED_LABEL, ImageSpan, UniMMProcessor
from unimm.unified.composition import config_for, processor_for
from unimm.unified.configuration import UniMMConfig
from unimm.unified.decoder import CachedDecoder, is_covered
from unimm.unified.glyphs import glyph_rows, texts_of_tokens
from unimm.unified.levels import Asked, ask
from unimm.unified.losses import factored_cross_entropy
from unimm.unified.reader import FeatureReader, VectorReader
from unimm.unified.recorded import RecordedDecoder
from unimm.unified.rows import code_rows, extend_rows
from unimm.unified.vision_layers import ModalityNorm, add_vision_layers, later_layers, split_norm


@dataclass
class UniMMOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss: scalar, with `labels`.
        logits: `[B, T, V]`, unmasked: the grammar lives in generation.
        past_key_values: the cache.
        text_loss, image_loss: means over text and over code targets, with `labels`.
        codec_loss: the codec's own, with `labels` and pictures, where it learns.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    codec_loss: torch.Tensor | None = None


class UniMMPreTrainedModel(PreTrainedModel):
    """Flags that the body and the whole share."""

    config_class = UniMMConfig
    config: UniMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["visual"]


class UniMMModel(UniMMPreTrainedModel):
    """The body: ids (or pixels behind placeholders) to hidden states."""

    def __init__(self, config: UniMMConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.norm: ModalityNorm | None = None
        if config.vision_layers_before or config.vision_layers_after:
            before, after = config.vision_layers_before, config.vision_layers_after
            add_vision_layers(self.language_model, before=before, after=after)
        if config.vision_norm:
            self.norm = split_norm(self.language_model)
        self.visual = VisualCodecModel(config.codec_config) if config.codec_config is not None else None
        if self.visual is not None:
            self.visual.requires_grad_(False)
        self.reader: FeatureReader | VectorReader | None = None
        if config.reads_features:
            self.reader = FeatureReader(self.codec, config.text_config.hidden_size)
        elif config.reads_vectors:
            self.reader = VectorReader(self.codec.dim, config.text_config.hidden_size)
        self.post_init()

    def train(self, mode: bool = True) -> UniMMModel:
        """The codec is frozen and stays in eval mode, unless it learns from what is said of its pictures, and the
        embedding may be frozen; loading has made all weights trainable.
        """
        super().train(mode)
        if self.config.frozen_embedding:
            self.get_input_embeddings().requires_grad_(False)
        if self.visual is not None:
            learns = self.config.codec_loss_weight > 0
            self.visual.requires_grad_(learns).train(mode and learns)  # which knows what in it does not
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Code embeddings of pictures, `[B, N K, D]`."""
        return self.get_input_embeddings()(self.codes_to_ids(self.codec.encode(pixel_values)))

    @property
    def codec(self) -> VisualCodecModel:
        """The codec.

        Raises:
            ValueError: the model was built without one.
        """
        if self.visual is None:
            raise ValueError("This model has no codec, so it takes no pixels; load one whose config has codec_config.")
        return self.visual

    def codes_to_ids(self, codes: VisualCodes) -> torch.Tensor:
        """Token ids of codes `[B, N, K]`, `[B, N K]`."""
        return self.config.vocabulary.to_token_ids(codes.ids).flatten(1)

    def place_pictures(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Replace placeholders by the codes of the pictures, in order; a list may hold pictures of several shapes.

        Raises:
            ValueError: another number of placeholders than codes.
        """
        placeholders = input_ids == self.config.image_token_id
        batches = [pixel_values] if isinstance(pixel_values, torch.Tensor) else [one[None] for one in pixel_values]
        ids = torch.cat([self.codes_to_ids(self.codec.encode(batch)).flatten() for batch in batches])
        if int(placeholders.sum()) != ids.numel():
            raise ValueError(
                f"The prompt has {int(placeholders.sum())} picture placeholders for {ids.numel()} codes of "
                f"{len(pixel_values)} pictures; give one image part per picture."
            )
        return input_ids.masked_scatter(placeholders, ids)

    def read_pictures(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[B, T, D]` with what the reader makes of the pictures at their placeholders, and the mask
        `[B, T]` without the cells that the codec drops, so that a picture is as long as its content.

        Raises:
            ValueError: a model that reads codes, or another number of placeholders than cells.
        """
        if self.reader is None:
            raise ValueError("This model reads pictures as codes; place_pictures puts them into input_ids.")
        if isinstance(self.reader, VectorReader):
            codes = self.codec.encode(pixel_values)
            return self.place_features(input_ids, attention_mask, self.reader(self.codec.lookup(codes)), codes.mask)
        cells, keep = self.codec.kept_cells(pixel_values)
        return self.place_features(input_ids, attention_mask, self.reader(cells, keep), keep)

    def place_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: torch.Tensor,
        keep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `read_pictures`, of features `[pictures, N, D]` of which `keep` `[pictures, N]` counts."""
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != keep.numel():
            raise ValueError(
                f"The prompt has {int(places.sum())} picture placeholders for {keep.numel()} cells of "
                f"{len(features)} pictures; give one image part per picture."
            )
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(places[..., None], features.to(embeds.dtype))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return embeds, mask.masked_scatter(places, keep.to(mask.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, D]` of ids `[B, T]`; see the text model for the other arguments.

        Args:
            image_positions: bool `[B, T]`, what vision-only layers work on; read off `input_ids` where there are any.

        Raises:
            ValueError: vision-only layers, and `inputs_embeds` without `image_positions` of their shape.
        """
        if pixel_values is not None and input_ids is not None and self.reader is not None:
            inputs_embeds, attention_mask = self.read_pictures(input_ids, attention_mask, pixel_values)
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp_min(0) if position_ids is None else position_ids
            input_ids = None
        elif pixel_values is not None and input_ids is not None:
            input_ids = self.place_pictures(input_ids, pixel_values)
        if self.config.has_vision_path:
            image_positions = self._image_positions(input_ids, inputs_embeds, image_positions)
            kwargs["image_positions"] = image_positions
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if self.norm is not None:
            normed = self.norm(outputs.last_hidden_state, image_positions)
            outputs.last_hidden_state = normed
            if outputs.hidden_states is not None:
                outputs.hidden_states = (*outputs.hidden_states[:-1], normed)
        return outputs

    def _image_positions(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, given: torch.Tensor | None
    ) -> torch.Tensor:
        """Where pictures are, bool `[B, T]`."""
        if input_ids is not None:
            return self.config.vocabulary.is_visual(input_ids)
        wanted = None if inputs_embeds is None else inputs_embeds.shape[:2]
        if given is None or given.shape != wanted:
            seen = None if given is None else tuple(given.shape)
            raise ValueError(
                f"image_positions are {seen} beside inputs_embeds; this model has layers for pictures only, so pass "
                "bool [B, T] of the same positions, or input_ids."
            )
        return given


class UniMMForConditionalGeneration(UniMMPreTrainedModel, UniMMGenerationMixin):
    """Reads and draws: any causal language model over text rows and code rows, with a plain head."""

    def __init__(self, config: UniMMConfig) -> None:
        super().__init__(config)
        self.model = UniMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocabulary.size, bias=False)
        self.post_init()

    @property
    def visual(self) -> VisualCodecModel | None:
        return self.model.visual

    @property
    def codec(self) -> VisualCodecModel:
        """The codec; ValueError where there is none."""
        return self.model.codec

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Code embeddings of pictures, `[B, N K, D]`."""
        return self.model.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        rows_to_keep: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> UniMMOutput:
        """Logits, or the modality-factored loss where `labels` are given (then no logits are made).

        Args:
            input_ids: int64 `[B, T]`; placeholders stand for the codes of `pixel_values`.
            pixel_values: float `[pictures, 3, H, W]` in [-1, 1], in reading order. In training with labels a codec of
                `codec_loss_weight` above 0 learns from what is said of them, and from copying them.
            image_positions: bool `[B, T]`, where pictures are in `inputs_embeds`, for a model with vision-only layers.
            labels: int64 `[B, T]`, not shifted; -100 is ignored, and placeholders take the codes of the pictures.
            logits_to_keep: logits of the last positions only; 0 keeps all.
            rows_to_keep: int64 `[R]`, logits of these ids only, `[B, T, R]`; None keeps the whole vocabulary.
            num_items_in_batch: targets of the whole batch, where this call sees a part of it.
        """
        codec_loss = None
        if self.model.reader is not None:
            if labels is not None:  # what is read as features is no target
                labels = labels.masked_fill(labels == self.config.image_token_id, IGNORED_LABEL)
            if labels is not None and self.config.codec_loss_weight and pixel_values is not None and self.training:
                assert input_ids is not None
                read = self._learn_to_read(input_ids, attention_mask, pixel_values)
                inputs_embeds, attention_mask, codec_loss = read
                input_ids, pixel_values = None, None
        elif pixel_values is not None and input_ids is not None:
            placed = self.model.place_pictures(input_ids, pixel_values)
            if labels is not None:
                labels = torch.where(labels == self.config.image_token_id, placed, labels)
            input_ids, pixel_values = placed, None
        by_levels = labels is not None and self.config.levels is not None
        if by_levels:
            asked = self._ask(input_ids, labels, attention_mask, position_ids)
            input_ids, position_ids, attention_mask, labels = asked
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_positions=image_positions,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        result = UniMMOutput(
            past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if rows_to_keep is None:
                result.logits = self.lm_head(hidden[:, kept])
            else:
                result.logits = nn.functional.linear(hidden[:, kept], self._head_rows()[rows_to_keep])
            return result
        factored = factored_cross_entropy(
            nn.functional.pad(hidden, (0, 0, 0, 1)) if by_levels else hidden,
            self._head_rows(),
            labels,
            self.config.vocabulary,
            image_weight=self.config.image_loss_weight,
            z_weight=self.config.z_loss_weight,
            num_targets=num_items_in_batch,
        )
        result.loss, result.text_loss, result.image_loss = factored.loss, factored.text_loss, factored.image_loss
        if codec_loss is not None:
            result.loss, result.codec_loss = factored.loss + self.config.codec_loss_weight * codec_loss, codec_loss
        return result

    def _ask(
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> Asked:
        """Rows with placeholders behind them for the codes that a model which draws by levels is to learn."""
        levels, attention = self.config.drawing_levels, self.config.text_config._attn_implementation
        assert levels is not None
        assert labels is not None
        if input_ids is None or attention != "sdpa":
            raise ValueError(
                f"Attention is {attention} and input_ids are {'missing' if input_ids is None else 'given'}; to draw by "
                "levels is learned from input_ids under sdpa, since it says itself who sees whom."
            )
        return ask(input_ids, labels, attention_mask, position_ids, self.config.grammar, levels)

    def _learn_to_read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings and mask as of `read_pictures`, with a gradient for the codec, and the codec's own loss: the mean
        squared error of its copy, and that of its quantizer.
        """
        assert isinstance(self.model.reader, VectorReader)
        trip = self.codec(pixel_values)
        features = self.model.reader(trip.vectors)
        keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        embeds, mask = self.model.place_features(input_ids, attention_mask, features, keep)
        copied = trip.velocity_loss
        if copied is None:
            copied = nn.functional.mse_loss(self.codec.pixels_of(trip.reconstruction).float(), pixel_values.float())
        return embeds, mask, copied + trip.quantizer_loss

    def _head_rows(self) -> torch.Tensor:
        """The head `[V, D]`, gathered where FSDP spreads it: its hooks wait for calls of the head."""
        if isinstance(self.lm_head, FSDPModule):
            self.lm_head.unshard()
        return self.lm_head.weight

    def decoder(self) -> CachedDecoder | None:
        """A decoder for one batch; None for families of bodies that it does not cover, and weights in pieces."""
        devices = {weight.device for weight in self.model.language_model.parameters()}
        if len(devices) > 1 or isinstance(self, FSDPModule) or not is_covered(self.config.text_config):
            return None
        return RecordedDecoder.of(self) if devices.pop().type == "cuda" else CachedDecoder(self)

    def take_back(self, decoder: Decoder) -> None:
        """See `UniMMGenerationMixin.take_back`."""
        if isinstance(decoder, RecordedDecoder):
            decoder.wait(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> UniMMForConditionalGeneration:
        self.release()
        return super()._apply(fn, recurse)

    def release(self) -> None:
        """Let go of what waits on a GPU for the next drawing: a cache, and recorded steps."""
        RecordedDecoder.forget(self)

    def placed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Ids with the codes of the pictures in place of placeholders; see `UniMMModel.place_pictures`."""
        return input_ids if pixel_values is None else self.model.place_pictures(input_ids, pixel_values)

    def _picture_inputs(self, input_ids: torch.Tensor, model_inputs: dict[str, Any]) -> dict[str, Any]:
        pixel_values = model_inputs.get("pixel_values")
        if self.model.reader is None or pixel_values is None:
            return model_inputs
        embeds, mask = self.model.read_pictures(input_ids, model_inputs.get("attention_mask"), pixel_values)
        rest = {name: value for name, value in model_inputs.items() if name != "pixel_values"}
        return rest | {"inputs_embeds": embeds, "attention_mask": mask}

    def decode_image_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Pixels `[pictures, 3, H, W]` in [-1, 1] of every whole picture in a generated sequence `[T]` or `[1, T]`.

        Raises:
            ValueError: no whole picture.
        """
        spans = self.config.grammar.parse(token_ids.flatten().tolist())
        pictures = [span for span in spans if isinstance(span, ImageSpan) and span.complete]
        pictures = [span for span in pictures if not any(None in position for position in span.codes)]
        if not pictures:
            raise ValueError("The sequence holds no whole picture; generate more tokens, or ask for a drawing.")
        decoded = []
        for span in pictures:
            ids = torch.tensor(span.codes, device=self.codec.device)[None]  # [1, N, K]
            grid = [span.grid] if span.grid else None
            decoded.append(self.codec.pictures(VisualCodes(ids, torch.ones_like(ids[..., 0], dtype=torch.bool), grid)))
        return torch.cat(decoded)

    @torch.no_grad()
    def begin_code_rows(self) -> None:
        """Give the code rows of embedding and head the geometry of the codec's vectors, at the text rows' mean norm."""
        vocabulary, slots = self.config.vocabulary, self.codec.code_vectors()
        embedding, head = self.get_input_embeddings().weight, self.lm_head.weight
        assert isinstance(embedding, torch.Tensor)
        for weight in (embedding, head):
            norm = float(weight[: vocabulary.image_token_offset].float().norm(dim=1).mean())
            for block, vectors in zip(vocabulary.blocks, slots, strict=True):
                weight[block] = code_rows(vectors.cpu(), weight.shape[1], norm).to(weight)

    @torch.no_grad()
    def begin_glyph_rows(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the text rows of the embedding pictures of their texts, at their mean norm, and leave the whole
        embedding as it is from then on (Emergent Semantics, 2507.04886); see `glyph_rows`.
        """
        embedding, offset = self.get_input_embeddings().weight, self.config.vocabulary.image_token_offset
        assert isinstance(embedding, torch.Tensor)
        norm = float(embedding[:offset].float().norm(dim=1).mean())
        rows = glyph_rows(texts_of_tokens(tokenizer, offset), embedding.shape[1], norm)
        embedding[:offset] = rows.to(embedding)
        self.config.frozen_embedding = True
        self.train(self.training)

    @classmethod
    def from_backbones(
        cls,
        llm: str | PreTrainedModel,
        codec: VisualCodecModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vision_layers_before: int = 0,
        vision_layers_after: int = 0,
        reads_vectors: bool = False,
        codec_loss_weight: float = 0.0,
    ) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
        """A new model over a causal language model and a codec, and the processor that goes with it.

        Text rows keep the language model's embeddings and head bit by bit, untied where they were tied; code rows start
        with the geometry of the codec's vectors (`begin_code_rows`).

        Args:
            llm: a causal language model, or its name or path.
            codec: with at least one codebook.
            tokenizer: of the language model.
            vision_layers_before, vision_layers_after: new layers around those of the language model that change
                pictures only, with a final norm for pictures (X-Omni, 2507.22058); text logits stay what they were.
            reads_vectors, codec_loss_weight: see `UniMMConfig`.
        """
        backbone = AutoModelForCausalLM.from_pretrained(llm) if isinstance(llm, str) else llm
        embedding = backbone.get_input_embeddings().weight.data
        processor = processor_for(tokenizer, codec, text_rows=max(len(embedding), len(tokenizer) + 3))
        config = config_for(
            backbone.config,
            codec,
            processor,
            vision_layers_before=vision_layers_before,
            vision_layers_after=vision_layers_after,
            reads_vectors=reads_vectors,
            codec_loss_weight=codec_loss_weight,
        )
        model = cls(config).to(backbone.dtype)
        model.model.visual = codec.float().eval().requires_grad_(False)
        state = backbone.base_model.state_dict()
        name = next(key for key, value in state.items() if value.data_ptr() == embedding.data_ptr())
        state[name] = extend_rows(embedding, config.vocabulary.size)
        body = model.model.language_model
        if model.model.norm is not None:
            norm = {key.removeprefix("norm."): state.pop(key) for key in list(state) if key.startswith("norm.")}
            model.model.norm.text.load_state_dict(norm)
            model.model.norm.image.load_state_dict(norm)
        body.load_state_dict(body.state_dict() | later_layers(state, vision_layers_before))
        head = backbone.get_output_embeddings().weight.data
        model.lm_head.weight.data.copy_(extend_rows(head, config.vocabulary.size))
        model.begin_code_rows()
        return model.eval(), processor
