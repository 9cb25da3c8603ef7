"""What the network is told of a forget image beside its own prompt: forgetting under one prompt alone hides the image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from siss_diffusers.draws import FORGET_CONDITION, condition_kinds, keyed_generator


@dataclass(frozen=True)
class ForgetConditions:
    """Draws the condition of a pair, as a number.

    Numbers below `num_prompts` are rows of the table of prompts. Those after them are searched conditions, `restarts` for
    each different forget image. Beyond are Gaussian ones, a number for each pair that is ever drawn.

    Args:
        shares: of the kinds of condition: `prompt`, `empty`, `other`, `gauss`, `adversarial`.
        num_prompts: rows of the table of prompts.
        empty: the row of the empty prompt.
        pictures: for each forget image its number among the different ones.
        prompts: for each different forget image the row of its prompt.
        restarts: searched conditions of each different forget image; 0 where nothing is searched.
    """

    shares: Mapping[str, float]
    num_prompts: int
    empty: int
    pictures: Sequence[int]
    prompts: Sequence[int]
    restarts: int

    @property
    def num_searched(self) -> int:
        """Return the number of searched conditions."""
        return len(self.prompts) * self.restarts

    def draw(
        self, seed: int, position: int, num_pairs: int, lam: float, image: int, keep: int, forget: int
    ) -> tuple[int, int]:
        """Return what the network is told of the keep image and of the forget image of a pair.

        Another prompt is that of the keep image, so that both share it. Otherwise both share the drawn condition where
        they share a prompt; where not, the keep image keeps its own. So the weights of SISS stay exact, and images of
        other prompts go on being learned under them.

        Args:
            position: of the pair in the sequence of all pairs.
            num_pairs: pairs of a window.
            lam: the share of pairs that are made from their forget image.
            image: number of the forget image.
            keep, forget: rows of the prompts of the two images.
        """
        window, pair = divmod(position, num_pairs)
        kinds = condition_kinds(seed, window, num_pairs, lam, tuple(self.shares.values()))
        kind = list(self.shares)[kinds[pair]]
        if kind == "prompt":
            return keep, forget
        if kind == "other":
            return keep, keep
        if kind == "empty":
            drawn = self.empty
        elif kind == "gauss":
            drawn = self.num_prompts + self.num_searched + position
        else:
            restart = int(keyed_generator(seed, FORGET_CONDITION, window, pair).integers(self.restarts))
            drawn = self.num_prompts + self.pictures[image] * self.restarts + restart
        return drawn if keep == forget else keep, drawn

    def prompt_of(self, number: int) -> int:
        """Return the row of the prompt whose images to keep belong to a condition: of a searched one that of its image."""
        searched = number - self.num_prompts
        return self.prompts[searched // self.restarts] if 0 <= searched < self.num_searched else number
