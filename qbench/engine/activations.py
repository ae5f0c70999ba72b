"""Fake quantization of a linear layer's input while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.formats.scheme import InputFormat
from qbench.formats.tensor import QParams, TensorFormat, decode, encode, fit


@dataclass(frozen=True, kw_only=True, eq=False)
class InputQuantizer:
    """Rounds x `[..., features]`, as tokens `[tokens, features]`, to values that `format` can hold.

    params: static scales and zero points, [1, groups], the same for every token; None: every call fits its own.
    outer: what dynamic scales share (NVFP4's tensor scale, METHODS 1.5), from calibration text; None where they share
    nothing or find it themselves. where: what x belongs to, for error messages.
    """

    format: InputFormat
    params: QParams | None = None
    outer: Tensor | None = None
    where: str = "linear input"

    def __call__(self, x: Tensor) -> Tensor:
        """x quantized and decoded: its shape and dtype, computed in float32; what `formats.fake_quantize` gives.

        Raises NumericsError for NaN or infinity, and where a dynamic scale overflows its dtype.
        """
        if not x.numel():
            return x
        fmt = self.format.format
        rows = x.reshape(-1, x.shape[-1]).float()
        values = self._dynamic(rows, fmt) if self.params is None else self._static(rows, fmt, self.params)
        return values.to(x.dtype).reshape(x.shape)

    def _dynamic(self, rows: Tensor, fmt: TensorFormat) -> Tensor:
        try:
            params = fit(rows, fmt, outer=self.outer)
        except NumericsError as error:
            self._require_finite(rows)  # no range of such rows is finite: the more telling reason
            raise NumericsError(f"{self.where}: {error}") from error
        return fmt.unblocks(decode(encode(fmt.blocks(rows), fmt, params), params), rows.shape)

    def _static(self, rows: Tensor, fmt: TensorFormat, params: QParams) -> Tensor:
        self._require_finite(rows)  # infinities would saturate
        # Tokens share their scales, so blocks of all tokens may be cut into blocks of one, which are views.
        features = rows.shape[1]
        missing = fmt.groups(features) * fmt.width(features) - features
        blocks = (F.pad(rows, (0, missing)) if missing else rows).reshape(len(rows), -1, fmt.width(features))
        return decode(encode(blocks, fmt, params), params).flatten(1)[:, :features]

    def _require_finite(self, rows: Tensor) -> None:
        # Extremes take one pass that writes nothing.
        if not all(torch.isfinite(extreme) for extreme in rows.aminmax()):
            raise NumericsError(f"{self.where}: the activations contain NaN or infinity")
