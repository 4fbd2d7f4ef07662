"""Text out of a model: generation engines behind one protocol, prompts, and the chat loop.

- `engine.py`: the protocol every engine answers to, and the sampling settings.
- `hf.py`: the engine over a transformers model, on one process or on every rank of a sharded one.
- `decode.py`: the decoding loop itself: prompts read as one pack, then batched, finished rows dropped.
- `attention.py`: attention for both of its halves, prompts as packs and single new tokens as batched products.
- `prompts.py`: messages to prompt ids, which tokens end an answer, ids back to text.
- `load.py`: a model ready to generate, from a folder, hub id, run or adapter.
- `chat.py`: the loop behind `rayft chat`.
"""

from rayft.generate.engine import Engine, Scored

__all__ = ["Engine", "Scored"]
