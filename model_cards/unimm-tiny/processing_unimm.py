from unimm.sequence.processing import UniMMProcessor  # noqa: F401
