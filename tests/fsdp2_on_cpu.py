"""`python fsdp2_on_cpu.py SCRIPT FLAGS ...`: a training script under FSDP 2 on CPU processes.

torch shards on CPUs, but accelerate enters FSDP only where it finds an accelerator. So its state is set up here as it
would be there; the script, accelerate's `prepare` and torch's `fully_shard` are the real ones.
"""

import importlib
import os
import sys
from functools import partial

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin

from siss_diffusers.errors import run


def enter_fsdp2() -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    state = AcceleratorState(
        mixed_precision=precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    # What else the configuration of the launcher says comes in by the environment.
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if precision != "no":
        state.fsdp_plugin.set_mixed_precision(precision)


if __name__ == "__main__":
    script, *argv = sys.argv[1:]
    sys.argv = [script + ".py"]
    enter_fsdp2()
    run(partial(importlib.import_module(script).main, argv), script)
