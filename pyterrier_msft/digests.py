"""Digests and printed forms of fitters' settings."""

import copyreg
import dis
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import ir_measures
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_msft import losses
from pyterrier_msft.data.frames import frame_digest
from pyterrier_msft.model.fingerprint import tensor_bytes
from pyterrier_msft.notices import INTERNAL_PACKAGES

TEACHERS = {"teacher", "judge"}  # settings that may be the path of a ranking
LIBRARY_FOLDERS = {"site-packages", "dist-packages"}
GLOBAL_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}  # instructions that read a global
# What a class has besides behaviour; some of it differs between processes.
CLASS_METADATA = {
    "__module__", "__doc__", "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__",
    "__firstlineno__", "__static_attributes__", "_abc_impl",
}  # fmt: skip
# Where descriptors, which can't be pickled, have their functions.
DESCRIPTORS: dict[type, tuple[str, ...]] = {
    classmethod: ("__func__",), staticmethod: ("__func__",), property: ("fget", "fset", "fdel"),
    cached_property: ("func",),
}  # fmt: skip


def format_value(value: Any) -> str:
    """Format a value as a user would write it, without memory addresses or the rows of frames."""
    if isinstance(value, pd.DataFrame):
        return f"<{len(value):,} rows>"
    if inspect.isfunction(value):
        is_loss = value.__module__ == losses.__name__ and _has_its_name(value)
        return f"losses.{value.__name__}" if is_loss else value.__qualname__
    if type(value).__module__ == losses.__name__:
        return f"losses.{value!r}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {format_value(item)}" for key, item in value.items()) + "}"
    return repr(str(value)) if isinstance(value, str | Path) else re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def is_default(value: Any, field: "Field[Any]") -> bool:
    """Whether a value is the default of its field."""
    default = {} if field.default is MISSING else field.default
    if value is default or isinstance(value, pd.DataFrame):
        return value is default
    return type(value) is type(default) and bool(value == default)


