"""What a run will need, from configs alone and without torch: memory by term, the ZeRO stage, the GPU it fits on.

- `architecture.py`: a config.json as parameter shapes; `headers.py`: shapes from safetensors headers.
- `trainable.py`, `activations.py`, `memory.py`: parameters, activations and state of one rank in bytes.
- `gpus.py`, `choose.py`: what a GPU holds, the stage to train with, what to change where nothing fits.
- `render.py`: tables, and predicted against measured.
"""

from rayft.plan.choose import Choice, choose_stage
from rayft.plan.memory import MemoryPlan, plan_memory

__all__ = ["Choice", "MemoryPlan", "choose_stage", "plan_memory"]
