"""Text out of a model: generation engines behind one protocol, prompts, and the chat loop.

- `engine.py`: the protocol every engine answers to, and the sampling settings.
- `hf.py`: the engine over a transformers model, on one process or on every rank of a sharded one.
- `decode.py`: the decoding loop itself: batched, with a cache, finished rows dropped.
- `attention.py`: attention for decoding that never repeats keys and values of grouped heads.
- `prompts.py`: chat template to token ids, and which tokens end a turn.
- `chat.py`: the loop behind `rayft chat`.
"""

from rayft.generate.engine import Engine, Scored

__all__ = ["Engine", "Scored"]