def sha256_of(content: Any) -> str:
    """Digest JSON-serializable content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digestible(value: Any, name: str) -> Any:
    """Convert a setting to JSON-serializable content that changes whenever the setting does, in any process.

    This is the content of data, and the compiled code of functions and classes with the values that it refers to:
    globals, captured variables, defaults and attributes. Code of Python, of this package and of others in site-packages
    is known by its name. What a function imports when it runs isn't followed. Of other objects, the content is what
    pickle stores; `__getstate__` can leave something out. The path of a teacher is replaced with the file's content.

    Raises:
        ValueError: For a transformer, and for objects that can't be pickled, because their content isn't known.
    """
    if isinstance(value, pt.Transformer):
        raise ValueError(
            f"{name} must not be a transformer where a digest is needed; got {format_value(value)}. Apply it to the "
            f"results first, and pass its output: {name}=transformer(results)"
        )
    if name in TEACHERS and isinstance(value, Mapping):
        return sorted((str(key), digestible(item, name)) for key, item in value.items())
    if name in TEACHERS and isinstance(value, str | Path):
        return hashlib.sha256(Path(value).expanduser().read_bytes()).hexdigest()
    return _Converter(name).convert(value)


class _Converter:
    """Converts values to JSON-serializable content, see `digestible`."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the setting
        self.digests: dict[int, str] = {}  # by id
        self.kept: list[Any] = []  # the objects of these ids, kept alive so that no other object gets the same id
        self.open: list[int] = []  # the ids of the objects that are being converted, outermost first

    def convert(self, value: Any) -> Any:
        """Convert a value, each object once."""
        if value is None or isinstance(value, int | float | str):
            return value
        if id(value) in self.open:
            return ["recursion", len(self.open) - self.open.index(id(value))]
        if id(value) not in self.digests:
            self.open.append(id(value))
            content = self._content(value)
            self.open.pop()
            self.kept.append(value)
            self.digests[id(value)] = sha256_of(content)
        return self.digests[id(value)]

    def _content(self, value: Any) -> Any:
        if type(value) in {list, tuple}:
            return [self.convert(item) for item in value]
        if type(value) in {dict, MappingProxyType}:
            return _sorted([self.convert(key), self.convert(item)] for key, item in value.items())
        if type(value) in {set, frozenset}:
            return ["set", _sorted(map(self.convert, value))]
        if type(value) is bytes:
            return ["bytes", value.hex()]
        if isinstance(value, pd.DataFrame):
            return [frame_digest(value), frame_digest(value.index.to_frame())]
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), [*value.shape], hashlib.sha256(tensor_bytes(value)).hexdigest()]
        if isinstance(value, ir_measures.Measure):
            return [str(value), self.convert(type(value))]  # its attributes change in use
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        return self._object(value)

    def _function(self, function: FunctionType) -> Any:
        function = getattr(function, "_torchdynamo_orig_callable", function)  # torch.compile
        if _is_library_name(function):
            return [function.__module__, function.__qualname__]
        code, namespace = function.__code__, function.__globals__
        captured, attributes = [*map(_captured, function.__closure__ or ())], vars(function)
        values = [function.__defaults__, function.__kwdefaults__, captured]
        if _is_library(namespace.get("__name__")):  # e.g. a decorator around a user's function
            public = {name: value for name, value in attributes.items() if not name.startswith("_")}
            return [namespace["__name__"], code.co_qualname, self.convert([*values, public])]
        return [self._code(code), self._globals(code, namespace), self.convert([*values, attributes])]

    def _code(self, code: CodeType) -> Any:
        """Convert code without its place in a file."""
        constants = [self._code(item) if inspect.iscode(item) else self.convert(item) for item in code.co_consts]
        arguments = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        return [code.co_code.hex(), code.co_exceptiontable.hex(), constants, arguments, names]

    def _globals(self, code: CodeType, namespace: Mapping[str, Any]) -> Any:
        """Convert the globals that code refers to, and what it may refer to in modules of the user."""
        parts = [*_nested(code)]
        loaded = {step.argval for part in parts for step in dis.get_instructions(part) if step.opname in GLOBAL_LOADS}
        names = {name for part in parts for name in part.co_names}
        modules: list[ModuleType] = []

        def convert(values: Mapping[str, Any], referred: set[str]) -> Any:
            return [[name, convert_one(values[name])] for name in sorted(referred & values.keys())]

        def convert_one(value: Any) -> Any:
            if isinstance(value, ModuleType) and value not in modules and not _is_library(value.__name__):
                modules.append(value)
                return convert(vars(value), names)
            return self.convert(value)

        return convert(namespace, loaded)

    def _class(self, cls: type) -> Any:
        if _is_library_name(cls):
            return [cls.__module__, cls.__qualname__]
        members = {name: value for name, value in vars(cls).items() if name not in CLASS_METADATA}
        return ["class", self.convert([type(cls), cls.__bases__, members])]

    def _object(self, value: Any) -> Any:
        """Convert what pickle stores of an object."""
        for kind, names in DESCRIPTORS.items():
            if isinstance(value, kind):
                return [kind.__name__, [self.convert(getattr(value, name)) for name in names]]
        if inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value):  # a slot, or of a type in C
            return ["descriptor", value.__name__]
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise ValueError(
                f"{self.name} must consist of code and of objects that can be pickled where a digest is needed; got "
                f"{format_value(value)}: {error}. Leave it out with __getstate__, or create it where it is used"
            ) from error
        if isinstance(reduced, str):  # the name of a global, e.g. of a builtin function
            attributes = getattr(value, "__dict__", None)
            return [reduced, str(getattr(value, "__module__", "")), self.convert([type(value), attributes])]
        return [self.convert([*part] if isinstance(part, Iterator) else part) for part in reduced]


def _is_library(module: Any) -> bool:
    """Whether the name of a module is one of Python, of this package, or of an installed one."""
    if not isinstance(module, str) or module == "__main__":
        return False
    package = module.partition(".")[0]
    found = sys.modules.get(package)
    places = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", [])]
    return package in INTERNAL_PACKAGES or any(LIBRARY_FOLDERS & {*Path(place).parts} for place in places)


def _is_library_name(value: FunctionType | type) -> bool:
    """Whether the name of a function or class says what it is: that of a library, and not made by a call."""
    if not _is_library(value.__module__) or "<locals>" in value.__qualname__:
        return False
    return isinstance(value, type) or _has_its_name(value)


def _has_its_name(function: FunctionType) -> bool:
    """Whether a function is what its name stands for; a wrapper by `functools.wraps` has the name of another one."""
    named: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        named = getattr(named, part, None)
    return named is function


def _captured(cell: Any) -> Any:
    """Return the value of a captured variable; None if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield code, and the code of all functions and classes within it."""
    yield code
    for item in code.co_consts:
        if inspect.iscode(item):
            yield from _nested(item)


def _sorted(contents: Iterable[Any]) -> list[Any]:
    return sorted(contents, key=json.dumps)
