"""Models, tokenizers and configurations from the files of an asset, and models without weights."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qbench.assets import ModelAsset
from qbench.errors import AssetError, NumericsError, StructureError
from qbench.models.convert import fetch_model

# What transformers, safetensors and torch raise for files that are damaged or do not belong together.
_BROKEN_FILE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_config(asset: ModelAsset) -> PreTrainedConfig:
    """The model's configuration; AssetError when transformers cannot read it."""
    with _from_files(asset, "config.json cannot be used"):
        return AutoConfig.from_pretrained(fetch_model(asset), local_files_only=True)


def load_tokenizer(asset: ModelAsset) -> PreTrainedTokenizerBase:
    """The model's tokenizer; AssetError when its files are missing or damaged."""
    with _from_files(asset, "the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(fetch_model(asset), local_files_only=True)


def load_model(asset: ModelAsset, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode and without gradients.

    Attention is torch's scaled-dot-product attention, or the eager one where a model does not support it
    (gemma2's soft-capped scores). AssetError for files that are damaged or lack a weight (transformers would
    draw a random one), NumericsError for a weight that is not finite.
    """
    with _from_files(asset, "the weights cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            fetch_model(asset), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise AssetError(
            f"model {asset.name} in {asset.path}: {len(missing)} weights are not in the files, {missing[0]} "
            "first; config.json and the weights do not belong together"
        )
    for name, parameter in model.named_parameters():
        check_finite(f"model {asset.name}: {name}", parameter)
    return model.eval().requires_grad_(False).to(device)


def check_finite(name: str, tensor: Tensor) -> None:
    """NumericsError with the tensor's name if any element is NaN or infinite; any shape and dtype."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad, total = int((~finite).sum()), tensor.numel()
        raise NumericsError(f"{name}: {bad} of {total} values are NaN or infinite; the checkpoint is unusable")


def meta_model(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The architecture of `config`, in evaluation mode: parameters on the meta device, buffers real.

    Costs neither memory nor time worth mentioning (under a second for 70 billion parameters). Buffers that
    no checkpoint holds (rotary frequencies) have their values, so that a block works once its parameters
    are put in. StructureError when the architecture leaves such a buffer without values.
    """
    # transformers writes the dtype into the configuration it is given.
    own = copy.deepcopy(config)
    with _quiet(), _MetaParameters():
        model = AutoModelForCausalLM.from_config(own, dtype=dtype)
    moved: dict[int, nn.Parameter] = {}  # a parameter in two places stays one
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[key] = moved.setdefault(id(parameter), meta)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set:
                raise StructureError(f"{prefix}.{key}: a buffer that no checkpoint holds has no values of its own")
    return model.eval().requires_grad_(False)


def miniature(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of `config` with one block of the true widths and a vocabulary of 64, in float32: enough to see
    what can be done with its blocks before any weights load. Nothing in it is 0 or 1, where a wrong transform could not
    be told from a right one."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size = 1, 64
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    model = meta_model(small)
    generator = torch.Generator().manual_seed(0)
    values: dict[int, nn.Parameter] = {}  # a parameter in two places stays one
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                noise = torch.randn(parameter.shape, generator=generator)
                value = 0.7 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5
                module._parameters[key] = values.setdefault(id(parameter), nn.Parameter(value, requires_grad=False))
    return model


class _MetaParameters(TorchFunctionMode):
    """Creates uninitialized tensors, which is what parameters begin as, on the meta device, and no others.

    The `torch.device("meta")` context would take the buffers along, whose values are computed at
    construction.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func is torch.empty and named.get("device") is None:
            named["device"] = "meta"
        return func(*args, **named)


@contextmanager
def _from_files(asset: ModelAsset, problem: str) -> Iterator[None]:
    """Turns what loading raises for bad files into a one-line AssetError; silences the libraries."""
    try:
        with _quiet():
            yield
    except torch.OutOfMemoryError:  # a RuntimeError, but not the files' fault
        raise
    except _BROKEN_FILE as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise AssetError(f"model {asset.name} in {asset.path}: {problem} ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings; what mattered in them is checked by the caller."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
