"""What a check must show on an H100, read from its results."""

from typing import Any


# Figure, bar, and whether the figure has to stay below it.
BARS = {
    "redirect against plain, SD 1.5": (1.02, "at most"),
    "siss against plain, SD 1.5": (1.05, "at most"),
    "share of the matrix rate, SD 1.5, redirect by LoRA": (0.4, "at least"),
    "seconds of training, 35 steps of 16 images": (10.0, "at most"),
}


def read_bars(parts: dict[str, dict]) -> list[dict[str, Any]]:
    """Return each bar with the figure that was measured, None where there is none, and whether it is met."""
    steps = {result["name"]: result for result in parts.get("c steps", {}).get("results", [])}
    runs = {result["name"]: result for result in parts.get("d whole run", {}).get("results", [])}
    figures = {
        "redirect against plain, SD 1.5": steps.get("sd15, redirect", {}).get("ratio_to_plain"),
        "siss against plain, SD 1.5": steps.get("sd15, siss", {}).get("ratio_to_plain"),
        "share of the matrix rate, SD 1.5, redirect by LoRA": steps.get("sd15, redirect_lora", {}).get(
            "share_of_matrix_rate"
        ),
        "seconds of training, 35 steps of 16 images": runs.get("cached", {}).get("training_seconds"),
    }
    entries = []
    for name, (bar, side) in BARS.items():
        figure = figures[name]
        met = None if figure is None else (figure <= bar if side == "at most" else figure >= bar)
        entries.append({"name": name, "figure": figure, "bar": f"{side} {bar:g}", "met": met})
    return entries
