"""The model that is measured: one size, so that the figures of all benchmarks stand beside each other."""

SIZE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# infini-transformer-pytorch has as many KV heads as heads, and makes its intermediate size of the width.
ALL_HEADS_SIZE = {**SIZE, "intermediate_size": 1365, "num_key_value_heads": 8}
SEGMENT_LENGTH = 512
