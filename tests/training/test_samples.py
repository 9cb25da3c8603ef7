"""What the pairs of a run are made of: where it lies, and what is said of it."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from siss_diffusers.data.latents import Latents
from siss_diffusers.families import Conditions, LoadedPipeline, StableDiffusion
from siss_diffusers.methods import METHODS
from siss_diffusers.settings import TextToImageSettings
from siss_diffusers.training import samples as samples_module
from siss_diffusers.training.samples import Drawn, Samples, decide_caching, number_prompts
from tests.helpers import tiny_sd
from tests.helpers.image_rows import make_images
from tests.helpers.tiny_problem import draw_query


class CountTensors(pickle.Pickler):
    """Counts the tensors of what is pickled: each takes a file descriptor on its way to another process."""

    count = 0

    def reducer_override(self, value):
        self.count += isinstance(value, Tensor)
        return NotImplemented


def encode_half(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels / 2, torch.zeros_like(pixels)


def double(latents: Tensor) -> Tensor:
    return 2 * latents


@pytest.fixture
def images(tmp_path):
    return make_images([np.full((8, 8), value, dtype=np.uint8) for value in range(0, 120, 20)], tmp_path / "images")


def test_the_cache_is_two_tensors_however_many_images(images):
    cached, fresh = (Latents(images, encode_half, double) for _ in range(2))
    cached.cache([4, 1, 2])
    with open("/dev/null", "wb") as nowhere:
        pickler = CountTensors(nowhere)
        pickler.dump(SimpleNamespace(place=cached.place, cached=cached.cached))
    assert pickler.count == 2
    assert all(cached.load(index).equal(fresh.load(index)) for index in (1, 2, 4))
    assert cached.cached_bytes == 2 * 3 * fresh.load(1).nbytes


def test_numbers_of_conditions_stay_on_the_host():
    """Where the table of conditions may be: a tensor on the host has no rows for numbers on a GPU."""
    query = draw_query(4, seed=0)
    query.keep_condition = query.forget_condition = torch.arange(4)
    rows = METHODS["siss"]().rows(query).to("meta")
    assert rows.noisy.device.type == "meta" and rows.condition.device.type == "cpu"


@pytest.mark.parametrize("limit, where", [(0, "cpu"), (2**30, "meta")])
def test_a_large_table_of_prompts_stays_on_the_host(limit, where, monkeypatch):
    """Of 100,000 captions it takes 24 GB. `meta` stands for a device of its own."""
    monkeypatch.setattr(samples_module, "MAX_TABLE_ON_DEVICE", limit)
    pipeline = tiny_sd.build_pipeline()
    family = StableDiffusion.from_source(LoadedPipeline(pipeline))
    samples = Samples([], [], torch.device("meta"))
    captions = SimpleNamespace(forget_captions=["a"], captions_of=lambda rows: ["a photograph"] * len(rows))
    number_prompts(TextToImageSettings(), family, pipeline, captions, Drawn([0, 3], [0]), samples)
    (table,), (rows,) = (
        conditions.tensors.values() for conditions in (samples.conditions, samples.conditions_of([0, 0]))
    )
    assert table.device.type == where and rows.device.type == "meta" and len(rows) == 2


def test_conditions_of_rows_are_moved_to_the_device():
    table = Conditions({"states": torch.arange(6.0).reshape(3, 2)}, 3)
    samples = Samples([], [], "cpu", conditions=table)
    assert samples.conditions_of(torch.tensor([2, 0])).tensors["states"].tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize("center_crop", [False, True])
def test_who_pays_for_random_crops_is_told(center_crop, monkeypatch, caplog):
    monkeypatch.setattr(samples_module, "crops_are_random", lambda settings, _: not settings.center_crop)
    assert decide_caching(TextToImageSettings(center_crop=center_crop), None) is center_crop
    assert ("Add --center_crop" in caplog.text) is not center_crop
