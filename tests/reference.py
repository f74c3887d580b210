"""
Infini-attention, one token at a time, in float64, written from the equations of the contract and sharing no code with
the model. Slow and obvious: the oracle of the tests. Differentiable.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rope(x, position, theta):
    half = x.shape[-1] // 2
    angles = torch.tensor([position / theta ** (2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def sigma(x):
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


class Head:
    """One query head's view of a KV head over one stream: lists of what was read, and the memory in plain tensors."""

    def __init__(self, dim):
        self.keys, self.memory_keys, self.values, self.strengths = [], [], [], []
        self.memory = torch.zeros(dim, dim, dtype=torch.float64)
        self.normaliser = torch.zeros(dim, dtype=torch.float64)


def read(head, query, eps):
    features = sigma(query)
    return (features @ head.memory) / (features @ head.normaliser).clamp(min=eps)


def close_segment(head, length, delta, eps):
    keys, values, strengths = head.memory_keys[-length:], head.values[-length:], head.strengths[-length:]
    memory, normaliser = head.memory, head.normaliser
    for key, value, strength in zip(keys, values, strengths):
        features = sigma(key)
        target = value
        if delta and len(head.keys) > length:
            target = value - read(head, key, eps)
        memory = memory + strength * torch.outer(features, target)
        normaliser = normaliser + features
    head.memory, head.normaliser = memory, normaliser


def attend_locally(head, query, position, config, theta):
    length, sinks = config.segment_length, config.num_sink_tokens
    segment_start = position // length * length
    seen = []
    if config.local_attention == "segment":
        seen = [(j, j - segment_start) for j in range(segment_start, position + 1)]
    else:
        for j in range(position + 1):
            if position - j < length:
                seen.append((j, j - segment_start))
            elif j < sinks:
                seen.append((j, j - length - sinks))
    rotated = rope(query, position - segment_start, theta)
    scores = torch.stack([rotated @ rope(head.keys[j], at, theta) for j, at in seen]) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores, 0)
    return weights @ torch.stack([head.values[j] for j, _ in seen]), [(j, w) for (j, _), w in zip(seen, weights)]


def reference_stream(ids, weights, config):
    """
    Logits of one stream.

    Args:
        ids: list of token ids.
        weights: state dict of an `InfiniForCausalLM`, in float64.
        config: its configuration, with the default RoPE.

    Returns:
        logits `(tokens, vocab)`; attentions, per layer, head and token a list of (token seen, weight).
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, length = config.rope_parameters["rope_theta"], config.segment_length

    def linear(x, name):
        out = weights[f"{name}.weight"] @ x
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    states = [[Head(dim) for _ in range(kv_heads)] for _ in range(config.num_hidden_layers)]
    attentions = [[[] for _ in range(heads)] for _ in range(config.num_hidden_layers)]
    logits = []
    for position, token in enumerate(ids):
        x = weights["model.embed_tokens.weight"][token]
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}"
            h = rms_norm(x, weights[f"{at}.input_layernorm.weight"], config.rms_norm_eps)
            queries = linear(h, f"{at}.self_attn.q_proj").view(heads, dim)
            keys = linear(h, f"{at}.self_attn.k_proj").view(kv_heads, dim)
            values = linear(h, f"{at}.self_attn.v_proj").view(kv_heads, dim)
            if config.qk_norm:
                query_weight, key_weight = (weights[f"{at}.self_attn.{n}_norm.weight"] for n in "qk")
                queries = torch.stack([rms_norm(q, query_weight, config.rms_norm_eps) for q in queries])
                keys = torch.stack([rms_norm(k, key_weight, config.rms_norm_eps) for k in keys])
            memory_queries, memory_keys = queries, keys
            if config.memory_norm_init_scale is not None:
                scale = {n: weights[f"{at}.self_attn.memory.{n}_norm.weight"].exp() for n in ("query", "key")}
                memory_queries = [s * rms_norm(q, 1, config.rms_norm_eps) for s, q in zip(scale["query"], queries)]
                memory_keys = [s * rms_norm(k, 1, config.rms_norm_eps) for s, k in zip(scale["key"], keys)]
            if config.memory_write_gate:
                gates = torch.sigmoid(linear(h, f"{at}.self_attn.memory.write_gate"))
                memory_keys = [key + gate.log() for key, gate in zip(memory_keys, gates)]
            strengths = torch.ones(kv_heads, dtype=torch.float64)
            if config.learned_delta_update:
                strengths = torch.sigmoid(linear(h, f"{at}.self_attn.memory.write_strength"))
            for head, key, memory_key, value, strength in zip(states[layer], keys, memory_keys, values, strengths):
                head.keys.append(key)
                head.memory_keys.append(memory_key)
                head.values.append(value)
                head.strengths.append(strength)
            outputs = []
            for index, query in enumerate(queries):
                head = states[layer][index // (heads // kv_heads)]
                output, seen = attend_locally(head, query, position, config, theta)
                attentions[layer][index].append(seen)
                if position >= length:
                    gate = torch.sigmoid(config.head_gate_scale * weights[f"{at}.self_attn.head_gates.weight"][index])
                    output = gate * output + (1 - gate) * read(head, memory_queries[index], config.memory_eps)
                outputs.append(output)
            if (position + 1) % length == 0:
                for head in states[layer]:
                    close_segment(head, length, config.use_mem_delta_rule, config.memory_eps)
            x = x + linear(torch.cat(outputs), f"{at}.self_attn.o_proj")
            h = rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps)
            gate = linear(h, f"{at}.mlp.gate_proj")
            x = x + linear(gate * torch.sigmoid(gate) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        logits.append(linear(x, "lm_head"))
    return torch.stack(logits), attentions
