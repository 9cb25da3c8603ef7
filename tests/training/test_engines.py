"""The scripts under DDP, FSDP 2 and DeepSpeed, as real processes: every engine takes the step that one process takes."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from siss_diffusers.storage.files import read_json
from tests.helpers.commands import to_argv
from tests.helpers.forked import run_group, start_group
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same_gradients, read_log
from tests.helpers.tiny_problem import relative_error


ON_CPU = str(ROOT / "tests" / "helpers" / "engine_on_cpu.py")
EXAMPLES = ROOT / "examples" / "accelerate"
UNCONDITIONAL, SD = "train_siss_unconditional", "train_siss_sd"
# At a learning rate of 0 every step has the same weights, and at beta1 0 AdamW's first moment is the gradient that it
# was given: what the engine made, after clipping, to the bit.
SHOW_GRADIENTS = {
    "--learning_rate": "0",
    "--adam_beta1": "0",
    "--max_train_steps": "3",
    "--checkpointing_steps": "1",
}
# The script, flags beside those above, and pairs of a micro-batch. A step has four micro-batches however many processes
# share them, so that networks see the same batches: convolutions round differently in batches of another size, by up to
# 4e-6 of the gradient. 20 and 27 images to keep: no pass over them is a whole number of steps.
CASES = {
    "unconditional": (UNCONDITIONAL, {"--calibrate_forgetting": None}, 2),
    "unconditional, EMA, checkpointing": (
        UNCONDITIONAL,
        {"--use_ema": None, "--gradient_checkpointing": None, "--forget_scaling": "norm", "--forget_scale": "5"},
        2,
    ),
    "unconditional, one-sided ranks": (UNCONDITIONAL, {"--method": "subscore_bernoulli"}, 1),
    "full": (SD, {"--calibrate_forgetting": "0.75", "--use_ema": None}, 2),
    "full, fixed": (SD, {"--forget_scaling": "fixed"}, 2),
    "LoRA": (SD, {"--use_lora": None, "--calibrate_forgetting": "0.75", "--gradient_checkpointing": None}, 2),
    "LoRA, one-sided ranks": (SD, {"--use_lora": None, "--method": "subscore_bernoulli"}, 1),
    "unconditional, redirect": (UNCONDITIONAL, {"--method": "redirect", "--calibrate_forgetting": "0.75"}, 2),
    "LoRA, redirect": (SD, {"--use_lora": None, "--method": "redirect"}, 2),
    "LoRA, keep target of the base": (
        SD,
        {"--use_lora": None, "--method": "redirect", "--keep_target": "base"},
        2,
    ),
    "LoRA, two network calls": (SD, {"--use_lora": None, "--method": "siss_no_is", "--forget_scaling": "nash"}, 2),
}
QUICK = ("unconditional", "LoRA", "LoRA, redirect", "LoRA, one-sided ranks")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
FSDP2 |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def args_of(base_args, full_args):
    return {UNCONDITIONAL: base_args, SD: full_args}


def run_case(forker, args_of, case, engine, num_processes, output_dir, precision="no", **flags):
    """Run a case on an engine, its four micro-batches split over the processes."""
    script, more, pairs = CASES[case]
    split = {"--train_batch_size": str(pairs), "--gradient_accumulation_steps": str(4 // num_processes)}
    argv = to_argv(args_of[script] | SHOW_GRADIENTS | split | {"--output_dir": str(output_dir)} | more | flags)
    environment = {"ACCELERATE_MIXED_PRECISION": precision}
    if engine == "ddp":
        return run_group(forker, num_processes, script, argv, **environment)
    return run_group(forker, num_processes, "python", [ON_CPU, "fsdp2", script, *argv], **FSDP2, **environment)


def gradients_of(output_dir: Path) -> list[torch.Tensor]:
    """The combined gradient of each step."""
    found = []
    for step in (1, 2, 3):
        state = load_file(output_dir / f"checkpoint-{step}" / "state.safetensors")
        moments = {name: value.flatten() for name, value in state.items() if name.endswith("/exp_avg")}
        found.append(torch.cat([moments[name] for name in sorted(moments)]))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gradients of each case in one process, run when first asked for."""
    known = {}

    def find(forker, args_of, case):
        if case not in known:
            folder = tmp_path_factory.mktemp("alone")
            run_case(forker, args_of, case, "ddp", 1, folder)
            known[case] = gradients_of(folder)
        return known[case]

    return find


