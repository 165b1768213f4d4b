#!/usr/bin/env python3
"""Writes the golden files of this folder with the real Hugging Face libraries: small random models, one batch of
uneven examples run one by one (no padding), logits, summed loss, gradients, and three AdamW steps. The case `optimizers`
holds what torch's optimizers make of one vector over many steps; those called `*_smoothed` have the loss of transformers'
LabelSmoother, what its Trainer computes with label_smoothing_factor.

Run with torch 2.11 and transformers 5 on a CPU:  python make_golden.py [NAME ...]
"""
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM)
from transformers.trainer_pt_utils import LabelSmoother

HERE = pathlib.Path(__file__).parent
LR, BETAS, EPS, DECAY, STEPS = 1e-3, (0.9, 0.999), 1e-8, 0.01, 3


def randomized(model, seed):
    """Values away from the initialisation's zeros and ones, so that every bias and norm weight matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.08 * noise)
    return model.eval()


def examples(vocab, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def summed_loss(logits, batch):
    if batch["smoothing"]:
        return LabelSmoother(epsilon=batch["smoothing"])({"logits": logits}, batch["labels"], num_items_in_batch=1)
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum", ignore_index=-100)


def bert_forward(model, batch):
    logits = torch.cat([model(input_ids=ids[None], token_type_ids=types[None]).logits
                        for ids, types in zip(batch["rows"], batch["types"])])
    return logits, summed_loss(logits, batch)


def causal_forward(model, batch):
    logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in batch["rows"]])
    return logits, summed_loss(logits, batch)


def flat(rows):
    return torch.cat(list(rows))


def decays(name):
    """Whether HF's Trainer decays this parameter."""
    lowered = name.lower()
    return not ("bias" in lowered or "norm" in lowered or ".ln_" in lowered)


def write(name, model, batch, forward):
    tensors = {f"weights.{n}": p.detach().clone() for n, p in model.named_parameters()}
    logits, loss = forward(model, batch)
    count = int((batch["labels"] != -100).sum())
    (loss / count).backward()
    for n, p in model.named_parameters():
        tensors[f"grads.{n}"] = p.grad.clone()
    tensors |= {"logits": logits.detach(), "loss": loss.detach().reshape(1), "labels": batch["labels"],
                "ids": flat(batch["rows"]), "lengths": torch.tensor([len(r) for r in batch["rows"]])}
    if batch["smoothing"]:
        tensors["label_smoothing"] = torch.tensor([batch["smoothing"]], dtype=torch.float32)
    if "types" in batch:
        tensors["token_types"] = flat(batch["types"])
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [p for n, p in named if decays(n)], "weight_decay": DECAY},
                                   {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0}],
                                  lr=LR, betas=BETAS, eps=EPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = forward(model, batch)
        losses.append(loss.item() / count)
        (loss / count).backward()
        optimizer.step()
    losses.append(forward(model, batch)[1].item() / count)
    tensors["step_losses"] = torch.tensor(losses)
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / f"{name}.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    (HERE / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def bert(name, smoothing=0.0, **changes):
    config = BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                        max_position_embeddings=32, num_labels=3, **changes)
    torch.manual_seed(1)
    rows = examples(config.vocab_size, (5, 1, 17, 9), 2)
    batch = {"rows": rows, "types": [(torch.arange(len(r)) > len(r) // 2).long() for r in rows],
             "labels": torch.tensor([2, 0, 1, 2]), "smoothing": smoothing}
    write(name, randomized(BertForSequenceClassification(config), 3), batch, bert_forward)


def gpt2(name, smoothing=0.0, **changes):
    config = GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=3, n_positions=32, **changes)
    torch.manual_seed(7)
    rows = examples(config.vocab_size, (7, 1, 19, 10), 8)
    labels = [torch.cat([r[1:], torch.tensor([-100])]) for r in rows]
    labels[2][:6] = -100
    batch = {"rows": rows, "labels": flat(labels), "smoothing": smoothing}
    write(name, randomized(GPT2LMHeadModel(config), 9), batch, causal_forward)


def llama(name, classes=(LlamaConfig, LlamaForCausalLM), **changes):
    config = classes[0](**({"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "intermediate_size": 36, "max_position_embeddings": 64} | changes))
    torch.manual_seed(4)
    rows = examples(config.vocab_size, (7, 1, 19, 10), 5)
    labels = [torch.cat([r[1:], torch.tensor([-100])]) for r in rows]
    labels[2][:6] = -100
    batch = {"rows": rows, "labels": flat(labels), "smoothing": 0.0}
    write(name, randomized(classes[1](config), 6), batch, causal_forward)


OPTIMIZERS = {  # name: (class, options, steps)
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}, 1000),
    "adamw_other_betas": (torch.optim.AdamW, {"lr": 3e-3, "betas": (0.4, 0.95), "eps": 1e-6, "weight_decay": 0.1}, 1000),
    "sgd": (torch.optim.SGD, {"lr": 0.05}, 200),
    "sgd_decay": (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.02}, 200),
    "sgd_momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02}, 200),
    "sgd_nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}, 200),
}


def optimizers():
    """The gradient at step t (from 1) is curvature * (p - roll(target, t)): it follows from what the test has, too."""
    generator = torch.Generator().manual_seed(7)
    start, target = (torch.randn(517, generator=generator) for _ in range(2))
    curvature = torch.rand(517, generator=generator) + 0.1
    tensors = {"start": start, "target": target, "curvature": curvature}
    for name, (optimizer_class, options, steps) in OPTIMIZERS.items():
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([p], **options, foreach=False, fused=False)
        for step in range(1, steps + 1):
            p.grad = curvature * (p.detach() - target.roll(step))
            optimizer.step()
            if step in (1, 10, steps):
                tensors[f"{name}.{step}"] = p.detach().clone()
        state = optimizer.state[p]
        tensors |= {f"{name}.{key}": state[key].clone() for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                    if state.get(key) is not None}
    save_file(tensors, HERE / "optimizers.safetensors", metadata={"format": "pt"})


CASES = {
    "optimizers": optimizers,
    "bert": lambda: bert("bert"),
    "bert_tanh_gelu": lambda: bert("bert_tanh_gelu", hidden_act="gelu_new", layer_norm_eps=1e-5),
    "bert_smoothed": lambda: bert("bert_smoothed", smoothing=0.1),
    "gpt2": lambda: gpt2("gpt2"),
    "gpt2_smoothed": lambda: gpt2("gpt2_smoothed", smoothing=0.1),
    "gpt2_untied": lambda: gpt2("gpt2_untied", tie_word_embeddings=False, n_inner=40, activation_function="gelu",
                                scale_attn_by_inverse_layer_idx=True),
    "llama_tied": lambda: llama("llama_tied", tie_word_embeddings=True),
    "llama_untied": lambda: llama("llama_untied", head_dim=10, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    "llama_rope3": lambda: llama("llama_rope3", num_key_value_heads=1, num_hidden_layers=1, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}),
    "mistral": lambda: llama("mistral", (MistralConfig, MistralForCausalLM), sliding_window=4),
    "qwen2": lambda: llama("qwen2", (Qwen2Config, Qwen2ForCausalLM), tie_word_embeddings=True, use_sliding_window=True,
                           sliding_window=5, max_window_layers=1),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        CASES[case]()
