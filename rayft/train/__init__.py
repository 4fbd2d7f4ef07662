"""Ray Train: the worker loop, trainer set-up, the watch over the workers, and what stands around a run."""
