"""The spec's section ``stopping``: what ends a trial early."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from holdfast.core.space import Number, Section, Whole

Rule = Literal["none", "asha", "hyperband", "median", "percentile", "patience", "threshold"]

OPTIONS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "asha": frozenset({"min_steps", "reduction_factor"}),
    "hyperband": frozenset({"min_steps", "reduction_factor"}),
    "median": frozenset({"min_steps", "startup_trials", "interval"}),
    "percentile": frozenset({"min_steps", "startup_trials", "interval", "percentile"}),
    "patience": frozenset({"min_steps", "patience", "min_delta"}),
    "threshold": frozenset({"min_steps", "lower", "upper", "interval"}),
}
"""What each rule takes, besides ``metric`` and ``higher_is_better``."""


class RuleSection(Section):
    """One rule."""

    rule: Rule = Field(default="none", description="none: trials run to their end")
    metric: str | None = Field(default=None, min_length=1, description="what the rule looks at; null: the first objective")
    higher_is_better: bool | None = Field(
        default=None, description="null: as the objective of that name says, else the first one"
    )
    min_steps: Whole = Field(default=1, ge=1, description="steps that every trial may do; of asha and hyperband the first rung")
    reduction_factor: Whole = Field(
        default=3, ge=2, description="asha, hyperband: one of so many goes on from a rung to the next"
    )
    startup_trials: Whole = Field(default=4, ge=1, description="median, percentile: so many other trials must have come as far")
    interval: Whole = Field(default=1, ge=1, description="median, percentile, threshold: look at each step that it divides")
    percentile: Number = Field(default=25.0, gt=0, lt=100, description="percentile: so many per cent of the trials go on")
    patience: Whole = Field(default=5, ge=1, description="patience: so many steps without a better value end a trial")
    min_delta: Number = Field(default=0.0, ge=0, description="patience: by how much a value must be better to count")
    lower: Number | None = Field(default=None, description="threshold: a value below it ends a trial")
    upper: Number | None = Field(default=None, description="threshold: a value above it ends a trial")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        allowed = OPTIONS[self.rule]
        known = frozenset[str]().union(*OPTIONS.values())
        given = self.model_fields_set & known - allowed
        given = {name for name in given if getattr(self, name) != type(self).model_fields[name].default}
        if given:
            words = ", ".join(sorted(allowed)) or "none"
            raise ValueError(f"{', '.join(sorted(given))} is no option of the rule {self.rule}; its options: {words}")
        if self.rule == "threshold":
            if self.lower is None and self.upper is None:
                raise ValueError("the rule threshold needs lower or upper")
            if self.lower is not None and self.upper is not None and self.lower > self.upper:
                raise ValueError(f"lower ({self.lower}) is above upper ({self.upper}); swap them")
        return self


class StoppingSection(RuleSection):
    """What ends a trial early."""

    max_steps: Whole | None = Field(
        default=None, ge=1, description="a class trainable ends after as many steps; rungs of asha and hyperband are below it"
    )
    also: tuple[RuleSection, ...] = Field(default=(), description="further rules: the first one that ends a trial counts")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.also and self.rule == "none":
            raise ValueError("stopping.also names further rules, but rule is none; begin with rule")
        if any(rule.rule == "none" for rule in self.also):
            raise ValueError("stopping.also holds a rule none; leave it out")
        rules: tuple[RuleSection, ...] = (self, *self.also)
        if self.max_steps is None and any(rule.rule == "hyperband" for rule in rules):
            raise ValueError("hyperband needs max_steps, the steps of a trial that is never stopped")
        for rule in rules:
            if rule.rule in ("asha", "hyperband") and self.max_steps is not None and rule.min_steps >= self.max_steps:
                raise ValueError(
                    f"min_steps ({rule.min_steps}) of {rule.rule} is not below max_steps ({self.max_steps}): it would have"
                    " no rung and never end a trial"
                )
        return self
