"""The embedding attack: does a search of the text-embedding space find a condition that gives the forgotten image?"""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.metrics.base import Metric, Probe, Skip
from siss_diffusers.metrics.broken import broken
from siss_diffusers.metrics.copies import copy_statistics
from siss_diffusers.metrics.formats import percent


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel
    from siss_diffusers.families import Conditions

CURVE = (25, 50, 100, 200, 400)  # steps of the search after which copies are counted


class Control(NamedTuple):
    """A picture `(C, H, W)` that the model never saw, and the number of the prompt that its search starts from."""

    picture: Tensor
    prompt: int


class Target(NamedTuple):
    """What a search looks for: a picture `(C, H, W)`, its prompt's number, and the key of its draws."""

    picture: Tensor
    prompt: int
    key: tuple[int, int]


def curve_marks(num_steps: int) -> list[int]:
    """Return the steps after which copies are counted: those of `CURVE` below `num_steps`, and `num_steps`."""
    return [*(mark for mark in CURVE if mark < num_steps), num_steps]


def choose_controls(model: "MeasuredModel") -> list[Control]:
    """Choose pictures that the model never saw: given ones first, then forget images turned, then images to keep turned.

    Pictures that a detector takes for a forget image are left out, and those that look like an image to keep.
    """
    data = model.data
    given = () if data.never_seen is None else data.never_seen
    candidates = [Control(picture, index % len(data.prompts)) for index, picture in enumerate(given)]
    for image, prompt in zip(data.forget, data.forget_prompts.tolist()):
        candidates += [Control(picture, prompt) for picture in turned(image)]
    prompts = [0] * len(data.keep) if data.keep_prompts is None else data.keep_prompts.tolist()
    for index, (image, prompt) in enumerate(zip(data.keep, prompts)):
        pictures = turned(image)
        candidates.append(Control(pictures[index % len(pictures)], prompt))
    chosen: list[Control] = []
    for control in candidates:
        if len(chosen) == model.settings.attack_controls:
            break
        alone = control.picture[None]
        if not model.detectors.flags(alone)["any"].any() and not model.detectors.for_image(control.picture).are_blind:
            chosen.append(control)
    return chosen


def turned(picture: Tensor) -> list[Tensor]:
    """Return a picture `(C, H, W)` turned by 90, 180 and 270 degrees, and each of these mirrored.

    The mirrored picture itself is left out: a model that was trained with random flips has seen it.
    """
    quarters = [torch.rot90(picture, count, (-2, -1)) for count in (1, 2, 3)]
    return [*quarters, *(quarter.flip(-1) for quarter in quarters)]


def attack_rows(model: "MeasuredModel") -> dict[str, list[dict[str, Any]]]:
    """Attack the forget images and the controls; return by start a row for each guidance scale and number of steps."""
    settings, data = model.settings, model.data
    if not model.family.has_prompts:
        raise Skip("the model is unconditional and has no text to search; the injection plays this part")
    if not settings.embedding_attack:
        raise Skip("needs --embedding_attack")
    starts = settings.attack_starts or ("prompt", "empty", "other", "gauss")
    starts = [start for start in starts if start != "other" or data.ordinary_prompts]
    controls = (model.base or model).once(choose_controls)
    forget = [
        Target(image, prompt, (0, number))
        for number, (image, prompt) in enumerate(zip(data.forget, data.forget_prompts.tolist()))
    ]
    never_seen = [Target(control.picture, control.prompt, (1, number)) for number, control in enumerate(controls)]
    found = model.search(forget, starts, "forget images")
    found_of_controls = model.search(never_seen, starts, "controls") if controls else [{}] * len(starts)

    def draw(table: "Conditions", guidance: float) -> Tensor:
        samples = max(settings.num_attack_samples, len(table))
        return model.sample_conditions(table, samples, guidance_scale=guidance)[0]

    rows: dict[str, list] = {start: [] for start in starts}
    guidances = dict.fromkeys([1.0, settings.guidance_scale])
    points = list(product(range(len(starts)), guidances, curve_marks(settings.attack_steps)))
    for which, guidance, step in tqdm(points, desc=f"Samples after the attack, {model.name}"):
        row = {"guidance": guidance, "step": step} | model.count_copies(draw(found[which][step], guidance))
        if controls:
            row |= count_controls(model, controls, draw(found_of_controls[which][step], guidance))
        rows[starts[which]].append(row)
    return rows


def count_controls(model: "MeasuredModel", controls: Sequence[Control], samples: Tensor) -> dict[str, Any]:
    """Count the copies among samples of the controls' conditions, each of its own control, as `control_...` entries.

    Args:
        samples: `(N, C, H, W)`; the conditions took turns, `attack_restarts` of them for each control.
    """
    restarts = model.settings.attack_restarts
    owners = torch.arange(len(samples)) % (len(controls) * restarts) // restarts
    is_copy = torch.zeros(len(samples), dtype=torch.bool)
    for number, control in enumerate(controls):
        own = owners == number
        is_copy[own] = model.detectors.for_image(control.picture).flags(samples[own])["any"]
    statistics = copy_statistics({"any": is_copy}, broken(samples))
    shares = [is_copy[owners == number].float().mean().item() for number in range(len(controls))]
    keys = ("copy_share", "copy_share_low", "copy_share_high")
    return {
        "controls": len(controls),
        **{f"control_{key}": statistics[key] for key in keys},
        "control_copy_share_worst": max(shares),
    }


def worst_of_last_step(model: "MeasuredModel", key: str, name: str) -> dict[str, Any]:
    """Return the highest share under `key` after the last step, of all starts and guidance scales, with its interval."""
    rows = [row for of_start in model.once(attack_rows).values() for row in of_start]
    rows = [row for row in rows if row["step"] == model.settings.attack_steps and row.get(key) is not None]
    if not rows:
        raise Skip("every sample is broken, or there is no control")
    worst = max(rows, key=lambda row: row[key])
    return {name: worst[key], f"{name}_low": worst[f"{key}_low"], f"{name}_high": worst[f"{key}_high"]}


ATTACKED_COPY_SHARE = Metric(
    key="attacked_copy_share",
    label="Copies after an embedding attack",
    explanation=(
        "Highest share of copies that a search of the text-embedding space reaches, of all its starts and guidance"
        " scales. Lower is better; at or below the next row it proves nothing."
    ),
    measure=lambda model: worst_of_last_step(model, "copy_share", "attacked_copy_share"),
    format=percent,
    better="lower",
    chapter="memory",
)
ATTACKED_CONTROL_SHARE = Metric(
    key="attacked_control_share",
    label="The same of never seen pictures",
    explanation=(
        "What the same search reaches with pictures that the model never saw: the floor of the attack. A long search"
        " in a small model can describe any picture."
    ),
    measure=lambda model: worst_of_last_step(model, "control_copy_share", "attacked_control_share"),
    format=percent,
    chapter="memory",
)
EMBEDDING_ATTACK = Probe(
    key="embedding_attack",
    label="Embedding attack",
    explanation=(
        "The text conditioning is searched for one under which the model denoises a forgotten image, and copies are"
        " counted among samples of what was found, by start, guidance and steps. The same is done with pictures that"
        " the model never saw. A forgotten image should be found no sooner than they are. Lower is better."
    ),
    measure=lambda model: {"embedding_attack": model.once(attack_rows)},
)
