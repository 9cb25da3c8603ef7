"""The table for a terminal."""

from siss_diffusers.evaluation import format_summary


def content() -> dict:
    base = {"samples": 8, "copy_share": 0.5, "copy_share_low": 0.2152, "copy_share_high": 0.7848, "fid": None}
    return {"base": base, "a_model_of_a_long_name": base | {"copy_share": 0.0, "drift": 0.25}, "settings": {}}


def test_a_row_for_each_metric_that_was_measured():
    lines = format_summary(content()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["base", "a_model_of_a_long_name"]
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["Copies"][-4:] == ["50.0", "%", "0.0", "%"]
    assert rows["Drift of ordinary samples"][-2:] == ["-", "0.2500"]
    assert "FID" not in rows and "settings" not in format_summary(content())


def test_the_interval_of_copies_is_never_narrower_than_it_is():
    assert "21.5 to 78.5" in format_summary(content())


def test_a_model_without_an_interval():
    assert "-" in format_summary(
        {"base": {"copy_share": None}, "other": {"copy_share": 0.1, "copy_share_low": 0.0, "copy_share_high": 0.3}}
    )


def test_an_attack_has_its_interval_too():
    attack = {"attacked_copy_share": 0.25, "attacked_copy_share_low": 0.1, "attacked_copy_share_high": 0.47}
    lines = format_summary({"base": attack, "other": {"attacked_copy_share": None}}).splitlines()
    assert "25.0 %" in lines[1] and "10.0 to 47.0" in lines[2] and lines[2].endswith("-")
