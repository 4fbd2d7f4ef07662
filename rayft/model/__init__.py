"""Models: where they come from, how they are built, adapted, run on packed documents, and exported.

`files` finds a model (hub, folder, `s3://`, GGUF, `package:NAME`, a finished run) and names its content; `load` builds
it; `weights` reads its tensors one at a time under the module's names; `adapters` adds LoRA and its variants;
`attention`, `families` and `head` make packed training exact and cheap; `export` writes what users load.
Importing this package imports neither torch nor transformers.
"""

from rayft.model.files import ModelFiles, load_config, load_tokenizer, resolve_model

__all__ = ["ModelFiles", "load_config", "load_tokenizer", "resolve_model"]
