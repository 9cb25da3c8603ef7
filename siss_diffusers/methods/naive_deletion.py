from dataclasses import dataclass

from siss_diffusers.combine import Rule, constant_rule
from siss_diffusers.methods.base import Method, Query, Rows
from siss_diffusers.methods.siss import SISS_PAPER


@dataclass(frozen=True)
class NaiveDeletion(Method):
    """Ordinary fine-tuning on the keep set."""

    name = "naive_deletion"
    summary = "ordinary fine-tuning on the keep set"
    paper = SISS_PAPER
    has_both_sides = False

    def rule(self, scaling: Rule) -> Rule:
        return constant_rule(1.0, 0.0)

    def rows(self, query: Query) -> Rows:
        return self._keep_rows(query)
