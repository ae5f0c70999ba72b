"""Slow, literal float64 versions of the algorithms, written from their definitions and sharing no code with qbench."""

import torch


def grid(values, bits, symmetric):
    """Scale and zero point [rows, 1] of values [rows, n], float64: METHODS 0.2 (ASYM; SYM of the GPTQ authors).

    The scale is rounded to float16, as stored: else a symmetric block's negative extreme is an exact tie, which
    float32 and float64 would decide differently.
    """
    high, low = values.amax(1, keepdim=True).clamp_min(0), values.amin(1, keepdim=True).clamp_max(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half().double()
    scale[scale == 0] = 1
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero


def nearest(values, scale, zero, bits):
    """values [rows, n] on the grid: s (clamp(round(v / s) + z) - z)."""
    return scale * ((values / scale).round().add(zero).clamp(0, 2**bits - 1) - zero)


def round_to_nearest(weight, bits, symmetric, group_size):
    """Decoded weight [out, in], every group by itself."""
    weight = weight.double()
    if group_size == 0:
        return nearest(weight, *grid(weight.reshape(1, -1), bits, symmetric), bits)
    width = group_size if group_size > 0 else weight.shape[1]
    return torch.cat([nearest(part, *grid(part, bits, symmetric), bits) for part in weight.split(width, 1)], 1)


def optimal_brain_quantizer(
    weight, hessian, *, bits, symmetric, group_size, damp, order=None, block_size=128, scale_source="compensated"
):
    """Decoded weight [out, in] of OBQ in a fixed column order, with the inverse of the remaining Hessian at each step.

    order: the columns in the order in which they are quantized. Groups are runs of `group_size` in that order.
    scale_source "stale" fits a group on the weights as they were when the running block of columns began.
    """
    original, hessian = weight.double(), hessian.double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = torch.arange(weight.shape[1]) if order is None else order
    work, decoded = original.clone(), torch.empty_like(original)
    parameters = grid(original.reshape(1, -1) if group_size == 0 else original, bits, symmetric)
    for k, column in enumerate(order.tolist()):
        if k % block_size == 0:
            before_block = work.clone()
        if group_size > 0 and k % group_size == 0:
            source = {"compensated": work, "stale": before_block, "original": original}[scale_source]
            parameters = grid(source[:, order[k : k + group_size]], bits, symmetric)
        remaining = order[k:]
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        decoded[:, column] = nearest(work[:, column : column + 1], *parameters, bits)[:, 0]
        error = (work[:, column] - decoded[:, column]) / inverse[0, 0]
        work[:, remaining] -= error[:, None] * inverse[0]
    return decoded


def correlated_inputs(tokens, columns, seed=0):
    """Inputs [tokens, columns] with unequal channels and a spectrum that falls, as that of hidden states does."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sources = torch.randn(tokens, columns, generator=generator) * torch.logspace(0, -1, columns)
    return (sources @ mixing) * (0.5 + torch.rand(columns, generator=generator))


def second_moment(x):
    """E[x xᵀ] of inputs [tokens, in], float32."""
    return (x.double().t() @ x.double() / len(x)).float()


def output_error(weight, decoded, hessian):
    """Mean over tokens of the squared change of the layer's output."""
    delta = (decoded - weight).double()
    return (delta @ hessian.double() * delta).sum().item()
