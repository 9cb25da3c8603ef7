"""CLIP score (Hessel et al., arXiv 2104.08718) and CLIP-IQA (Wang et al., arXiv 2207.12396), by any CLIP of transformers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.families.trust import loading
from siss_diffusers.metrics.base import ALL_BROKEN, NO_PROMPTS, Metric, Skip, not_empty
from siss_diffusers.metrics.broken import finite


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

# Every CLIP was trained with these.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QUALITY_PROMPTS = ("Good photo.", "Bad photo.")


class Clip:
    """Embeds pictures and texts as vectors of unit length.

    Args:
        name: a CLIP model with its tokenizer: a folder, or a name on the Hub.
        flag: the option that named it, for messages.

    Raises:
        UsageError: if it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, flag: str, cache_dir: str | None = None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        with loading(name, flag):
            # Otherwise transformers takes the precision of the file, and pixels are float32.
            model = CLIPModel.from_pretrained(name, cache_dir=cache_dir, use_safetensors=True, dtype=torch.float32)
            # Without this argument the user is asked whether to run the code that a repository brings.
            self.tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def of_images(self, images: Tensor, batch_size: int) -> Tensor:
        """Return embeddings `(N, D)`, on the CPU, of pictures `(N, 3 or 1, H, W)` in [0, 1]."""
        size = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        embeddings = []
        for batch in images.split(batch_size):
            batch = batch.to(self.device).expand(-1, 3, -1, -1)
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
            embeddings.append(self.model.get_image_features((batch - mean) / std).pooler_output)
        return F.normalize(torch.cat(embeddings).float().cpu())

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings `(N, D)`, on the CPU; texts that are too long are cut."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        output = self.model.get_text_features(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return F.normalize(output.pooler_output.float().cpu())


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return 100 times the cosine of every picture and its own text, at least 0: `(N, D)` and `(N, D)` to `(N,)`."""
    return 100 * (images * texts).sum(1).clamp(min=0)


def clip_iqa(images: Tensor, good: Tensor, bad: Tensor, logit_scale: float = 100.0) -> Tensor:
    """Return the probability that a picture is a good photograph rather than a bad one, `(N,)`.

    Args:
        images: embeddings `(N, D)`.
        good, bad: embeddings `(D,)` of two texts.
    """
    return (logit_scale * images @ torch.stack([good, bad]).T).softmax(1)[:, 0]


def _clip_of(model: "MeasuredModel") -> Clip:
    if model.networks.clip is None:
        raise Skip("needs --clip_model")
    return model.networks.clip


def _clip_iqa(model: "MeasuredModel") -> dict[str, float]:
    clip = _clip_of(model)
    embeddings = clip.of_images(not_empty(model.others), model.settings.batch_size)
    return {"clip_iqa": clip_iqa(embeddings, *clip.of_texts(QUALITY_PROMPTS)).mean().item()}


def _clip_score(model: "MeasuredModel") -> dict[str, float]:
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    clip, samples, prompts = _clip_of(model), model.ordinary_samples, model.data.ordinary_prompts
    # The prompts took turns.
    texts = clip.of_texts(prompts)[torch.arange(len(samples)) % len(prompts)]
    if not (measured := finite(samples)).any():
        raise Skip(ALL_BROKEN)
    images = clip.of_images(samples[measured], model.settings.batch_size)
    return {"clip_score": clip_score(images, texts[measured]).mean().item()}


CLIP_IQA = Metric(
    key="clip_iqa",
    label="CLIP-IQA",
    explanation="Quality of the pictures as CLIP rates it. Higher is better.",
    measure=_clip_iqa,
    better="higher",
    chapter="rest",
)
CLIP_SCORE = Metric(
    key="clip_score",
    label="CLIP score",
    explanation="How well the pictures fit their prompts. Higher is better.",
    measure=_clip_score,
    better="higher",
    chapter="rest",
)
