"""From a job to a DeepSpeed configuration; options of the user's own are merged, contradictions refused."""

from __future__ import annotations

from typing import Any

from rayft.errors import JobError
from rayft.plan.memory import bucket_defaults
from rayft.spec import Job

#: What rayft decides; a `deepspeed:` option that sets it otherwise is refused with the key to use instead.
OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation is derived)",
    "managed_gradient_accumulation": "nothing; accumulation is rayft's own",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "the keys of `train`",
    "scheduler": "train.lr_scheduler",
    "bf16": "train.precision",
    "fp16": "train.precision (fp16 is not supported)",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer, or zero_optimization.offload_optimizer with zero.offload_optimizer true",
    "zero_optimization.round_robin_gradients": "nothing; fragments need the natural order",
    "checkpoint": "the keys of `checkpoint`",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}


def deepspeed_config(job: Job, stage: int) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets. Raises JobError on an option that contradicts the job."""
    refuse_contradictions(job)
    train = job.train
    zero: dict[str, Any] = {"stage": stage}
    buckets = bucket_defaults(job)
    if stage > 0:
        zero |= {"contiguous_gradients": True, "overlap_comm": False}
        zero |= {name: size for name, size in buckets.items() if name.endswith("bucket_size")}
    if stage == 3:
        zero |= buckets
        zero["stage3_param_persistence_threshold"] = 10_000
    if job.zero.offload_optimizer:
        if stage == 0:
            raise JobError("zero.offload_optimizer needs zero.stage 1, 2 or 3.", "Set zero.stage to 2.")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": job.cluster.gpus_per_worker > 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.max_grad_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if stage > 0 and train.precision != "fp32":
        config["bf16"] = {"enabled": True}
        if train.precision == "pure_bf16":
            config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        else:
            # Without it, stage 1 adds a micro-batch's gradient again with every later one (DeepSpeed 0.19.8).
            config["bf16"]["immediate_grad_update"] = True
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = "fp32"
    return _merge(config, job.deepspeed)


def refuse_contradictions(job: Job) -> None:
    """Raise JobError for an option of `deepspeed:` that rayft sets itself."""
    for path, instead in OURS.items():
        node: Any = job.deepspeed
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is None or (path.endswith("offload_optimizer") and job.zero.offload_optimizer):
            continue
        raise JobError(
            f"deepspeed.{path} = {node!r} contradicts what rayft sets.", f"Remove it and use {instead}."
        )


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        merged[key] = (
            _merge(merged[key], value)
            if isinstance(value, dict) and isinstance(merged.get(key), dict)
            else value
        )
    return merged
