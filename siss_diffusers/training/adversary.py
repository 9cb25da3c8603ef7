"""Conditions under which the network still denoises a forget image, searched again and again as it is trained."""

import logging
import time

from accelerate.utils import broadcast
from torch import Tensor

from siss_diffusers.draws import SEARCH_START, keyed_generator
from siss_diffusers.embedding_search import ROWS_PER_SEARCH, search_embeddings
from siss_diffusers.families import Conditions
from siss_diffusers.families.sampling import evaluating
from siss_diffusers.noising import GaussianPath
from siss_diffusers.settings import Settings
from siss_diffusers.training.network import TrainedNetwork
from siss_diffusers.training.samples import Samples


logger = logging.getLogger(__name__)

# What the searches of an image begin with, in turns: half of them far from any prompt.
STARTS = ("prompt", "gauss", "other", "gauss")
FRESH = 0.4  # probability that a search begins anew and does not go on from what it found before


class Adversary:
    """Refreshes the searched conditions under the weights as they are.

    One of them is searched every `adversarial_every` windows, in turns, by every process in the same way; the one of the
    main process counts. All draws are keyed by the window, so that a resumed run goes on as if it had not stopped.

    Args:
        path: the noise levels, on the host.
        samples: with the forget images and the conditions.
    """

    def __init__(self, settings: Settings, path: GaussianPath, network: TrainedNetwork, samples: Samples) -> None:
        self.settings, self.network, self.samples = settings, network, samples
        self.device = network.accelerator.device
        self.path = path.to(self.device)
        self.told, self.numbering = samples.told, samples.told.numbering
        self.searches, self.seconds = 0, 0.0
        pictures = list(self.numbering.pictures)
        self.images = [pictures.index(number) for number in range(len(self.numbering.prompts))]
        for entry in range(self.numbering.num_searched):
            self._store(entry, self._start(entry, 0))

    @property
    def state(self) -> dict[str, Tensor]:
        """The searched conditions, for a checkpoint."""
        return self.told.searched.tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with the searched conditions of a checkpoint."""
        for name, tensor in self.told.searched.tensors.items():
            tensor.copy_(state[name])

    def _store(self, entry: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.told.searched.tensors.items():
            # The table may lie on the host; processes talk on their devices.
            tensor[entry] = broadcast(tensors[name].to(self.device, tensor.dtype).contiguous())[0]

    def _start(self, entry: int, window: int) -> dict[str, Tensor]:
        """Return the condition that a fresh search begins with."""
        image, restart = divmod(entry, self.numbering.restarts)
        start = STARTS[restart % len(STARTS)]
        others = self.samples.other_prompt_rows
        if start == "gauss" or (start == "other" and not others):
            return self.told.gaussian(SEARCH_START, entry, window)
        row = self.numbering.prompts[image]
        if start == "other":
            row = others[int(keyed_generator(self.settings.seed, SEARCH_START, entry, window).integers(len(others)))]
        return self.told.prompts[[row]].tensors

    def refresh(self, window: int) -> None:
        """Search the condition whose turn it is, if it is time."""
        turn, rest = divmod(window, self.settings.adversarial_every)
        if rest:
            return
        started = time.perf_counter()
        entry = turn % self.numbering.num_searched
        is_fresh = keyed_generator(self.settings.seed, SEARCH_START, window).random() < FRESH
        begin = self._start(entry, window) if is_fresh else self.told.searched[[entry]].tensors
        image = self.samples.forget.load(self.images[entry // self.numbering.restarts])
        dtypes = {name: tensor.dtype for name, tensor in begin.items()}

        def predict(noisy: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            told = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
            return self.network.predict_alone(noisy, timesteps, Conditions(told, len(noisy)))

        with evaluating(self.network.module):
            (found,) = search_embeddings(
                predict,
                self.path,
                image[None].to(self.device),
                {name: tensor.to(self.device) for name, tensor in begin.items()},
                [(window,)],
                marks=[self.settings.adversarial_steps],
                seed=self.settings.seed,
            )
        self._store(entry, found)
        self.searches += 1
        self.seconds += time.perf_counter() - started

    def log_cost(self, train_seconds: float) -> None:
        """Log what the searches cost beside the whole training."""
        rows = self.searches * self.settings.adversarial_steps * ROWS_PER_SEARCH
        logger.info(
            f"Searched adversarial conditions {self.searches} times, {rows} rows forward and backward, in"
            f" {self.seconds:.1f} s of the {train_seconds:.1f} s of training"
        )
