from dataclasses import dataclass

from siss_diffusers.combine import Rule, constant_rule
from siss_diffusers.methods.base import Method, Query, Rows


@dataclass(frozen=True)
class NaiveDeletion(Method):
    """Ordinary fine-tuning on the keep set."""

    name = "naive_deletion"
    summary = "ordinary fine-tuning on the keep set"
    has_both_sides = False

    def rule(self, scaling: Rule) -> Rule:
        return constant_rule(1.0, 0.0)

    def rows(self, query: Query) -> Rows:
        return self._keep_rows(query)
