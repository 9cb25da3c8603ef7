"""What is compared: the flags of `train_siss_unconditional.py` for every method, those published and a sweep.

A setting is a dictionary of flags. Every variant has thirteen: the published one first, then its own knobs. They share
one budget, of rows that the network runs on, so a method that noises both images takes half of the steps.
"""

Setting = dict[str, str]

# The methods that are compared: those for which there are results. A new method may be added, and need not.
COMPARED = (
    "naive_deletion",
    "neggrad",
    "siss",
    "siss_no_is",
    "subscore_bernoulli",
    "erasediff",
    "retrack",
    "redirect",
)

ALL, MOST, HIGH = "0 1000", "200 1000", "300 1000"
SWEEP_SIZE = 13
# Ranges of the forget side alone: at high noise; and at low noise, too.
FORGET_HIGH, HIGH_AND_LOW, WITH_LOWEST = "300 1000", "300 1000 0 300", "300 1000 0 100"


def setting(method: str, rate: float, timesteps: str = ALL, **flags: str | float) -> Setting:
    """`flags` are named as on the command line, without the dashes."""
    found = {"--method": method, "--learning_rate": f"{rate:g}", "--timestep_range": timesteps}
    return found | {f"--{name}": value if isinstance(value, str) else f"{value:g}" for name, value in flags.items()}


def relative(method: str, rate: float, rho: float, timesteps: str = ALL, **flags: str | float) -> Setting:
    return setting(method, rate, timesteps, forget_scaling="relative", forget_scale=rho, **flags)


def norm(method: str, rate: float, scale: float, timesteps: str = ALL, **flags: str | float) -> Setting:
    return setting(method, rate, timesteps, forget_scaling="norm", forget_scale=scale, **flags)


def subtracting(method: str) -> list[Setting]:
    """The paper's own: `scaling_norm` 5, lambda 0.5, rate 5e-5."""
    return [
        norm(method, 5e-5, 5),
        relative(method, 5e-5, 0.1),
        relative(method, 1e-4, 0.1),
        relative(method, 1e-4, 0.3),
        relative(method, 5e-5, 0.3, MOST),
        relative(method, 1e-4, 0.3, MOST),
        relative(method, 1e-4, 0.1, HIGH),
        relative(method, 1e-4, 0.3, HIGH),
        relative(method, 2e-4, 0.1),
        setting(method, 1e-4, forget_scaling="nash"),
        relative(method, 5e-5, 0.2, forget_timestep_ranges=FORGET_HIGH),
        relative(method, 1e-4, 0.2, forget_timestep_ranges=HIGH_AND_LOW),
        relative(method, 1e-4, 0.3, forget_timestep_ranges=HIGH_AND_LOW),
    ]


def calibrated(method: str) -> list[Setting]:
    return [
        *(
            relative(method, rate, rho, timesteps, calibrate_forgetting=quantile)
            for rate, rho, timesteps, quantile in (
                (5e-5, 1, ALL, 0.9),
                (1e-4, 1, ALL, 0.5),
                (1e-4, 1, ALL, 0.75),
                (1e-4, 1, ALL, 0.9),
                (1e-4, 1, ALL, 1),
                (1e-4, 1, HIGH, 0.9),
                (1e-4, 1, HIGH, 1),
                (1e-4, 0.3, ALL, 1),
                (2e-4, 1, ALL, 0.5),
                (2e-4, 1, ALL, 1),
            )
        ),
        *(
            relative(method, rate, rho, calibrate_forgetting=quantile, forget_timestep_ranges=HIGH_AND_LOW)
            for rate, rho, quantile in ((1e-4, 1, 0.9), (1e-4, 1, 1), (1e-4, 0.3, 1))
        ),
    ]


