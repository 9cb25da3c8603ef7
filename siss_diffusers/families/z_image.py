"""Z-Image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siss_diffusers.families.base import Conditions, PipelineSource
from siss_diffusers.families.flow_matching import ATTENTION, FlowMatching, chat_texts


@dataclass(frozen=True)
class ZImage(FlowMatching):
    """`ZImagePipeline`s: a Qwen3, and a `ZImageTransformer2DModel`.

    The network is told 1 - sigma and answers `x - eps`; here the sign is turned. It takes lists of pictures and of
    prompts without padding; in a table of conditions prompts are padded, and their lengths stand beside them.
    """

    title = "Z-Image"
    pipeline_class = "ZImagePipeline"
    lora_targets = ATTENTION
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    default_guidance_scale = 6.0  # the pipeline's own scale, 5, is what is added: there 0 is none, here 1
    max_sequence_length = 512  # with the template

    def width(self, source: PipelineSource) -> int:
        return source.component_config(self.network_name)["dim"]

    def texts_of(self, pipeline, prompts: Sequence[str]) -> list[str]:
        return chat_texts(pipeline.tokenizer, prompts, enable_thinking=True)

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts),  # a copy, which it overwrites
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        states = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        return {"cap_feats": states, "lengths": torch.tensor([len(one) for one in embeds], device=states.device)}

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        pictures = list(noisy.unsqueeze(2).unbind())  # each is a video of one frame
        answers = network(pictures, timesteps, unpadded(conditions), return_dict=False)[0]
        return -torch.stack(list(answers)).squeeze(2)

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        return (1000 - timesteps) / 1000

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        return {
            "guidance_scale": guidance_scale - 1,
            "prompt_embeds": unpadded(conditions),
            "negative_prompt_embeds": unpadded(unconditional),
        }


def unpadded(conditions: Conditions) -> list[Tensor]:
    """Return the embeddings `(L_i, D)` of each prompt."""
    lengths = conditions.tensors["lengths"].tolist()
    return [states[:length] for states, length in zip(conditions.tensors["cap_feats"], lengths)]
