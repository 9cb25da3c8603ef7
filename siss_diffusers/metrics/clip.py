"""CLIP score (Hessel et al., arXiv 2104.08718) and CLIP-IQA (Wang et al., arXiv 2207.12396), by any CLIP of transformers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.families.trust import loading


# What every CLIP was trained with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QUALITY_PROMPTS = ("Good photo.", "Bad photo.")


class Clip:
    """Embeddings of pictures and texts, of unit length.

    Args:
        name: a CLIP model with its tokenizer: a folder, or a name on the Hub.
        flag: the option that named it, for the message.

    Raises:
        UsageError: where it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, flag: str, cache_dir: str | None = None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        with loading(name, flag):
            model = CLIPModel.from_pretrained(name, cache_dir=cache_dir, use_safetensors=True)
            # Left unsaid, a repository that brings code would have the user asked whether to run it.
            self.tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def of_images(self, images: Tensor, batch_size: int) -> Tensor:
        """`(N, 3 or 1, H, W)` in [0, 1] to `(N, D)`, on the CPU."""
        size = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        found = []
        for batch in images.split(batch_size):
            batch = batch.to(self.device).expand(-1, 3, -1, -1)
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
            found.append(self.model.get_image_features((batch - mean) / std).pooler_output)
        return F.normalize(torch.cat(found).float().cpu())

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """`(N, D)`, on the CPU."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        found = self.model.get_text_features(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return F.normalize(found.pooler_output.float().cpu())


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of every picture and its own text, not below 0; `(N, D)` and `(N, D)` to `(N,)`."""
    return 100 * (images * texts).sum(1).clamp(min=0)


def clip_iqa(images: Tensor, good: Tensor, bad: Tensor, logit_scale: float = 100.0) -> Tensor:
    """Probability that a picture is a good photograph rather than a bad one; `(N, D)`, `(D,)` and `(D,)` to `(N,)`."""
    return (logit_scale * images @ torch.stack([good, bad]).T).softmax(1)[:, 0]
