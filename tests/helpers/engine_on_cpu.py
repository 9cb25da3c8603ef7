"""`python engine_on_cpu.py {fsdp2,deepspeed} SCRIPT FLAGS ...`: a training script under one of these on CPU processes.

Both shard on CPUs, but accelerate enters them only where it finds an accelerator. So its state is set up here as it would
be there; the script, accelerate's `prepare`, torch's `fully_shard` and DeepSpeed's engine are the real ones.
"""

import importlib
import os
import sys
from functools import partial

from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin

from siss_diffusers.process import run


def enter(engine: str) -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    state = AcceleratorState(
        mixed_precision=precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    distributed_type = {"fsdp2": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}[engine]
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = distributed_type
    # What else the configuration of the launcher says comes in by the environment.
    if engine == "fsdp2":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if precision != "no":
            state.fsdp_plugin.set_mixed_precision(precision)
    else:
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(precision)
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": plugin}


if __name__ == "__main__":
    engine, script, *argv = sys.argv[1:]
    sys.argv = [script + ".py"]
    enter(engine)
    run(partial(importlib.import_module(script).main, argv), script)
