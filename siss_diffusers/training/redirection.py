"""What forget images are redirected to: the posterior mean of images to keep of the same condition."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from siss_diffusers.data.latents import LoadsImages
from siss_diffusers.methods import Query
from siss_diffusers.methods.posterior import posterior_mean


class KeepPosterior:
    """Images to keep on the device, by their conditions.

    Args:
        images: `(N, C, H, W)` float32; of latent models the means of their VAE posteriors.
        members: `(M,)` numbers of the images of each condition that has any.
        others: `(M,)` numbers of the images that stand in where a condition has none.
    """

    def __init__(self, images: Tensor, members: Mapping[int, Tensor], others: Tensor) -> None:
        self.images = images
        self.members = members
        self.others = others

    @classmethod
    def of_rows(
        cls,
        keep: LoadsImages,
        rows: Sequence[int],
        other_rows: Sequence[int],
        conditions: Mapping[int, int] | None,
        device: torch.device | str,
    ) -> "KeepPosterior":
        """Load images to keep.

        Args:
            rows: those of the conditions of forget images.
            other_rows: those for conditions that have none. Where it is empty, all of `rows` are.
            conditions: of each row; None for unconditional models.
        """
        place = {row: index for index, row in enumerate(sorted({*rows, *other_rows}))}
        images = torch.stack([keep.load(row) for row in place]).float().to(device)

        def numbers(chosen: Sequence[int]) -> Tensor:
            return torch.tensor([place[row] for row in chosen], device=device)

        by_condition: dict[int, list[int]] = {}
        if conditions is not None:
            for row in rows:
                by_condition.setdefault(conditions[row], []).append(row)
            # Of conditions that no forget image has, those that stand in.
            of_others: dict[int, list[int]] = {}
            for row in other_rows:
                if conditions[row] not in by_condition:
                    of_others.setdefault(conditions[row], []).append(row)
            by_condition |= of_others
        members = {condition: numbers(of_condition) for condition, of_condition in by_condition.items()}
        return cls(images, members, numbers(other_rows or rows))

    def means(self, query: Query, conditions: Tensor | None = None) -> Tensor:
        """Return y' `(B, C, H, W)`, on the host, of the pairs with `from_forget`; a itself of the others.

        Args:
            conditions: `(B,)`, whose images to keep are meant; None: those of the forget images.
        """
        means = query.forget.clone()
        ratio = query.path.alphas[query.timesteps] / query.path.sigmas[query.timesteps]
        conditions = query.forget_condition if conditions is None else conditions
        if conditions is None:
            conditions = torch.zeros(len(means), dtype=torch.long)
        for condition in conditions[query.from_forget].unique().tolist():
            pairs = (query.from_forget & (conditions == condition)).nonzero().flatten()
            drawn = (tensor[pairs].to(self.images.device) for tensor in (query.forget, query.noise, ratio))
            means[pairs] = posterior_mean(*drawn, self.images, self.members.get(condition, self.others)).cpu()
        return means
