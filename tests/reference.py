"""
Infini-attention, one token at a time, in float64, written from the equations of the contract and sharing no code with
the model, but for the width of a passage. Slow and obvious: the oracle of the tests. Differentiable.
"""

import math
from contextlib import nullcontext

import torch

from modeling_infini import memory_slots


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


def hedgehog(x, weight, bias):
    u = (weight @ x + bias).clamp(-20, 20)
    return torch.cat([torch.exp(u), torch.exp(-u)])


class Head:
    """A KV head over one stream: lists of what was read, and the memory in plain tensors."""

    def __init__(self, dim, feature_dim):
        self.keys, self.features, self.values, self.strengths = [], [], [], []
        self.memory = torch.zeros(feature_dim, dim, dtype=torch.float64)
        self.normaliser = torch.zeros(feature_dim, dtype=torch.float64)


def read(head, features, eps):
    return (features @ head.memory) / (features @ head.normaliser).clamp(min=eps)


def close_segment(head, length, delta, eps):
    of_segment = zip(head.features[-length:], head.values[-length:], head.strengths[-length:])
    memory, normaliser = head.memory, head.normaliser
    for features, value, strength in of_segment:
        target = value
        if delta and len(head.keys) > length:
            target = value - read(head, features, eps)
        memory = memory + strength * torch.outer(features, target)
        normaliser = normaliser + features
    head.memory, head.normaliser = memory, normaliser


def choose_slots(slots, scores, position, config):
    """The `(score, place)` that stay at the end of the segment whose last token is at `position`."""
    segment = range(position + 1 - config.segment_length, position + 1)
    radius, competing = memory_slots.RADIUS, list(slots)
    for place in segment:
        near = [scores[other].item() for other in segment if abs(other - place) <= radius]
        if place >= config.num_sink_tokens:
            competing.append((sum(near) / len(near), place))
    return sorted(competing, reverse=True)[: config.num_memory_slots]


def attend_locally(head, query, position, slots, config, theta):
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
                seen.append((j, j - length - config.num_memory_slots - sinks))
        from_latest = sorted((place for _, place in slots), reverse=True)
        seen += [(j, -length - 1 - rank) for rank, j in enumerate(from_latest) if position - j >= length]
    rotated = rope(query, position - segment_start, theta)
    scores = torch.stack([rotated @ rope(head.keys[j], at, theta) for j, at in seen]) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores, 0)
    return weights @ torch.stack([head.values[j] for j, _ in seen]), [(j, w) for (j, _), w in zip(seen, weights)]


def reference_stream(ids, weights, config):
    """
    Logits of one stream, computed on the CPU and given where the weights are.

    Args:
        ids: list of token ids.
        weights: state dict of an `InfiniForCausalLM`, in float64.
        config: its configuration, with the default RoPE.

    Returns:
        logits `(tokens, vocab)`; attentions, per layer, head and token a list of (token seen, weight).
    """
    device = weights["model.norm.weight"].device
    # Where the CPU is the default already, to say so would double the time.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        logits, attentions = _stream({name: weight.cpu() for name, weight in weights.items()}, ids, config)
    return logits.to(device), attentions


def _stream(weights, ids, config):
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, length = config.rope_parameters["rope_theta"], config.segment_length

    def linear(x, name):
        out = weights[f"{name}.weight"] @ x
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def memory_features(states, gates, name, at):
        """What the memory gets of the queries or keys of a token, each times its write gate."""
        if config.memory_norm_init_scale is not None:
            scales = weights[f"{at}.{name}_norm.weight"].exp()
            states = [scale * rms_norm(x, 1, config.rms_norm_eps) for scale, x in zip(scales, states)]
        if config.memory_feature_map == "exp":
            maps = zip(weights[f"{at}.{name}_map.weight"], weights[f"{at}.{name}_map.bias"])
            return [gate * hedgehog(x, *of_head) for gate, x, of_head in zip(gates, states, maps)]
        # log g is added to the key; where sigma is exponential, that multiplies by g.
        return [sigma(x + gate.log()) for gate, x in zip(gates, states)]

    memory_layers = range(config.num_hidden_layers) if config.memory_layers is None else config.memory_layers
    slot_layers = range(config.num_hidden_layers) if config.slot_layers is None else config.slot_layers
    feature_dim = 2 * dim if config.memory_feature_map == "exp" else dim
    states = [[Head(dim, feature_dim) for _ in range(kv_heads)] for _ in range(config.num_hidden_layers)]
    slots = [[] for _ in range(config.num_hidden_layers)]
    scores = [[] for _ in range(config.num_hidden_layers)]
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
            for head, key, value in zip(states[layer], keys, values):
                head.keys.append(key)
                head.values.append(value)
            outputs = []
            for index, query in enumerate(queries):
                head = states[layer][index // (heads // kv_heads)]
                output, seen = attend_locally(head, query, position, slots[layer], config, theta)
                attentions[layer][index].append(seen)
                outputs.append(output)
            if layer in memory_layers:
                memory = f"{at}.self_attn.memory"
                if position >= length:
                    gate_logits = config.head_gate_scale * weights[f"{at}.self_attn.head_gates.weight"]
                    if config.token_gates:
                        gate_logits = gate_logits + linear(h, f"{memory}.token_gate")
                    features = memory_features(queries, torch.ones(heads), "query", memory)
                    for index, gate in enumerate(torch.sigmoid(gate_logits)):
                        head = states[layer][index // (heads // kv_heads)]
                        from_memory = read(head, features[index], config.memory_eps)
                        outputs[index] = gate * outputs[index] + (1 - gate) * from_memory
                write_gates = torch.ones(kv_heads)
                if config.memory_write_gate:
                    write_gates = torch.sigmoid(linear(h, f"{memory}.write_gate"))
                strengths = torch.ones(kv_heads)
                if config.learned_delta_update:
                    strengths = torch.sigmoid(linear(h, f"{memory}.write_strength"))
                features = memory_features(keys, write_gates, "key", memory)
                for head, features_of_head, strength in zip(states[layer], features, strengths):
                    head.features.append(features_of_head)
                    head.strengths.append(strength)
                if (position + 1) % length == 0:
                    for head in states[layer]:
                        close_segment(head, length, config.use_mem_delta_rule, config.memory_eps)
            if config.num_memory_slots > 0 and layer in slot_layers:
                # Rounded: equal tokens have equal scores, whoever adds up the products in whichever order.
                scores[layer].append(linear(h, f"{at}.self_attn.slot_score").to(torch.bfloat16))
                if (position + 1) % length == 0:
                    slots[layer] = choose_slots(slots[layer], scores[layer], position, config)
            x = x + linear(torch.cat(outputs), f"{at}.self_attn.o_proj")
            h = rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps)
            gate = linear(h, f"{at}.mlp.gate_proj")
            x = x + linear(gate * torch.sigmoid(gate) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        logits.append(linear(x, "lm_head"))
    return torch.stack(logits), attentions
