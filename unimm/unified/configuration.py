"""The unified model's configuration: a text model, a codec, and where their rows meet."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from unimm.codec import VisualCodecConfig
from unimm.sequence import Levels, SpanGrammar, SpanShape, VisualVocabulary, read_shapes


@strict
class UniMMConfig(PreTrainedConfig):
    """One causal language model over text rows and code rows.

    Args:
        text_config: of any causal language model; its `vocab_size` counts all rows, code rows included.
        codec_config: of the visual tokenizer; None for a model that only sees pre-tokenised rows.
        image_token_offset, codebook_sizes: the block of code rows, one codebook per slot of a position.
        num_special_rows: rows right after the codes, for structural ids that a published model has there.
        boi_token_id, eoi_token_id, image_token_id: structural ids; see `VisualVocabulary`.
        vision_layers_before, vision_layers_after: how many of the first and of the last layers of `text_config` change
            picture positions only, as in X-Omni (2507.22058); see `VisionOnly`.
        vision_norm: whether picture positions have a final norm of their own.
        span_shapes: legal pictures, each `{"grid": [rows, columns] | None, "prefix": ids, "min_positions",
            "max_positions"}`.
        spelled_sizes: pictures of every size within bounds, `{"rows": [lowest, highest], "columns": [lowest, highest],
            "digits": ten ids, "between": ids, "end": ids}`; see `SpelledSizes`.
        default_grid: (rows, columns) of a picture that is asked for without a size; None leaves it to the model.
        null_prompt_ids: the unconditional prompt of guidance.
        reads_features: whether pictures in a prompt are read as features of the codec's cells rather than as codes, as
            in LaVIT (2309.04669); see `FeatureReader`.
        levels: sizes of the levels that pictures are drawn by, all codes of a level in one pass; see `Levels` and
            `unimm.unified.levels`. None draws one code after the other.
        reads_vectors: whether pictures in a prompt are read as the vectors of their codes, mapped to the text model's
            width, rather than as rows of its embedding; see `VectorReader`.
        codec_loss_weight: of the codec's own loss, beside that of the text, where pictures are read as vectors; above 0
            the codec learns from both (ETT, 2505.10562), and else it is frozen.
        frozen_embedding: whether the rows of the embedding stay as they are while the rest learns.
        image_loss_weight: weight of a code against a text token in the loss.
        z_loss_weight: weight of the squared log of the softmax's divisor in the loss.

    Raises:
        ValueError: rows, structural ids and shapes that do not fit each other, more vision layers than layers, or
            levels of no codes, or beside what they do not go with.
    """

    model_type = "unimm"
    # TRL asks for it when it loads a reference model; a published model sets its own.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs = {"text_config": AutoConfig, "codec_config": VisualCodecConfig}

    text_config: Any = None
    codec_config: Any = None
    image_token_offset: int = 256
    codebook_sizes: list[int] | None = None
    num_special_rows: int = 0
    boi_token_id: int = 1
    eoi_token_id: int = 2
    image_token_id: int = 3
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    span_shapes: list[dict[str, Any]] | None = None
    spelled_sizes: dict[str, Any] | None = None
    default_grid: list[int] | None = None
    null_prompt_ids: list[int] | None = None
    vision_layers_before: int = 0
    vision_layers_after: int = 0
    vision_norm: bool = False
    reads_features: bool = False
    levels: list[int] | None = None
    reads_vectors: bool = False
    codec_loss_weight: float = 0.0
    frozen_embedding: bool = False
    image_loss_weight: float = 1.0
    z_loss_weight: float = 0.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.codebook_sizes is None:
            self.codebook_sizes = [64]
        if isinstance(self.text_config, dict):
            self.text_config = CONFIG_MAPPING[self.text_config.get("model_type", "qwen3")](**self.text_config)
        elif self.text_config is None:
            rows = VisualVocabulary(self.image_token_offset, tuple(self.codebook_sizes), 1, 2, 3, 0).size
            self.text_config = CONFIG_MAPPING["qwen3"](vocab_size=rows)
        if isinstance(self.codec_config, dict):
            self.codec_config = VisualCodecConfig(**self.codec_config)
        if self.span_shapes is None:
            self.span_shapes = [{"grid": [2, 2], "prefix": [], "min_positions": 4, "max_positions": 4}]
        self._check_vocabulary()
        self._check_vision_layers()
        if self.drawing_levels is not None and (self.has_vision_path or self.reads_features or self.reads_vectors):
            raise ValueError(
                f"levels are {self.levels} beside vision layers, a vision norm, reads_features or reads_vectors, which "
                "placeholders take no part in; leave out either."
            )
        if self.reads_features and self.codec_config is None:
            raise ValueError("reads_features is True and there is no codec_config; features are read by a codec.")
        self._check_vectors()
        super().__post_init__(**kwargs)

    def _check_vocabulary(self) -> None:
        """Check that the text model has exactly the rows that the vocabulary needs, and the head its own."""
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings is True; the head has rows of its own. Leave it False, and begin with a tied "
                "language model through UniMMForConditionalGeneration.from_backbones, which unties it."
            )
        rows = self.vocabulary.size
        if self.text_config.vocab_size != rows:
            raise ValueError(
                f"text_config.vocab_size is {self.text_config.vocab_size}; {self.image_token_offset} text rows and "
                f"codebooks of {self.codebook_sizes} need {rows} (a multiple of 128)."
            )

    def _check_vectors(self) -> None:
        """Check that there are vectors to read, one for each code, and that a codec that learns draws pixels."""
        if self.codec_loss_weight < 0 or (self.codec_loss_weight and not self.reads_vectors):
            raise ValueError(
                f"codec_loss_weight is {self.codec_loss_weight:g} and reads_vectors {self.reads_vectors}; a codec "
                "learns by the vectors of its codes alone: set reads_vectors, or the weight to 0."
            )
        if not self.reads_vectors:
            return
        if self.reads_features or self.codec_config is None or len(self.codebook_sizes or ()) != 1:
            raise ValueError(
                "reads_vectors is True; it needs a codec_config of one codebook, and reads_features to be False."
            )
        if self.codec_config.length_policy.ragged or (self.codec_loss_weight and not self.codec_config.draws_pixels):
            raise ValueError(
                "reads_vectors takes codecs whose pictures of one size have equally many codes, and codec_loss_weight "
                "above 0 those that draw pixels; take another codec."
            )

    def _check_vision_layers(self) -> None:
        before, after = self.vision_layers_before, self.vision_layers_after
        layers = self.text_config.num_hidden_layers
        if min(before, after) < 0 or before + after > layers:
            raise ValueError(
                f"vision_layers_before is {before} and vision_layers_after {after}; both count layers of text_config, "
                f"which has {layers} in all, so they must be 0 or more and at most {layers} together."
            )

    @property
    def has_vision_path(self) -> bool:
        """Whether picture positions take another way through the text model than text does."""
        return bool(self.vision_layers_before or self.vision_layers_after or self.vision_norm)

    @property
    def drawing_levels(self) -> Levels | None:
        """The levels that pictures are drawn by."""
        return None if self.levels is None else Levels(tuple(self.levels))

    @property
    def vocabulary(self) -> VisualVocabulary:
        assert self.codebook_sizes is not None
        return VisualVocabulary(
            image_token_offset=self.image_token_offset,
            codebook_sizes=tuple(self.codebook_sizes),
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
            image_token_id=self.image_token_id,
            pad_token_id=self.pad_token_id or 0,
            num_special_rows=self.num_special_rows,
        )

    @property
    def grammar(self) -> SpanGrammar:
        assert self.span_shapes is not None
        return _grammar(self.vocabulary, read_shapes(self.span_shapes, self.spelled_sizes))


@lru_cache(maxsize=16)
def _grammar(vocabulary: VisualVocabulary, shapes: tuple[SpanShape, ...]) -> SpanGrammar:
    return SpanGrammar(vocabulary, shapes)
