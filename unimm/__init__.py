"""unimm: one causal language model that reads and draws."""
