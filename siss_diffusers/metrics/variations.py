"""Copies under variations of the memorized prompts: other wordings, and noise on the embedding."""

from typing import TYPE_CHECKING, Any

from siss_diffusers.metrics.base import NO_PROMPTS, Probe, Skip


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


def _paraphrases(model: "MeasuredModel") -> dict[str, Any]:
    settings = model.settings
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    if not settings.paraphrases:
        raise Skip("needs --paraphrases_file")
    rows = []
    for number, paraphrase in enumerate(settings.paraphrases):
        samples, _ = model.sample([paraphrase], settings.num_relearning_samples)
        rows.append({"prompt_number": number} | model.count_copies(samples))
    return {"paraphrases": rows}


def _prompt_noise(model: "MeasuredModel") -> dict[str, Any]:
    settings = model.settings
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    if not settings.prompt_noise:
        raise Skip("needs --prompt_noise")
    rows = []
    for noise in settings.prompt_noise:
        samples, _ = model.sample(model.data.prompts, settings.num_relearning_samples, noise=noise)
        rows.append({"noise": noise} | model.count_copies(samples))
    return {"prompt_noise": rows}


PARAPHRASES = Probe(
    key="paraphrases",
    label="Other wordings of the prompt",
    explanation=(
        "Share of copies under other wordings of the memorized prompt, which are numbered, not shown. Lower is better."
    ),
    measure=_paraphrases,
)
PROMPT_NOISE = Probe(
    key="prompt_noise",
    label="Noise on the prompt",
    explanation=("Share of copies with noise on the prompt's embedding, in its standard deviations. Lower is better."),
    measure=_prompt_noise,
)
