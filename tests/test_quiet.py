import logging

import pytest
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from siss_diffusers.process import run
from siss_diffusers.quiet import BITSANDBYTES_LOGGER, MISSING_KERNEL, quiet_loading


def test_a_program_drops_the_warning_about_the_kernel_and_nothing_else(caplog):
    logger = logging.getLogger(BITSANDBYTES_LOGGER)

    def main() -> None:
        logger.warning(f"{MISSING_KERNEL} from kernels-community: %s", "inside")
        logger.warning("another warning")

    try:
        run(main, "program")
    except SystemExit as end:
        assert end.code == 0
    logger.warning(f"{MISSING_KERNEL} from kernels-community: %s", "outside")
    assert [record.getMessage() for record in caplog.records] == [
        "another warning",
        f"{MISSING_KERNEL} from kernels-community: outside",
    ]


def test_loading_is_quiet_inside_and_as_before_outside():
    libraries = (diffusers_logging, transformers_logging)
    enable_progress_bars()  # a script that another test called has disabled them
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with quiet_loading():
        for library in libraries:
            assert library.get_verbosity() == logging.ERROR and not library.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()  # of downloads
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before
    assert not are_progress_bars_disabled()


def test_the_configuration_of_a_model_on_the_hub_is_read_without_a_warning(recwarn):
    with quiet_loading(), pytest.raises(OSError):
        DiffusionPipeline.load_config("nobody/no-such-model", local_files_only=True)
    assert not [warning for warning in recwarn.list if "local_dir_use_symlinks" in str(warning.message)]
