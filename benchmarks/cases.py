"""The cases of benchmarks/run: which driver each starts, how long it may take, and how its figures are read."""
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable

import machine
import tables
import training_cases

BENCHMARKS = pathlib.Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    about: str
    program: str                  # in the build folder; must be there
    arguments: tuple              # after the driver; {build} and {folder} (a directory for files) are filled in
    quick: tuple                  # the same, for --quick: less of the same work, so that figures of the same name can be compared
    driver: tuple = ()            # what to start; the program itself when empty
    parse: Callable | None = None  # of the printed output; None: a driver with --json
    repeats: tuple = (1, 1)       # runs of the driver, and with --quick; 1 where the driver itself repeats
    minutes: tuple = (60, 20)     # time limit of one run, and with --quick
    num_threads: int | None = None  # None: one a core
    variables: tuple = ()
    least_cores: int = 1


PARITY = (str(ROOT / "scripts" / "parity"), "--python")
MALLOC = tuple(machine.PROGRAM_MALLOC.items())


def python(*path):
    return str(BENCHMARKS.joinpath(*path))


# One case each, so that one that a busy machine cuts off loses no more than itself. Time limits in minutes.
TRAINING_LIMITS = {"gpt2": 90, "gpt2-dropout": 90, "llama": 240, "minilm": 60, "minilm-fp32": 60, "alpaca": 240}


def training(name):
    case = training_cases.CASES[name]
    about = f"{name} beside the Hugging Face Trainer{' and TRL' if 'packing' in case.peers else ''}: tokens/s, memory, losses"
    some = ",".join(case.peers[:max(1, len(case.peers) - 1)])
    return Case(about=about, program="shardtune", driver=(*PARITY, python("training.py")), arguments=("--case", name, "--repeats", "5"),
                quick=("--case", name, "--repeats", "2", "--peers", some), minutes=(TRAINING_LIMITS[name], 60))


CASES = {
    **{f"training-{name}": training(name) for name in training_cases.CASES},
    "startup": Case(about="seconds to the end of the first step, beside the Trainer", program="shardtune",
                    driver=(*PARITY, python("startup.py")), arguments=("5",), quick=("3",), minutes=(20, 10)),
    "tokenizer": Case(about="texts to ids beside Hugging Face's tokenizers", program="benchmark_tokenizer",
                      driver=(*PARITY, python("tokenizer", "compare.py")), arguments=("{build}/benchmark_tokenizer",),
                      quick=("{build}/benchmark_tokenizer", "--repeats", "3"), minutes=(10, 5)),
    "memory": Case(about="peak of a rank beside the formula and beside FSDP2", program="shardtune",
                   driver=(*PARITY, python("memory.py")), arguments=(), quick=("124M", "2", "off"), minutes=(120, 20), repeats=(3, 3)),
    "checkpoint": Case(about="saving and loading beside dd, torch.save and DCP", program="benchmark_checkpoint",
                       driver=(*PARITY, python("checkpoint", "compare.py")),
                       arguments=("{build}/benchmark_checkpoint", "{folder}/checkpoints"),
                       quick=("{build}/benchmark_checkpoint", "{folder}/checkpoints", "1432", "400"), repeats=(5, 3), minutes=(20, 10),
                       least_cores=2),
    "reduction": Case(about="what the same bits at any number of ranks cost", program="shardtune",
                      driver=(sys.executable, python("reduction.py")), arguments=("{build}/shardtune", "--bf16", "--repeats", "5"),
                      quick=("{build}/shardtune", "--bf16", "--repeats", "3", "--plans", "ddp", "--accumulation", "1"), least_cores=2),
    "scaling": Case(about="two ranks beside one, and beside two jobs", program="shardtune",
                    driver=(sys.executable, python("scaling.py")), arguments=("{build}/shardtune", "--bf16", "--repeats", "5"),
                    quick=("{build}/shardtune", "--bf16", "--repeats", "3", "--steps", "6", "--plans", "ddp"), least_cores=2),
    "step_cost": Case(about="what a step costs besides its work: against tokens, parameters, ranks and layers", program="shardtune",
                      driver=(sys.executable, python("step_cost.py")), arguments=("{build}/shardtune", "--repeats", "3", "--steps", "4"),
                      quick=("{build}/shardtune", "--series", "tokens,layers", "--repeats", "3", "--steps", "4"), minutes=(60, 15)),
    "overlap": Case(about="communication that a step does not hide", program="benchmark_overlap", parse=tables.overlap,
                    arguments=("ddp", "zero3", "zero3-gathered"), quick=("ddp",), repeats=(5, 3), minutes=(10, 5), num_threads=1,
                    least_cores=2),
    "collectives": Case(about="collectives beside Open MPI and gloo", program="benchmark_collectives", parse=tables.collectives,
                        driver=(python("collectives", "run"),), arguments=("--max_mib=32",), quick=("all_reduce", "--max_mib=1"),
                        repeats=(5, 3), minutes=(30, 5), variables=(("RANKS", "2"),), least_cores=2),
    "kernels": Case(about="operators and matrix products beside ATen and beside the peak", program="benchmark_kernels",
                    driver=(sys.executable, python("kernels", "compare.py")), arguments=("{build}/benchmark_kernels",),
                    quick=("{build}/benchmark_kernels", "--repeats", "3", "--seconds", "0.05"), minutes=(60, 30)),
    "optimizer": Case(about="optimizer steps beside the memory's bandwidth", program="benchmark_optimizer", parse=tables.optimizer,
                      arguments=("64",), quick=("64",), repeats=(5, 3), minutes=(5, 5), variables=MALLOC),
}


def command(case, build, folder, is_quick):
    """What to start once, with absolute paths."""
    arguments = case.quick if is_quick else case.arguments
    return [*(case.driver or (str(build / case.program),)), *(text.format(build=build, folder=folder) for text in arguments)]


def environment(case, build, folder, num_cores):
    """Of the driver: temporary files in `folder`, our threads, the build folder's programs, MPI as root where we are that."""
    variables = dict(os.environ) | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "SHARDTUNE_BUILD": str(build),
                                    "SHARDTUNE_BINARY": str(build / "shardtune")} | dict(case.variables)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        variables.pop(name, None)
    if case.parse is not None:
        variables["OMP_NUM_THREADS"] = str(case.num_threads or num_cores)
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables
