"""One stage during one call: which samples are computed, what its blocks add, and what stands in for the rest."""

from dataclasses import dataclass, field

from torch import Tensor

from ..adapters.block_call import Streams, join_rows, sample_row
from ..policy.forecasts import Features, advance_terms, extrapolate, inner_products
from ..policy.rules import Decision
from ..policy.stages import Stage
from .autograd import outside_graph
from .in_place import InPlaceGuard, Watched
from .run_state import SampleMemory


@dataclass(slots=True)
class SampleStep:
    """One sample of a stage on its way through one call.

    Fields:
        decision: None as long as it takes a comparison.
        probe: None where none was looked at; `deviation` is that from its reference (`policy.pfs.deviation`).
        compared: `deviation` as numbers, where the reference was finite; then the first says whether the probe is.
        difference: what was compared with the threshold, for the trace.
        coefficients: of the forecast of a sample that is skipped.
        remembered: False where the probe was not finite: what is computed is not kept.
        products: what a forecast can learn in this call.
    """

    memory: SampleMemory
    decision: Decision | None = None
    probe: Tensor | None = None
    deviation: Tensor | None = None
    compared: tuple[float, float] | None = None
    difference: float | None = None
    coefficients: list[float] = field(default_factory=list)
    remembered: bool = True
    products: Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the stage is skipped, once that is decided."""
        return self.decision is not None and self.decision.skips


@dataclass(slots=True)
class StageStep:
    """A stage on its way through one call.

    Fields:
        stage_input: the streams before the first block that can be skipped, from which residuals are counted.
        computed: the samples that are computed; `rows` is their index tensor where they are some and not all.
        added: by the model, between blocks, to each stream.
        spoiled: somebody wrote to tensors that the residual is counted from.
    """

    stage: Stage
    stage_input: Streams
    samples: list[SampleStep]
    computed: list[int] = field(default_factory=list)
    rows: Tensor | None = None
    added: list[Tensor | None] = field(init=False)
    spoiled: bool = False
    _input: Watched = field(init=False)
    _returned: Watched = field(init=False)  # what the last block that ran returned

    def __post_init__(self) -> None:
        self.added = [None] * len(self.stage_input)
        self._input = self._returned = Watched.of(self.stage_input)

    def note_additions(self, arrived: Streams) -> None:
        """Keep apart what the model added between two blocks: it is no part of the stage's residual."""
        self.spoiled |= self._returned.written_to()  # then nobody knows what was added
        for i, (now, left) in enumerate(zip(arrived, self._returned.tensors, strict=False)):
            if now is not left:
                addition = now - left
                self.added[i] = addition if self.added[i] is None else self.added[i] + addition

    def note_returned(self, streams: Streams) -> None:
        """Keep what a block returned, to tell what the model adds to it."""
        self._returned = Watched.of(streams)

    def check(self, end: Streams) -> None:
        """Take note whether anybody wrote into the stage's input. `end` left a block."""
        self.spoiled |= self._input.written_to(returned=end)

    @outside_graph
    def remember(self, end: Streams, step: int, guard: InPlaceGuard) -> None:
        """Keep the residual of every computed sample, and with it the differences that forecasts need.

        Where it is `spoiled` there is none to keep.
        """
        for number in self.computed:
            sample, memory = self.samples[number], self.samples[number].memory
            elapsed = step - memory.computed_step
            if self.spoiled:
                memory.forget()
            elif self.stage.keeps_residuals and sample.remembered:
                residual = self._residual(end, number)
                self.learn(sample, residual, memory.terms)
                memory.terms = advance_terms(memory.terms, residual, elapsed, self.stage.order_at(step))
                memory.seal()
            if sample.products is not None:
                memory.products = sample.products, elapsed
            memory.computed_step = step
        if self.spoiled:
            guard.found_in_place_writer()

    def learn(self, sample: SampleStep, computed: Features, terms: list[Features]) -> None:
        """Add up what a forecast that fits itself can learn from features which it could have forecast."""
        if self.stage.learns and len(terms) == self.stage.forecast.order + 1:
            products = inner_products([computed, *terms])
            sample.products = products if sample.products is None else sample.products + products

    def _residual(self, end: Streams, number: int) -> Streams:
        rows = zip(sample_row(end, number), sample_row(self.stage_input, number), self.added, strict=False)
        residuals = [(last - first, addition) for last, first, addition in rows]
        return tuple([part if added is None else part - added[number : number + 1] for part, added in residuals])

    def stand_in(self, end: Streams, into: Streams | None) -> Streams:
        """The end of the stage: as computed, or as arrived plus the forecast residual.

        Args:
            end: the streams at the stage's end, with computed samples in their rows.
            into: tensors that the result is written into, if they are given.
        """
        rows = []
        for number, sample in enumerate(self.samples):
            row, place = sample_row(end, number), None if into is None else sample_row(into, number)
            if sample.skips:
                row = extrapolate(sample.memory.terms, sample.coefficients, base=row, into=place)
            elif place is not None:
                for part, computed in zip(place, row, strict=True):
                    part.copy_(computed)
            rows.append(row)
        return join_rows(rows) if into is None else into