RUNS = [
    # Measuring thresholds takes long under FSDP 2, for every forward waits for the other processes.
    pytest.param(
        *(case, engine, num_processes),
        marks=[]
        if case in QUICK and num_processes == 2 and not (engine == "fsdp2" and calibrated)
        else [pytest.mark.slow],
    )
    for case, calibrated in ((case, "--calibrate_forgetting" in CASES[case][1]) for case in CASES)
    for engine in ("ddp", "fsdp2")
    for num_processes in (2, 4)
]


@pytest.mark.parametrize(("case", "engine", "num_processes"), RUNS)
def test_combined_gradients_equal_those_of_one_process(case, engine, num_processes, forker, args_of, alone, tmp_path):
    run_case(forker, args_of, case, engine, num_processes, tmp_path / "out")
    found, expected = gradients_of(tmp_path / "out"), alone(forker, args_of, case)
    errors = [relative_error(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
    # Under FSDP 2 rows of both sides run in two batches, not in one of their own, and so are rounded differently; what
    # the engine itself does is held to 1e-6 in test_sharded.py.
    assert max(errors) < (1e-6 if engine == "ddp" else 4e-6)
    assert all(gradient.norm() > 0 for gradient in expected)
    assert not expected[0].equal(expected[1])
    report = read_json(tmp_path / "out" / "unlearning.json")
    assert report["num_processes"] == num_processes and report["one_sided_steps"] == 0


SHARDED_RUNS = {
    "unconditional": (UNCONDITIONAL, {"--calibrate_forgetting": None, "--use_ema": None}),
    "full": (SD, {"--use_ema": None, "--lr_scheduler": "cosine"}),
    "LoRA": (SD, {"--use_lora": None}),
}
RESULTS = {"unconditional": "unet/diffusion_pytorch_model.safetensors", "LoRA": "pytorch_lora_weights.safetensors"}
RESULTS["full"] = RESULTS["unconditional"]


@pytest.mark.slow
def test_fsdp2_sums_gradients_of_bf16_in_float32(forker, args_of, tmp_path):
    """Each process's gradient is of bf16 numbers; their sum is not, unless it was rounded. Everything that it is multiplied
    by is a power of two here: 4x8x8 pixels, 2 processes, 4 pairs, no clipping."""
    flags = {"--train_batch_size": "2", "--gradient_accumulation_steps": "1", "--max_grad_norm": "1e9"}
    run_case(forker, args_of, "full, fixed", "fsdp2", 2, tmp_path, precision="bf16", **flags)
    gradient = gradients_of(tmp_path)[0]
    assert (gradient != gradient.bfloat16().float()).float().mean() > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "unconditional", "full"])
