"""One file per upstream; foreign names live here and nowhere else."""
