"""Data: rows -> messages -> tokens and loss mask -> shards of the cache -> the batches of a step.

- `formats`, `messages`: what the columns of a row mean
- `template`: chat templates, tokens and which of them are trained
- `read`: rows of files, folders, the hub and S3, by range
- `cache`, `corpus`: the tokenised cache, written once and memory-mapped
- `order`: which row is read at which position, as a pure function
- `packing`, `step`, `tensors`: a step's rows into micro-batches of every rank
- `doctor`, `leakage`: what `rayft check` finds

torch is imported by `tensors` alone.
"""