def test_fsdp2_saves_what_diffusers_loads_and_resumes_bit_for_bit(kind, forker, args_of, pipeline_folder, tmp_path):
    script, more = SHARDED_RUNS[kind]
    flags = args_of[script] | {"--max_train_steps": "4", "--checkpointing_steps": "2", "--train_batch_size": "2"}
    flags |= {"--learning_rate": "1e-3", "--validation_steps": "3", "--num_validation_images": "2"} | more
    flags |= {"--num_inference_steps": "2"} if script == SD else {"--ddpm_num_inference_steps": "2"}

    def run(output_dir, num_processes=2, sharded=True, **changes):
        argv = to_argv(flags | {"--output_dir": str(output_dir)} | changes)
        if sharded:
            argv = [ON_CPU, "fsdp2", script, *argv]
        return run_group(forker, num_processes, "python" if sharded else script, argv, **(FSDP2 if sharded else {}))

    run(tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    # Weights of the later steps must not help.
    (resumed / RESULTS[kind]).unlink()
    children = run(resumed, **{"--resume_from_checkpoint": "latest"})
    assert "Resuming from checkpoint-2" in children[0].output
    for file in (RESULTS[kind], "checkpoint-4/state.safetensors"):
        expected = load_file(tmp_path / "whole" / file)
        assert {name: value.tolist() for name, value in load_file(resumed / file).items()} == {
            name: value.tolist() for name, value in expected.items()
        }, file

    # The files do not tell by which engine they were written, and another one goes on from them.
    run(tmp_path / "one", num_processes=1, sharded=False, **{"--train_batch_size": "4"})
    ours, theirs = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} for name in ("whole", "one")
    )
    assert ours == theirs
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "whole" / name).exists() == (kind != "LoRA")
        if kind != "LoRA":
            assert read_json(tmp_path / "whole" / name) == read_json(tmp_path / "one" / name), name
    mine, others = (load_file(tmp_path / name / "checkpoint-2/state.safetensors") for name in ("whole", "one"))
    assert {name: value.shape for name, value in mine.items()} == {n: v.shape for n, v in others.items()}
    moments = [name for name in mine if name.endswith("/exp_avg_sq")]
    assert (
        relative_error(
            torch.cat([mine[name].flatten() for name in moments]),
            torch.cat([others[name].flatten() for name in moments]),
        )
        < 1e-4
    )
    # Steps after the validation at step 3 too, which leaves weights gathered that the next step must not use.
    assert_same_gradients(read_log(tmp_path / "whole"), read_log(tmp_path / "one"))
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / RESULTS[kind]).unlink()
    run(resumed, num_processes=1, sharded=False, **{"--train_batch_size": "4", "--resume_from_checkpoint": "latest"})
    assert (resumed / "checkpoint-4").exists()

    if kind == "unconditional":
        DDPMPipeline.from_pretrained(tmp_path / "whole")
    elif kind == "full":
        StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    else:
        StableDiffusionPipeline.from_pretrained(pipeline_folder).load_lora_weights(tmp_path / "whole")
    validations = [(tmp_path / name / "validation_log.jsonl").read_text().splitlines() for name in ("whole", "one")]
    assert [json.loads(line)["step"] for line in validations[0]] == [3] and len(validations[1]) == 1


