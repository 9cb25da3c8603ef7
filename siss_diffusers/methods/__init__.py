"""Every method is one file here and one line in `METHODS`."""

from siss_diffusers.methods.base import Method, Query, Rows
from siss_diffusers.methods.erasediff import EraseDiff
from siss_diffusers.methods.naive_deletion import NaiveDeletion
from siss_diffusers.methods.neggrad import NegGrad
from siss_diffusers.methods.redirect import Redirect
from siss_diffusers.methods.retrack import ReTrack
from siss_diffusers.methods.siss import SISS, SISSNoIS, SubscoreBernoulli


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (NaiveDeletion, NegGrad, SISS, SISSNoIS, SubscoreBernoulli, EraseDiff, ReTrack, Redirect)
}


def make_method(name: str, method_args: list[str]) -> Method:
    """Build a method from its name and `key=value` strings.

    Raises:
        ValueError: one sentence, for an unknown method or key (it lists the known ones) or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    known = METHODS[name].hyperparameters()
    values = {}
    for argument in method_args:
        key, separator, text = argument.partition("=")
        if not separator or key not in known:
            listed = ", ".join(f"{key}={value}" for key, value in known.items()) or "none"
            raise ValueError(f"method {name!r} has no argument {argument!r}; its arguments and defaults: {listed}")
        try:
            values[key] = type(known[key])(text)
        except ValueError:
            raise ValueError(f"method argument {key!r} must be of type {type(known[key]).__name__}, not {text!r}")
    return METHODS[name](**values)


__all__ = ["METHODS", "Method", "Query", "Rows", "make_method", *(method.__name__ for method in METHODS.values())]
