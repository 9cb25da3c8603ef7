"""What a run is told: settings with their flags, checks, help, resume rules, and what of them may be published."""

from siss_diffusers.settings.checks import resolve
from siss_diffusers.settings.fields import flag_name
from siss_diffusers.settings.kinds import TextToImageSettings, UnconditionalSettings
from siss_diffusers.settings.shared import AdapterSettings, Settings


__all__ = [
    "AdapterSettings",
    "Settings",
    "TextToImageSettings",
    "UnconditionalSettings",
    "flag_name",
    "resolve",
]
