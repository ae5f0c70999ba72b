"""What a pipeline step is: a frozen record of options that maps a block's state to the next one.

The engine shows a stage a `BlockView` and installs the `Outcome` that comes back; a stage changes nothing itself.
A step that works group by group behind the already quantized groups (GPTQ) and one that sees the whole block (AWQ)
have the same shape: `view.groups` says what the call is about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from qbench.calibration.statistics import Statistic
from qbench.errors import NumericsError, SpecError
from qbench.formats import QTensor, Range, TensorFormat
from qbench.formats.scheme import InputFormat, Scheme
from qbench.structure.trace import BlockStructure, LinearGroup
from qbench.structure.weights import WeightRef

if TYPE_CHECKING:
    from qbench.structure.online import InputTransform

StreamName = Literal["full", "quantized"]
AnyStatistic = TypeVar("AnyStatistic", bound=Statistic)


class Kind(IntEnum):
    """Legal order of stages in a pipeline. ROTATE acts on the whole model, before any hidden state is computed."""

    ROTATE = 0
    TRANSFORM = 1
    PROTECT = 2
    SPARSIFY = 3
    RANGE = 4
    ROUND = 5
    RECONSTRUCT = 6


@dataclass(frozen=True)
class Need:
    """A statistic of every group's input, on the untouched model's stream ("full") or behind the blocks and groups
    that are already quantized ("quantized")."""

    statistic: type[Statistic]
    stream: StreamName


@dataclass(frozen=True, kw_only=True)
class WeightShape:
    """A weight that is going to be quantized, or (`experts`) all experts' slices of one parameter."""

    name: str
    format: TensorFormat
    out_features: int
    in_features: int
    experts: bool = False


@dataclass(frozen=True)
class ScopeCall:
    """One captured call of a submodule of the block on a sample of the full-precision stream, and its output."""

    module: str
    args: tuple
    kwargs: Mapping[str, object]
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockData:
    """The calibration sequences at one block, for stages that learn.

    inputs: chunks [sequences, length, hidden] that enter the block on the quantized stream; full_inputs: the same on
    the full-precision stream; targets: what the untouched block makes of full_inputs. student(parameters, hidden): the
    block's output with `parameters` (by path; the others as they are) in place of its own and with everything that is
    quantized at run time quantized, differentiable straight through the rounding. teacher(hidden): the current block's
    output in full precision, without gradients. `hidden` holds the stage's `batch` sequences, a remainder of that, or
    a chunk: masks and positions are known for those shapes. report(step, steps, loss) shows progress.
    """

    inputs: tuple[Tensor, ...]
    full_inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    student: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor]
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """What a stage may look at. `block` holds the current (transformed, partly quantized) parameters: read only.

    statistics: by group index, then type, already transformed along with the weights. scopes: by group index, the
    calls of the group's scope modules in the block as it is now, with their outputs in full precision, on as many
    tokens as the stage asks for (`scope_tokens`). inputs: by weight name, how the weight's input is quantized at run
    time; absent where it is not. data: only for stages that learn (`trains`). index, count: which block it is, of how
    many.
    """

    block: nn.Module
    structure: BlockStructure
    groups: tuple[LinearGroup, ...]
    formats: Mapping[str, TensorFormat]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    statistics: Mapping[int, Mapping[type, Statistic]] = field(default_factory=dict)
    scopes: Mapping[int, tuple[ScopeCall, ...]] = field(default_factory=dict)
    inputs: Mapping[str, InputFormat] = field(default_factory=dict)
    data: BlockData | None = None
    generator: torch.Generator | None = None
    index: int = 0
    count: int = 1
    where: str = ""

    def weight(self, ref: WeightRef) -> Tensor:
        """Current weight, [out, in], a view of the live parameter."""
        return ref.read(self.block)

    def format(self, ref: WeightRef) -> TensorFormat:
        return self.formats[ref.name]

    def statistic(self, group: LinearGroup, kind: type[AnyStatistic]) -> AnyStatistic:
        """What is known of the group's input. NumericsError where that is not finite."""
        found = self.statistics[group.index][kind]
        if not torch.isfinite(found.value()).all():
            raise NumericsError(f"{self.where}, {group.weights[0].name}: input of the layer is not finite")
        return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage decided. parameters: changed full-precision parameters of the block by path. input_scales: by
    group, the vector [in] by which the group's input is now divided. online: by group, what the group's input goes
    through from now on, whenever the block runs. ranges, codes: by weight name. metrics: (module, name, value) for the
    layer metrics. observe_again: inputs of layers changed in a way that statistics cannot follow (a shift), so that
    later stages need them collected anew."""

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    input_scales: Mapping[int, Tensor] = field(default_factory=dict)
    online: Mapping[int, InputTransform] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    codes: Mapping[str, QTensor] = field(default_factory=dict)
    metrics: tuple[tuple[str, str, float], ...] = ()
    observe_again: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """Base of all stages: hyperparameters as fields with the authors' defaults; `name` is how a pipeline calls it.

    version: raise it when the same options give other numbers; it is part of every run's key. zero_point: the kind of
    zero points ("int", "float") that asymmetric integers get where the configuration leaves it open. transforms:
    whether a stage of another kind than TRANSFORM also moves scales through folds: then the engine proves that the
    block still computes its function. trains: whether it learns from `view.data`.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    version: ClassVar[int]
    needs: ClassVar[frozenset[Need]]
    uses_random: ClassVar[bool] = False
    zero_point: ClassVar[str | None] = None
    transforms: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    @property
    def needs_data(self) -> bool:
        """Whether calibration text changes what the stage does."""
        return bool(self.needs) or self.scope_tokens > 0 or self.trains

    @property
    def moves_inputs(self) -> bool:
        """Whether an outcome may ask for statistics to be collected anew (`observe_again`)."""
        return False

    @property
    def uses_ranges(self) -> bool:
        """Whether it starts from, or rounds on, the ranges that an earlier stage chose, instead of its own."""
        return True

    @property
    def online(self) -> bool:
        """Whether inputs of linear layers go through something else at run time, which no plain checkpoint can say."""
        return False

    @property
    def batch_size(self) -> int:
        """Sequences per minibatch of a stage that learns."""
        return 1

    @property
    def scope_tokens(self) -> int:
        """Tokens of the full-precision stream on which the stage searches through whole modules; 0 for none."""
        return 0

    def check(self, formats: frozenset[TensorFormat]) -> None:  # noqa: B027 - many stages accept everything
        """Raises SpecError for options or formats that the stage cannot serve; called before any weights load."""

    def check_later(self, later: Sequence[Stage]) -> None:  # noqa: B027 - most stages do not care
        """Raises SpecError for options that the stages behind it leave without effect; called before `check`."""

    def check_scheme(self, scheme: Scheme) -> None:  # noqa: B027 - most stages look at weights only
        """Raises SpecError for formats of inputs or cache that the stage cannot serve; called right after `check`."""

    def check_shapes(self, shapes: Sequence[WeightShape]) -> None:  # noqa: B027 - most stages take any
        """Raises SpecError for quantized weights of the blocks that the stage cannot serve; called before weights
        load, from the model's configuration."""

    @abstractmethod
    def apply(self, view: BlockView) -> Outcome:
        """What the stage decides about `view.groups`; it changes nothing that the view shows."""

    @classmethod
    def options(cls) -> dict[str, object]:
        """Option names and defaults."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def require(condition: bool, option: str, value: object, accepted: str) -> None:
    """Raises SpecError unless `condition` holds."""
    if not condition:
        raise SpecError(option, value, accepted)
