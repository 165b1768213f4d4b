"""What training.py measures: the cases, the peers and how each is set up. Python's standard library only."""
import dataclasses
import statistics

import floor
import machine

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20),
               **machine.PROGRAM_MALLOC}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    about: str
    keeps_memory: bool = True  # malloc keeps what was freed and asks for huge pages
    groups: bool = False       # rows of about the same length share a step, where lengths vary
    compiles: bool = False
    packs: bool = False        # TRL's SFTTrainer instead of the Trainer

    def has_steps_of(self, case):
        """Whether each step trains on the rows of ours, in the same way: only then do losses compare."""
        return not self.packs and not (self.groups and case.is_varied)


PEERS = {
    "default": Peer(about="transformers, default", keeps_memory=False),
    "tuned": Peer(about="transformers, tuned"),
    "grouping": Peer(about="transformers, tuned, grouped by length", groups=True),
    "compile": Peer(about="transformers, tuned, torch.compile", groups=True, compiles=True),
    "packing": Peer(about="TRL, tuned, packing", packs=True),
}
BEST = "the best of the peers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    rows: str                # of what: "text" (all of TOKENS tokens), "alpaca" or "sst2"
    shape: dict | None       # of a causal language model with random weights; None: MiniLM
    batch: int               # rows a step
    peers: tuple
    steps: int = 3           # counted ones of a run
    bf16: bool = True
    parts: dict = dataclasses.field(default_factory=dict)   # {peer: micro-batches of a step, where that is faster than one}
    aims: dict = dataclasses.field(default_factory=dict)    # {peer or BEST: times its tokens/s}
    memory: dict = dataclasses.field(default_factory=dict)  # {peer: share of its peak}
    floor: float | None = None  # aim: share of the step that its products take at the machine's register peak
    loss: float | None = None  # largest difference of a step's; None where dropout draws other numbers on each side

    @property
    def is_varied(self):
        """Whether rows have different lengths."""
        return self.rows != "text"


TOKENS = 1024
UNCOUNTED = 2  # of shardtune: before the second it may take its huge pages; of its peers as many
GPT2 = {"model_type": "gpt2"}
LLAMA = {"model_type": "llama", "vocab_size": 50257, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 50256,
         "eos_token_id": 50256, "tie_word_embeddings": False}
GPT2_DROPOUT = ("embd_pdrop", "resid_pdrop", "attn_pdrop")
GPT2_DRY = GPT2 | {name: 0.0 for name in GPT2_DROPOUT}
GPT2_WET = GPT2 | {name: 0.1 for name in GPT2_DROPOUT}
FIXED, VARIED = ("default", "tuned", "compile"), ("default", "grouping", "compile")
SLOW = FIXED[1:]  # where a step takes a minute and the default has no aim
CASES = {
    "gpt2": Case(rows="text", shape=GPT2_DRY, batch=4, peers=FIXED, loss=0.02, aims={"tuned": 1.7, "default": 4}, memory={"tuned": 0.45},
                 floor=floor.AIM),
    "gpt2-dropout": Case(rows="text", shape=GPT2_WET, batch=4, peers=SLOW, aims={"tuned": 2.5}),
    "llama": Case(rows="text", shape=LLAMA, batch=4, peers=SLOW, steps=2, loss=0.02, aims={"tuned": 1.4}),
    "minilm": Case(rows="sst2", shape=None, batch=32, peers=VARIED, steps=15, aims={"default": 3.5}),
    "minilm-fp32": Case(rows="sst2", shape=None, batch=32, peers=VARIED, steps=15, bf16=False, aims={"default": 1.8}),
    "alpaca": Case(rows="alpaca", shape=GPT2_DRY, batch=16, peers=("grouping", "packing", "default"), steps=5, loss=0.02, aims={BEST: 2},
                   parts={"grouping": 4, "packing": 3}),
}


def chosen_peers(case, wanted):
    """The names of the case's peers among the wanted ones; None wants all."""
    return [name for name in case.peers if wanted is None or name in wanted]


def uncounted_steps(case, peer, steps):
    """Steps at the start of a run that do not count: those that fill caches and memory, and those that compile."""
    if not peer.compiles:
        return UNCOUNTED
    return steps if case.is_varied else 3  # a whole pass meets every length


def alpaca_text(row):
    """A row of instruction, input (may be empty) and output in the words of the Alpaca data set's authors."""
    words = ("Below is an instruction that describes a task, paired with an input that provides further context. "
             if row["input"] else "Below is an instruction that describes a task. ")
    words += f"Write a response that appropriately completes the request.\n\n### Instruction:\n{row['instruction']}\n\n"
    if row["input"]:
        words += f"### Input:\n{row['input']}\n\n"
    return f"{words}### Response:\n{row['output']}"


def useful_tokens(inputs):
    """Tokens of a peer's micro-batch that are not padding; without a mask there is none."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def rates(case, tokens, seconds):
    """tokens/s of each counted step; of all together where rows, and with them steps, have different lengths."""
    if case.is_varied:
        return [sum(tokens) / sum(seconds)]
    return [number / duration for number, duration in zip(tokens, seconds, strict=True)]


def best_peer(measured):
    """The name of the fastest by {name: repeats, each a list of tokens/s}: by the median of all."""
    return max(measured, key=lambda name: statistics.median(rate for repeat in measured[name] for rate in repeat))
