"""What pipelines of transformers that were trained by flow matching share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from siss_diffusers.families.text_to_image import TextToImage
from siss_diffusers.noising import GaussianPath


ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
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

    @classmethod
    def latent_size(cls, config: dict) -> int:
        # Positions that are rotations know no size; 128 is the default of the pipelines.
        return config.get("sample_size") or 128

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


def chat_texts(tokenizer: Any, prompts: Sequence[str], enable_thinking: bool) -> list[str]:
    """Return prompts in the chat template of a language model, as pipelines hand them to its tokenizer."""
    template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": enable_thinking}
    return [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **template) for prompt in prompts]
