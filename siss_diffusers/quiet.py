"""Keeps libraries quiet while a program of this project runs. As a library, the package leaves all logging alone."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


# bitsandbytes looks for an optional kernel when it is imported, on CPUs that support it, and warns when it has none.
# Nothing here runs that kernel.
BITSANDBYTES_LOGGER = "bitsandbytes.backends.cpu.ops"
MISSING_KERNEL = "Failed to load CPU gemm_4bit_forward"


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MISSING_KERNEL)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop the warning of bitsandbytes about its optional kernel, and nothing else, until exit."""
    logger = logging.getLogger(BITSANDBYTES_LOGGER)
    logger.addFilter(_is_worth_saying)
    try:
        yield
    finally:
        logger.removeFilter(_is_worth_saying)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide what diffusers and transformers show while they load a model: their warnings, and a progress bar for each
    component. Progress bars of downloads stay. Everything is as before on exit."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    before = [
        (library, library.get_verbosity(), library.is_progress_bar_enabled())
        for library in (diffusers_logging, transformers_logging)
    ]
    shows_downloads = not are_progress_bars_disabled()
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    if shows_downloads:
        enable_progress_bars()  # transformers has disabled those as well
    try:
        with warnings.catch_warnings():
            # diffusers passes it for every model on the Hub, and huggingface_hub warns that it has no effect.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
            yield
    finally:
        for library, verbosity, shows_progress in before:
            library.set_verbosity(verbosity)
            if shows_progress:
                library.enable_progress_bar()
