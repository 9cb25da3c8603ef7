"""Figures about a model before and after. A metric is one file here and one line in `METRICS` or `PROBES`.

The order is that of tables.
"""

from siss_diffusers.metrics import (
    accuracy,
    broken,
    clip,
    copies,
    distribution,
    drift,
    embedding_attack,
    features,
    inception_score,
    injection,
    likelihood,
    memorized_bits,
    noise_norm,
    relearning,
    sharpness,
    variations,
)
from siss_diffusers.metrics.base import Entry, Metric, Probe, Skip


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        copies.SAMPLES,
        broken.BROKEN_SHARE,
        copies.COPY_SHARE,
        copies.OTHERS,
        copies.OTHERS_DISTANCE_TO_KEEP,
        sharpness.OTHERS_SHARPNESS,
        drift.DRIFT,
        copies.ORDINARY_COPY_SHARE,
        broken.ORDINARY_BROKEN_SHARE,
        accuracy.CLASSIFIER_ACCURACY,
        inception_score.INCEPTION_SCORE,
        distribution.FID,
        distribution.KID,
        distribution.PRECISION,
        distribution.RECALL,
        distribution.DENSITY,
        distribution.COVERAGE,
        likelihood.NLL_FORGET_BPD,
        likelihood.NLL_KEEP_BPD,
        memorized_bits.MEMORIZED_BITS,
        embedding_attack.ATTACKED_COPY_SHARE,
        embedding_attack.ATTACKED_CONTROL_SHARE,
        features.SSCD_FORGET,
        clip.CLIP_IQA,
        clip.CLIP_SCORE,
        noise_norm.TEXT_NOISE_NORM,
    )
}

PROBES: dict[str, Probe] = {
    probe.key: probe
    for probe in (
        injection.INJECTION,
        variations.PARAPHRASES,
        variations.PROMPT_NOISE,
        embedding_attack.EMBEDDING_ATTACK,
        memorized_bits.MEMORIZED_BITS_BY_CONDITION,
        relearning.RELEARNING,
    )
}

__all__ = ["METRICS", "PROBES", "Entry", "Metric", "Probe", "Skip"]
