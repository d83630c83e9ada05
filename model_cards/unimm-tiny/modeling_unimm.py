from unimm.unified.modeling import UniMMForConditionalGeneration, UniMMModel  # noqa: F401