# The defaults of the script: the rate is that for a network 32 channels wide.
REDIRECT = setting("redirect", 8e-5)
SWEEP: dict[str, list[Setting]] = {
    "naive_deletion": [
        *(setting("naive_deletion", rate) for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
        *(setting("naive_deletion", rate, MOST) for rate in (2e-4, 4e-4)),
        *(setting("naive_deletion", rate, HIGH) for rate in (1e-4, 2e-4, 4e-4, 8e-4)),
        *(setting("naive_deletion", rate, "500 1000") for rate in (2e-4, 4e-4)),
    ],
    # Its factor s does not matter under a clipped gradient and Adam; the paper's 0.01 is kept.
    "neggrad": [
        *(setting("neggrad", rate, method_args="scale=0.01") for rate in (5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6, 5e-7)),
        *(setting("neggrad", rate, HIGH, method_args="scale=0.01") for rate in (2e-5, 1e-5, 5e-6, 2e-6, 1e-6, 5e-7)),
    ],
    "siss": subtracting("siss"),
    "siss_no_is": subtracting("siss_no_is"),
    "subscore_bernoulli": subtracting("subscore_bernoulli"),
    "erasediff": [
        *(
            setting("erasediff", rate, timesteps, method_args=f"eta={eta:g}")
            for rate, eta, timesteps in (
                (5e-5, 1e-3, ALL),
                (2e-5, 1e-3, ALL),
                (5e-5, 1e-4, ALL),
                (1e-4, 1e-3, ALL),
                (2e-4, 1e-3, ALL),
                (1e-4, 1e-2, ALL),
                (1e-4, 1e-1, ALL),
                (2e-4, 1e-1, ALL),
                (1e-4, 1e-2, HIGH),
                (2e-4, 1e-2, HIGH),
            )
        ),
        *(
            setting("erasediff", rate, method_args=f"eta={eta:g}", forget_timestep_ranges=FORGET_HIGH)
            for rate, eta in ((5e-5, 1e-3), (1e-4, 1e-3), (5e-5, 1e-2))
        ),
    ],
    "retrack": [
        # Published with 128 pairs a step.
        setting("retrack", 5e-5, method_args="lam=0.005 num_neighbors=10", train_batch_size="128"),
        *(
            setting("retrack", rate, timesteps, method_args=f"lam={lam:g} num_neighbors=10")
            for rate, lam, timesteps in (
                (1e-4, 0.005, ALL),
                (2e-4, 0.005, ALL),
                (1e-4, 0.01, ALL),
                (2e-4, 0.01, ALL),
                (1e-4, 0.05, ALL),
                (2e-4, 0.05, ALL),
                (1e-4, 0.5, ALL),
                (2e-4, 0.5, ALL),
                (2e-4, 0.5, HIGH),
                (5e-5, 0.02, ALL),
                (1e-4, 0.02, ALL),
            )
        ),
        setting("retrack", 1e-4, method_args="lam=0.01 num_neighbors=10", forget_timestep_ranges=FORGET_HIGH),
    ],
    "redirect": [
        REDIRECT,
        *(setting("redirect", rate) for rate in (4e-5, 1.6e-4, 3.2e-4)),
        *(setting("redirect", rate, use_ema="") for rate in (8e-5, 1.6e-4, 3.2e-4)),
        *(setting("redirect", rate, method_args="lam=0.25", use_ema="") for rate in (8e-5, 1.6e-4)),
        setting("redirect", 3.2e-4, lr_scheduler="cosine"),
        setting("redirect", 1.6e-4, threshold_source="strangers", use_ema=""),
        setting("redirect", 1.6e-4, num_redirect_images="9500", use_ema=""),
        setting("redirect", 1.6e-4, forget_timestep_ranges=HIGH_AND_LOW, use_ema=""),
    ],
    "siss, calibrated": calibrated("siss"),
    "siss_no_is, calibrated": calibrated("siss_no_is"),
    "subscore_bernoulli, calibrated": calibrated("subscore_bernoulli"),
    "neggrad, calibrated": [
        setting("neggrad", rate, timesteps, method_args="scale=0.01", calibrate_forgetting=quantile)
        for rate, timesteps, quantile in (
            (5e-5, ALL, 0.9),
            (1e-5, ALL, 0.5),
            (1e-5, ALL, 0.75),
            (1e-5, ALL, 0.9),
            (1e-5, ALL, 1),
            (2e-5, ALL, 0.5),
            (2e-5, ALL, 0.9),
            (2e-5, ALL, 1),
            (1e-5, HIGH, 0.9),
            (2e-5, HIGH, 1),
            (2e-6, HIGH, 0.9),
            (2e-6, HIGH, 1),
            (1e-6, HIGH, 1),
        )
    ],
}

# Two calls of the network for a pair: both images are noised.
TWO_ROWS = ("siss_no_is", "erasediff", "retrack")


def forget_ranges(flags: Setting) -> list[tuple[int, int]]:
    numbers = list(map(int, flags.get("--forget_timestep_ranges", flags["--timestep_range"]).split()))
    return list(zip(numbers[::2], numbers[1::2]))


def describe(flags: Setting) -> str:
    """A setting in a few words, for tables; also its key in the results."""
    words = [f"lr {flags['--learning_rate']}"]
    if "--forget_scaling" in flags:
        words.append(f"{flags['--forget_scaling']} {flags.get('--forget_scale', '')}".strip())
    if "--calibrate_forgetting" in flags:
        words.append(f"quantile {flags['--calibrate_forgetting']}")
    words += flags.get("--method_args", "").split()
    if "--train_batch_size" in flags:
        words.append(f"batch {flags['--train_batch_size']}")
    if flags["--timestep_range"] != ALL:
        words.append(f"t >= {flags['--timestep_range'].split()[0]}")
    if "--forget_timestep_ranges" in flags:
        turns = [f"{low}-{high}" for low, high in forget_ranges(flags)]
        between = ", then " if flags.get("--forget_timestep_schedule") == "sequential" else " / "
        words.append(f"forget {between.join(turns)}")
    if "--threshold_source" in flags:
        words.append(f"thresholds of {flags['--threshold_source']}")
    if "--num_redirect_images" in flags:
        words.append(f"{flags['--num_redirect_images']} images")
    if "--lr_scheduler" in flags:
        words.append(flags["--lr_scheduler"])
    if "--use_ema" in flags:
        words.append("EMA")
    if flags["--method"] == "siss_independent":
        words.append("not stratified")
    return ", ".join(words)


# One after the other, and the averaged weights of both.
SEQUENCE: Setting = {"forget_timestep_ranges": HIGH_AND_LOW, "forget_timestep_schedule": "sequential", "use_ema": ""}
# What we recommend for SISS. It was found after the sweep, and by more than one seed.
RECOMMENDED = relative("siss", 1e-4, 0.2, **SEQUENCE)
RECOMMENDED_BUDGET = 2  # times that of the sweep
# What we recommend where three times that budget can be had: twice the batch, and twice as long at low noise as at high,
# for it is at low noise that a picture's likelihood is decided. Found by the training seeds 0 and 1.
THOROUGH = RECOMMENDED | {"--train_batch_size": "128", "--forget_timestep_ranges": "300 1000 0 300 0 300"}

# One change at a time to what is recommended; None takes a flag away.
Change = dict[str, str | None]
CALIBRATED: Change = {"--calibrate_forgetting": "0.9", "--forget_scale": "1"}
AT_ONCE: Change = {"--forget_timestep_schedule": None, "--forget_timestep_ranges": None}
ABLATION: dict[str, Change] = {
    "as recommended": {},
    "high and low noise in turns": {"--forget_timestep_schedule": None},
    "low noise first": {"--forget_timestep_ranges": "0 300 300 1000"},
    "forgets at all timesteps at once": AT_ONCE,
    "forgets at t >= 300 alone": AT_ONCE | {"--forget_timestep_ranges": FORGET_HIGH},
    "without EMA": {"--use_ema": None},
    "calibrated": CALIBRATED,
    "not stratified": {"--method": "siss_independent"},
    "half of the rate": {"--learning_rate": "5e-05"},
    "cosine": {"--lr_scheduler": "cosine"},
    "norm": {"--forget_scaling": "norm", "--forget_scale": "5"},
    "fixed": {"--forget_scaling": "fixed", "--forget_scale": "0.1"},
    "nash": {"--forget_scaling": "nash", "--forget_scale": None},
    "lambda 0.25": {"--method_args": "lam=0.25"},
    "lambda 0.75": {"--method_args": "lam=0.75"},
}


def changed(flags: Setting, change: Change) -> Setting:
    return {name: value for name, value in (flags | change).items() if value is not None}


RETRACK = {"method_args": "lam=0.01 num_neighbors=10"}
# With a larger budget: how many times as large, and the settings. What is recommended, what was before, and every rival
# at what the sweep chose for it, with the same average of the weights, and with the same sequence where it has two sides.
LONGER: dict[str, tuple[int, dict[str, list[Setting]]]] = {
    "twice": (
        2,
        {
            "naive_deletion": [setting("naive_deletion", 4e-4, HIGH, use_ema="")],
            "neggrad": [setting("neggrad", 1e-6, HIGH, method_args="scale=0.01", use_ema="")],
            "siss": [
                RECOMMENDED,
                relative("siss", 5e-5, 0.2, forget_timestep_ranges=FORGET_HIGH),
                relative("siss", 5e-5, 0.2, forget_timestep_ranges=WITH_LOWEST),
            ],
            "siss_no_is": [relative("siss_no_is", 1e-4, 0.2, **SEQUENCE)],
            "subscore_bernoulli": [relative("subscore_bernoulli", 1e-4, 0.2, **SEQUENCE)],
            "erasediff": [setting("erasediff", 5e-5, method_args="eta=0.001", **SEQUENCE)],
            "retrack": [
                setting("retrack", 1e-4, **RETRACK),
                setting("retrack", 1e-4, **RETRACK, use_ema=""),
                setting("retrack", 1e-4, **RETRACK, **SEQUENCE),
                *(
                    setting("retrack", rate, method_args=f"lam={lam:g} num_neighbors=10", use_ema="")
                    for rate, lam in ((1e-4, 0.05), (2e-4, 0.01), (2e-4, 0.05))
                ),
            ],
            "redirect": [REDIRECT, setting("redirect", 8e-5, use_ema="")],
            "siss, calibrated": [changed(RECOMMENDED, CALIBRATED)],
        },
    ),
    "four_times": (
        4,
        {
            "siss": [RECOMMENDED, RECOMMENDED | {"--lr_scheduler": "cosine"}],
            "redirect": [REDIRECT],
            "retrack": [setting("retrack", 1e-4, **RETRACK, use_ema="")],
        },
    ),
    "six_times": (
        6,
        {
            "siss": [THOROUGH],
            "siss_no_is": [THOROUGH | {"--method": "siss_no_is"}],
            "subscore_bernoulli": [THOROUGH | {"--method": "subscore_bernoulli"}],
            "retrack": [
                setting("retrack", 1e-4, **RETRACK, use_ema=""),
                setting("retrack", 1e-4, **RETRACK, train_batch_size="128", use_ema=""),
            ],
        },
    ),
}

# Trained ten times as long as in the sweep.
TEN_TIMES: dict[str, Setting] = {
    "siss": RECOMMENDED,
    "siss, calibrated": changed(RECOMMENDED, CALIBRATED),
    "retrack": setting("retrack", 1e-4, **RETRACK, use_ema=""),
    "redirect": REDIRECT,
}
