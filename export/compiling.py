"""A model that does not compile, in one line: which graph, for which operator, and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from fedtt.errors import ConfigError, FedttError

from .request import RuntimeKind

__all__ = ["compiling", "does_not_compile"]

_REMEDIES: dict[RuntimeKind, str] = {
    "onnxruntime": "choose another model, or another activation in its config.json",
    "executorch": "export with --runtime onnxruntime, or choose another model",
}
_OPERATOR = re.compile(r"\b(?:aten|prims?)(?:::|\.)\w+(?:\.\w+)?")
_COLOUR = re.compile(r"\x1b\[\d*m")
_LONGEST = 200  #: characters of what an exporter said


@contextlib.contextmanager
def compiling(graph: str, runtime: RuntimeKind) -> Iterator[None]:
    """Turn what torch's exporters raise about a graph into a ConfigError; they have no error of their own."""
    try:
        yield
    except (FedttError, OSError, MemoryError):
        raise
    except Exception as error:
        raise does_not_compile(graph, runtime, _reason(error)) from error


def does_not_compile(graph: str, runtime: RuntimeKind, reason: str) -> ConfigError:
    """reason: a clause whose subject is the graph."""
    allowed = f"only for a model that compiles for it; {graph} {reason}: {_REMEDIES[runtime]}"
    return ConfigError("runtimes", runtime, allowed)


def _reason(error: BaseException) -> str:
    """The operator, where one is named, and the first line of what went wrong first."""
    errors = [error]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    texts = [_COLOUR.sub("", str(each)).strip() for each in reversed(errors)]
    said = f"{type(errors[-1]).__name__}: {texts[0].split(chr(10))[0]}"[:_LONGEST]
    operator = next((found.group() for text in texts if (found := _OPERATOR.search(text))), None)
    return f"has {operator} ({said})" if operator else f"cannot be traced or converted ({said})"
