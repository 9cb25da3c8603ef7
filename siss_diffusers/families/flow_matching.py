"""What pipelines of transformers that were trained by flow matching share."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from siss_diffusers.families.base import PipelineSource
from siss_diffusers.families.text_to_image import TextToImage
from siss_diffusers.noising import GaussianPath


# Of joint attention, whose blocks have projections of the text beside those of the picture.
JOINT_ATTENTION = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
)


class FlowMatching(TextToImage):
    """A text-to-image pipeline whose transformer answers the velocity `eps - x` at `(1 - sigma) x + sigma eps`.

    Class attributes:
        max_sequence_length: tokens of a prompt that the last text encoder sees, as in the call of the pipeline.
    """

    network_name = "transformer"
    schedulers = "a FlowMatchEulerDiscreteScheduler"
    sees_case = True
    patch = 2
    max_sequence_length: ClassVar[int]

    def width(self, source: PipelineSource) -> int:
        config = source.component_config(self.network_name)
        return config["num_attention_heads"] * config["attention_head_dim"]

    def token_limit(self, pipeline, tokenizer_name: str) -> int:
        if tokenizer_name == self.tokenizers[-1]:
            return self.max_sequence_length
        return super().token_limit(pipeline, tokenizer_name)

    @classmethod
    def training_scheduler(cls, scheduler):
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def path(self, pipeline) -> GaussianPath:
        path = super().path(pipeline)
        return replace(path, model_timesteps=self.network_timesteps(path.model_timesteps))

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return what the network is told at the scheduler's timesteps, which are 1,000 sigma."""
        return timesteps

    def sampling_scheduler(self, scheduler):
        return type(scheduler).from_config(scheduler.config)
