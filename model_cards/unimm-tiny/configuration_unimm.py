from unimm.unified.configuration import UniMMConfig  # noqa: F401
