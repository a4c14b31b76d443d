"""Liger Attention (gla) as a user of PyTorch would write it: transformers' Llama, fla's kernels for the recurrence,
FlexAttention for the window. The formulas are those of tests/golden/reference.py; alpha = beta = 0.5, window 64, 4 sinks."""

import torch
import torch.nn.functional as F

import autotuning
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

autotuning.install()
WINDOW, SINKS = 64, 4
SHAPES = {
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "llama-3-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}
compiled_flex = torch.compile(flex_attention)
masks = {}


def visible(batch, head, query, key):
    return (key <= query) & ((query - key < WINDOW) | (key < SINKS))


def block_mask(length, device):
    if length not in masks:
        masks[length] = create_block_mask(visible, None, None, length, length, device=device)
    return masks[length]


class WindowCache:
    """Keys and values of the sinks and the last WINDOW tokens, and the recurrent state: constant in size."""

    def __init__(self):
        self.keys = self.values = self.state = None
        self.next = SINKS

    def insert(self, k, v):
        self.keys[:, :, self.next], self.values[:, :, self.next] = k[:, :, 0], v[:, :, 0]
        self.next = SINKS + (self.next + 1 - SINKS) % WINDOW


class LigerAttention(torch.nn.Module):
    def __init__(self, attention, config):
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.cache = None

    def forward(self, hidden_states, position_embeddings, **_):
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        window_q, window_k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        repeat = lambda x: x.repeat_interleave(self.groups, dim=2)
        query, key, gate = q.softmax(-1), repeat(k.softmax(-1)), repeat(F.logsigmoid(k.float()) / 16)
        if self.cache is None:
            window = compiled_flex(window_q, window_k, v.transpose(1, 2), enable_gqa=True,
                                   block_mask=block_mask(length, q.device))
            recurrent, _ = chunk_gla(query, key, repeat(v), gate, scale=1.0)
        else:
            self.cache.insert(window_k, v.transpose(1, 2))
            window = F.scaled_dot_product_attention(window_q, self.cache.keys, self.cache.values, enable_gqa=True)
            recurrent, self.cache.state = fused_recurrent_gla(query, key, repeat(v), gate, scale=1.0,
                                                              initial_state=self.cache.state, output_final_state=True)
        mixed = 0.5 * recurrent + 0.5 * window.transpose(1, 2)
        return self.o_proj(mixed.reshape(batch, length, -1)), None


def build(shape, device="cuda", dtype=torch.bfloat16):
    """A Llama of this shape with random weights and Liger Attention in every layer."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, attn_implementation="sdpa", use_cache=False)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        layer.self_attn = LigerAttention(layer.self_attn, config)
    return model


def median_seconds(run, repeat):
    """Median by CUDA events, after three runs that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
