"""The floor of a training step: its matrix products at the register peak of the machine, and nothing else.

Counted are products that every implementation needs: y, dx and dW of each linear layer and of the head, and of causal
attention two products over the pairs of a query and a key it sees, and four in the backward pass. Whatever is made again in
the backward pass is not counted.
"""
import peaks
from results import Problem

AIM = 0.85  # of the floor, case gpt2
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}  # what a config.json leaves out


def shape_of(config):
    """(numbers in the weights of all layers, numbers in the head, layers, width of all query heads together)."""
    kind = config.get("model_type")
    if kind == "gpt2":
        config = GPT2 | {name: value for name, value in config.items() if value is not None}
        width, layers = config["n_embd"], config["n_layer"]
        inner = config.get("n_inner", 4 * width)
        return layers * (4 * width * width + 2 * width * inner), width * config["vocab_size"], layers, width
    if kind == "llama":
        width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        head_size = config.get("head_dim") or width // heads
        queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
        attention = width * (queries + 2 * keys) + queries * width
        return layers * (attention + 3 * width * config["intermediate_size"]), width * config["vocab_size"], layers, queries
    raise Problem(f"model_type is {kind!r}: the products of gpt2 and llama can be counted: add it to benchmarks/floor.py")


def flops_of_step(config, rows, tokens):
    """Of rows without padding, all labelled; a multiplication and an addition are two."""
    weights, head, layers, width = shape_of(config)
    pairs = rows * tokens * (tokens + 1) // 2
    return 3 * 2 * (weights + head) * rows * tokens + 6 * 2 * pairs * width * layers


def add_share(figures, name, config, tokens, rates, measured, *, dtype="bf16", aim=None):
    """A figure of what products a step does in a second beside the register peak: the floor as a share of the step.

    `rates`: repeats of tokens/s of rows of `tokens` tokens; `measured`: what machine.peaks_of() said beside each repeat. No
    figure where it said nothing.
    """
    units = [one["registers"] for one in measured if one is not None]
    unit = peaks.unit_of(dtype, units[0]) if units and len(units) == len(measured) else None
    if unit is None:
        return
    per_token = flops_of_step(config, 1, tokens) / tokens / 1e9
    figures.add(f"{name}, products", "GFLOP/s", [[per_token * rate for rate in repeat] for repeat in rates],
                peer=[[one[unit]] for one in units], beside=f"{unit} in registers", aim=aim)
