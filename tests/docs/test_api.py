"""The table of settings in docs/api.md is made from the fields of the settings."""

from dataclasses import Field, fields

from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings, flag_name
from tests.helpers.paths import ROOT


KINDS = {
    "text-to-image": {field.name: field for field in fields(TextToImageSettings)},
    "unconditional": {field.name: field for field in fields(UnconditionalSettings)},
}
# Where the model and the data come from. In Python these are objects.
OF_THE_SCRIPTS = (
    "pretrained_model_name_or_path revision variant non_ema_revision dataset_name dataset_config_name train_data_dir"
    " image_column forget_data_dir forget_files"
).split()


def by_kind(values: dict[str, str], separator: str) -> str:
    """Return the value that all kinds share, or each value with the kind that has it."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return separator.join(f"{kind}: {value}" for kind, value in values.items())


def setting_row(name: str, kinds: dict[str, Field]) -> str:
    flags = {flag for flag in map(flag_name, kinds.values()) if flag != name}
    shown = f"`{name}`" + "".join(f" (`--{flag}`)" for flag in sorted(flags))
    default = by_kind({kind: f"`{field.default!r}`" for kind, field in kinds.items()}, ", ")
    meaning = by_kind({kind: field.metadata["help"] for kind, field in kinds.items()}, " ").replace("|", r"\|")
    models = "all" if len(kinds) == len(KINDS) else " ".join(kinds)
    return f"| {shown} | {default} | {models} | {meaning} |"


def settings_table() -> str:
    """Return the table of all settings that `unlearn` takes: those of all models, then those of some."""
    names = dict.fromkeys(name for known in KINDS.values() for name in known if name not in OF_THE_SCRIPTS)
    rows = ["| setting | default | models | meaning |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda name: any(name not in known for known in KINDS.values())):
        rows.append(setting_row(name, {kind: known[name] for kind, known in KINDS.items() if name in known}))
    return "\n".join(rows)


def test_the_table_of_settings_is_that_of_the_fields():
    page = (ROOT / "docs" / "api.md").read_text()
    written = page.split("<!-- begin settings -->\n")[1].split("\n<!-- end settings -->")[0]
    expected = settings_table()
    assert written == expected, f"replace the table in docs/api.md by\n\n{expected}"
