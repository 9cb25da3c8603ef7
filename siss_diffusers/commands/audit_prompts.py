"""The prompts that `siss audit` measures: from the command line, from lists, from a data set; what is known of them."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from siss_diffusers.commands.common import LIST_FORMATS, announce, announce_rows_without_prompt, count_of, read_prompts
from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import path, positive_int


@dataclass(frozen=True)
class AuditedPrompts:
    """What is audited.

    Args:
        prompts: to audit.
        ordinary: prompts that are not memorized, for comparison: those given as such and those labelled so.
        memorized: whether a prompt is, where it is labelled.
        references: the images that a prompt is said to reproduce.
    """

    prompts: list[str]
    ordinary: list[str]
    memorized: dict[str, bool] = field(default_factory=dict)
    references: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        """Every prompt once: one that is audited and ordinary is measured once, reaches its own value, and is never
        flagged."""
        return list(dict.fromkeys([*self.prompts, *self.ordinary]))


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which prompts are audited."""
    parser.add_argument("--prompts", nargs="+", help="The prompts to audit.")
    parser.add_argument("--prompts_file", type=path, help=f"A list of prompts: {LIST_FORMATS}.")
    parser.add_argument(
        "--prompt_column", help="Column of prompts in the lists; default: that called text, caption or prompt."
    )
    parser.add_argument(
        "--label_column",
        help="Column of --prompts_file that says whether a prompt is memorized; it is not where the cell is empty, 0,"
        " false, no or none. Prompts that are not memorized count as ordinary, and the audit says how well each measure"
        " tells the two apart.",
    )
    parser.add_argument(
        "--reference_column",
        help="Column of --prompts_file with the image that a prompt is said to reproduce, a path relative to the list."
        " The best match is then found among these instead of --train_data_dir.",
    )
    parser.add_argument(
        "--dataset_name", type=path, help="A data set whose captions are audited: a folder, or a name on the Hub."
    )
    parser.add_argument("--caption_column", default="text", help="Its column of captions; default: %(default)s.")
    parser.add_argument("--max_prompts", type=positive_int, help="Audit the first so many prompts only.")
    parser.add_argument("--ordinary_prompts", nargs="+", help="Prompts that are certainly not memorized.")
    parser.add_argument(
        "--ordinary_prompts_file",
        type=path,
        help=f"A list of such prompts: {LIST_FORMATS}. A prompt is flagged if it exceeds all of them in a measure. Of"
        " ordinary prompts, each measure flags 1 in (their number + 1).",
    )


def gather_prompts(args: argparse.Namespace) -> AuditedPrompts:
    """Return the prompts to audit, and the ordinary ones.

    Raises:
        UsageError: if there is no prompt to audit, or a file or data set cannot be read.
    """
    from siss_diffusers.data.prompt_lists import PromptList, read_prompt_list

    columns = {"--label_column": args.label_column, "--reference_column": args.reference_column}
    for flag, column in columns.items():
        if column is not None and args.prompts_file is None:
            raise UsageError(f"{flag} names a column of --prompts_file; give that file, or drop the flag")
    if args.reference_column is not None and args.train_data_dir is not None:
        raise UsageError(
            "--reference_column and --train_data_dir both say where to look for a match; give one of them"
        )
    listed = PromptList([])
    if args.prompts_file is not None:
        listed = read_prompt_list("--prompts_file", args.prompts_file, args.prompt_column, *columns.values())
        announce_rows_without_prompt("--prompts_file", listed)
    captions = []
    if args.dataset_name is not None:
        captions = read_captions(args.dataset_name, args.caption_column, args.cache_dir)
    prompts = list(dict.fromkeys([*(args.prompts or []), *listed.prompts, *captions]))
    if not prompts:
        raise UsageError("nothing to audit: give --prompts, --prompts_file or --dataset_name")
    prompts = prompts[: args.max_prompts]
    ordinary = read_prompts(
        "--ordinary_prompts", args.ordinary_prompts, args.ordinary_prompts_file, args.prompt_column
    )
    # The rest of a list that is cut by --max_prompts says nothing.
    memorized = {prompt: label for prompt, label in listed.memorized.items() if prompt in set(prompts)}
    ordinary += [prompt for prompt, label in memorized.items() if not label]
    both = [prompt for prompt in ordinary if memorized.get(prompt)]
    if both:
        raise UsageError(
            f"--ordinary_prompts: {count_of(len(both), 'prompt')} of these --label_column calls memorized; take them out"
            " of one of the two"
        )
    return AuditedPrompts(prompts, list(dict.fromkeys(ordinary)), memorized, listed.references)


def read_captions(dataset_name: str, caption_column: str, cache_dir: str | None) -> list[str]:
    """Return the captions of a data set, of several for an image each.

    Raises:
        UsageError: if it cannot be loaded, or has no such column of texts.
    """
    from siss_diffusers.data.captions import every_text_of, texts_of
    from siss_diffusers.data.sources import load_rows

    loaded = load_rows("--dataset_name", dataset_name, cache_dir=cache_dir)
    if loaded.passed_over:
        announce(f"--dataset_name: passed over {loaded.passed_over}")
    captions = every_text_of(loaded.rows, caption_column) if caption_column in loaded.rows.features else []
    if not captions:
        raise UsageError(
            f"--caption_column: {dataset_name} has no column of texts {caption_column!r}, only"
            f" {', '.join(loaded.rows.features)}"
        )
    without = texts_of(loaded.rows, caption_column).null_count
    if without:
        announce(f"--dataset_name: {count_of(without, 'row')} of {len(loaded.rows)} without a caption are not audited")
    return captions
