"""What metrics are called, which way is better and how a value follows from per-item values: once, for tables, figures
and comparisons. A leaf without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

#: Evaluators whose items are questions or documents of their own: the same for every model, whatever its tokenizer.
TOKENIZER_FREE = frozenset({"zeroshot", "opencompass", "rolling"})

#: Stored units that say no more than the label.
_PLAIN = ("ppl", "share", "fraction", "score", "bits/byte", "bits", "kurtosis", "cosine")

_ITEMS = {
    "perplexity": "windows",
    "decode": "windows",
    "fidelity": "windows",
    "token_kl": "windows",
    "rolling": "documents",
    "needle": "needles",
    "layers": "blocks",
}


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """How to read one metric.

    `label` is short and stands in tables, `quantity` on axes. `higher_is_better` is None where neither direction is
    better. `link` says how the value follows from its per-item values: "mean", "exp_mean" (perplexity from mean NLLs)
    or "root_mean" (from mean squares). `headline` metrics get figures; the others are for tables. `against_full` ones
    already are a distance from full precision, so that a difference from its row says nothing new.
    """

    name: str
    label: str
    quantity: str
    unit: str = ""
    higher_is_better: bool | None = None
    link: Literal["mean", "exp_mean", "root_mean"] = "mean"
    headline: bool = False
    against_full: bool = False

    @property
    def arrow(self) -> str:
        """The better direction, ↑ or ↓; empty where there is none."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def family(self) -> str:
        """The label without the variant that the name has behind a comma."""
        return self.label.removesuffix(self.name.partition(",")[2]).rstrip()


def _lower(name: str, label: str, quantity: str, **more: object) -> MetricInfo:
    return MetricInfo(name=name, label=label, quantity=quantity, higher_is_better=False, **more)


def _higher(name: str, label: str, quantity: str, **more: object) -> MetricInfo:
    return MetricInfo(name=name, label=label, quantity=quantity, higher_is_better=True, **more)


_FROM_FULL = "KL divergence from full precision"

_KNOWN = (
    _lower("ppl", "PPL", "perplexity", link="exp_mean", headline=True),
    _lower("word_perplexity", "word PPL", "perplexity per word", link="exp_mean", headline=True),
    _lower("byte_perplexity", "byte PPL", "perplexity per byte", link="exp_mean"),
    _lower("bits_per_byte", "bits/byte", "bits per byte"),
    _lower("perplexity", "PPL", "perplexity of the answer", link="exp_mean"),
    _lower("nll", "NLL", "negative log-likelihood", unit="nats"),
    _lower("kl_mean", "KL", _FROM_FULL, unit="nats", headline=True, against_full=True),
    _lower("kl_median", "KL median", f"median {_FROM_FULL}", unit="nats", against_full=True),
    _lower("kl_max", "KL max", f"largest {_FROM_FULL}", unit="nats", against_full=True),
    _lower("kl_p90", "KL p90", f"90 % quantile of {_FROM_FULL}", unit="nats", against_full=True),
    _lower("kl_p99", "KL p99", f"99 % quantile of {_FROM_FULL}", unit="nats", against_full=True),
    _lower("kl_p999", "KL p99.9", f"99.9 % quantile of {_FROM_FULL}", unit="nats", against_full=True),
    _higher("top1_agreement", "top-1", "top-1 agreement with full precision", headline=True, against_full=True),
    _lower(
        *("rms_dp", "RMS Δp", "RMS change of the true token's probability"),
        unit="%",
        link="root_mean",
        against_full=True,
    ),
    _higher("mean_dp", "mean Δp", "mean change of the true token's probability", unit="%", against_full=True),
    MetricInfo(
        name="token_kl", label="token KL", quantity="KL divergence of test from calibration tokens", unit="nats"
    ),
    MetricInfo(name="unseen_tokens", label="unseen", quantity="test tokens that calibration has not seen"),
    MetricInfo(name="token_overlap", label="overlap", quantity="test tokens in runs that calibration has too"),
    _higher("greedy_divergence", "diverges", "tokens until the first difference", unit="tokens", against_full=True),
    _higher(
        *("greedy_divergence_median", "diverges, median", "median tokens until the first difference"),
        unit="tokens",
        against_full=True,
    ),
    _higher("greedy_agreement", "same tokens", "greedy tokens as in full precision", against_full=True),
    _lower("greedy_repetition", "repetition", "repeated 4-grams in greedy continuations"),
    _higher("greedy_distinct", "distinct", "distinct tokens in greedy continuations"),
    _higher("needle_choice", "needle, choice", "needles chosen right", headline=True),
    _higher("needle_exact", "needle, exact", "needles repeated exactly"),
    MetricInfo(name="weight_kurtosis", label="K weights", quantity="kurtosis of the weights before rounding"),
    MetricInfo(name="input_kurtosis", label="K inputs", quantity="kurtosis of the inputs before quantization"),
    _higher("output_cosine", "cosine", "cosine of the outputs with those in full precision", against_full=True),
    _higher("acc", "acc", "accuracy", headline=True),
    _higher("acc_norm", "acc_norm", "accuracy, normalized by length", headline=True),
    _higher("acc_bytes", "acc_bytes", "accuracy, normalized by bytes"),
    _higher("acc_mutual_info", "acc_mi", "accuracy by mutual information"),
    _higher("acc_all", "acc_all", "accuracy over all answers of a question"),
    _higher("exact_match", "exact match", "exact match", headline=True),
    _higher("f1", "F1", "F1 score", headline=True),
    _higher("mcc", "MCC", "Matthews correlation"),
    _higher("accuracy", "accuracy", "accuracy", headline=True),
    _higher("score", "score", "score", headline=True),
    _higher("likelihood", "likelihood", "likelihood of the answer"),
    _higher("bleu", "BLEU", "BLEU"),
    _higher("chrf", "chrF", "chrF"),
    _lower("ter", "TER", "translation edit rate"),
    _lower("brier_score", "Brier", "Brier score"),
)
_BY_NAME = {each.name: each for each in _KNOWN}


def metric_info(name: str, *, higher_is_better: bool | None = None, unit: str = "") -> MetricInfo:
    """What is known of the metric; `higher_is_better` and `unit` as stored with a value win over the registry.

    `name` may carry a variant behind a comma: lm-eval's filter ("exact_match,flexible-extract"), a type of layer
    ("input_kurtosis,q_proj"). An unknown name is its own
    label, without a direction unless one is given.
    """
    base, _, variant = name.partition(",")
    found = _BY_NAME.get(base)
    if found is None:
        found = MetricInfo(name=name, label=base, quantity=base, headline=higher_is_better is not None)
    label = f"{found.label} {variant}".strip()
    direction = found.higher_is_better if higher_is_better is None else higher_is_better
    return replace(
        found,
        name=name,
        label=label,
        higher_is_better=direction,
        unit=found.unit or ("" if unit in (name, base, *_PLAIN) else unit),
    )


def items_of(evaluator: str) -> str:
    """What an evaluator's n counts, in the plural: "windows", "documents", "items"."""
    return _ITEMS.get(evaluator, "items")
