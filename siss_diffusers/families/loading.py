"""Pipelines that are loaded whole, to sample from."""

from typing import Any

import torch

from siss_diffusers.families.base import Family, silenced
from siss_diffusers.families.sources import (
    NOT_IN_TRAINING,
    NamedPipeline,
    refuse_missing_weights,
    take_pictures_one_by_one,
)
from siss_diffusers.families.trust import check_safetensors, loading


def load_for_sampling(
    source: NamedPipeline,
    family: Family,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    adapter: str | None = None,
    adapter_flag: str = "--adapter",
) -> Any:
    """Load a pipeline onto a device, with an adapter in it where one is named.

    The safety checker stays away: a picture that it blacks out could not be compared.

    Args:
        adapter: folder or Hub name of a LoRA adapter.
        adapter_flag: where that name comes from, for messages.

    Raises:
        UsageError: for files that cannot be read, or must not be.
    """
    from diffusers import DiffusionPipeline

    unused = {name: None for name in NOT_IN_TRAINING if name in source.pipeline_config}
    if "safety_checker" in unused:
        unused["requires_safety_checker"] = False
    if adapter is not None:
        check_safetensors(adapter, adapter_flag)
    with silenced():
        with loading(source.name, source.flag):
            pipeline = DiffusionPipeline.from_pretrained(
                source.name,
                revision=source.revision,
                variant=source.variant,
                cache_dir=source.cache_dir,
                use_safetensors=True,
                dtype=dtype,
                **unused,
            )
        refuse_missing_weights(pipeline.components, source.name, source.flag)
        take_pictures_one_by_one(pipeline)
        if adapter is not None:
            with loading(adapter, adapter_flag):
                pipeline.load_lora_weights(adapter, cache_dir=source.cache_dir, use_safetensors=True)
    pipeline.to(device)
    if torch.device(device).type == "cpu" and family.has_latents:
        family.network(pipeline).to(memory_format=torch.channels_last)  # faster there
    return pipeline
