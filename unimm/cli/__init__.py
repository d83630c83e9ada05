"""The front door: one module per verb. Imports of the heavy rooms happen inside a verb, so that `--help` is instant."""