@needs_deepspeed
@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("case", ["unconditional", "LoRA", "full, fixed"])
def test_deepspeed_takes_the_step_of_one_process(case, stage, forker, args_of, tmp_path):
    """DeepSpeed writes no checkpoint of ours, so weights are compared: after one step of AdamW at an epsilon that makes
    it proportional to the gradient."""
    script, more, pairs = CASES[case]
    flags = {"--max_train_steps": "1", "--learning_rate": "1e2", "--adam_epsilon": "1e3", "--adam_weight_decay": "0"}
    flags |= {name: value for name, value in more.items() if name not in ("--use_ema", "--gradient_checkpointing")}
    flags |= {"--gradient_accumulation_steps": "2"}
    environment = {"DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    weights = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        split = {"--train_batch_size": str(4 // num_processes), "--output_dir": str(out)}
        argv = to_argv(args_of[script] | flags | split)
        if num_processes == 1:
            run_group(forker, 1, script, argv)
        else:
            run_group(forker, 2, "python", [ON_CPU, "deepspeed", script, *argv], **environment)
        weights.append(load_file(out / RESULTS["LoRA" if case == "LoRA" else "full"]))
    start = load_file(Path(args_of[script]["--pretrained_model_name_or_path"]) / RESULTS["full"])
    changed = [
        torch.cat(
            [
                (values[name] - start.get(name, 0)).flatten()
                for name in weights[0]
                if case != "LoRA" or "lora_B" in name
            ]
        )
        for values in weights
    ]
    assert changed[0].norm() > 0
    assert relative_error(changed[1], changed[0]) < 1e-4


@pytest.mark.parametrize(
    ("engine", "environment", "flags", "expected"),
    [
        ("fsdp2", {"FSDP_VERSION": "1"}, {}, "FSDP 1 is not supported; set `fsdp_version: 2`"),
        ("fsdp2", {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "`fsdp_offload_params` is not supported under FSDP 2"),
        ("fsdp2", {}, {"--use_8bit_adam": None}, "--use_8bit_adam is not supported under FSDP 2"),
        pytest.param(
            *("deepspeed", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "ZeRO-3 is not supported under DeepSpeed"),
            marks=needs_deepspeed,
        ),
        pytest.param(
            *("deepspeed", {}, {"--use_ema": None}, "--use_ema is not supported under DeepSpeed; drop it, or use"),
            marks=needs_deepspeed,
        ),
        pytest.param(
            *("deepspeed", {}, {"--resume_from_checkpoint": "latest"}, "--resume_from_checkpoint is not supported"),
            marks=needs_deepspeed,
        ),
    ],
)
def test_what_an_engine_cannot_do_is_one_sentence(engine, environment, flags, expected, forker, base_args, tmp_path):
    argv = [ON_CPU, engine, UNCONDITIONAL, *to_argv(base_args | flags)]
    (child,) = start_group(forker, 1, "python", argv, **(FSDP2 | {"DS_ACCELERATOR": "cpu"} | environment))
    assert forker.wait(child, timeout=120) == 2
    sentences = [line for line in child.output.splitlines() if "error: " in line]
    assert len(sentences) == 1 and f"error: {expected}" in sentences[0], child.output
    assert "Traceback" not in child.output and not (tmp_path / "out").exists()


def test_fsdp2_cannot_search_conditions(forker, full_args, tmp_path):
    argv = [ON_CPU, "fsdp2", SD, *to_argv(full_args | {"--forget_conditions": "prompt:0.5,adversarial:0.5"})]
    (child,) = start_group(forker, 1, "python", argv, **FSDP2)
    assert forker.wait(child, timeout=120) == 2
    assert "error: a share of `adversarial` in --forget_conditions is not supported under FSDP 2" in child.output
    assert not (tmp_path / "out").exists()


def environment_of(config: Path) -> tuple[int, dict[str, str]]:
    """Processes, and what `accelerate launch --config_file` would tell them."""
    load_config_from_file(str(config))  # which refuses keys that it does not know
    args = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    args, _, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.num_processes > 1:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
    told = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return args.num_processes, told


CONFIGURATIONS = {
    "one_gpu": (1, None),
    "ddp": (2, None),
    "fsdp2": (2, "fsdp2"),
    "zero2": (2, "deepspeed"),
    "cpu": (1, None),
}


def test_there_is_a_test_of_every_configuration():
    assert {path.stem for path in EXAMPLES.iterdir()} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("script", [UNCONDITIONAL, pytest.param(SD, marks=pytest.mark.slow)])
def test_the_example_configurations_run(script, name, forker, args_of, tmp_path):
    """With all that the launcher would say, but on the CPU."""
    expected_processes, engine = CONFIGURATIONS[name]
    if engine == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    num_processes, environment = environment_of(EXAMPLES / f"{name}.yaml")
    assert num_processes == expected_processes
    environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    if engine == "deepspeed":
        environment["ACCELERATE_USE_DEEPSPEED"] = "false"  # which the test's own entrance answers for
    argv = to_argv(args_of[script] | ({"--use_lora": None} if script == SD else {}))
    if engine is not None:
        argv = [ON_CPU, engine, script, *argv]
    run_group(forker, num_processes, script if engine is None else "python", argv, **environment)
    report = read_json(tmp_path / "out" / "unlearning.json")
    assert report["global_step"] == 2 and report["skipped_steps"] == 0
    assert report["settings"]["mixed_precision"] == ("no" if name == "cpu" else "bf16")
    assert (tmp_path / "out" / RESULTS["LoRA" if script == SD else "full"]).exists()
