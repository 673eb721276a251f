"""The stub of the extension module says what the module has, and the package documents what it exports."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest
import tenpak
from conftest import ROOT
from tenpak import _tenpak

STUB = ast.parse((ROOT / "python/tenpak/_tenpak.pyi").read_text())
#: Parts of every extension module or class that nobody calls by name.
SILENT = {"__doc__", "__module__", "__loader__", "__spec__", "__name__", "__package__", "__file__", "__all__"}


def stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Public names of a module or class of the stub, and the version."""
    out: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            out[node.target.id] = node
    return {name: node for name, node in out.items() if not name.startswith("_") or name.startswith("__")}


def runtime_names(thing: ModuleType | type) -> set[str]:
    names = {n for n in vars(thing) if not n.startswith("_") or n == "__version__"}
    return names - SILENT


def stub_signature(node: ast.FunctionDef) -> list[tuple[str, str, bool]]:
    """Name, kind and whether there is a default, of each argument."""
    arguments = node.args
    assert arguments.vararg is None and arguments.kwarg is None
    plain = [(a.arg, "positional only") for a in arguments.posonlyargs] + [
        (a.arg, "positional or keyword") for a in arguments.args
    ]
    first_default = len(plain) - len(arguments.defaults)
    out = [(name, kind, i >= first_default) for i, (name, kind) in enumerate(plain)]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    out += [(a.arg, "keyword only", default is not None) for a, default in pairs]
    return [item for item in out if item[0] not in ("self", "cls")]


def runtime_signature(function: object) -> list[tuple[str, str, bool]]:
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    out = [(p.name, p.kind.description.replace("-", " "), p.default is not inspect.Parameter.empty) for p in parameters]
    return [item for item in out if item[0] != "self"]


def test_module_and_stub_have_the_same_names() -> None:
    assert set(stub_names(STUB.body)) == runtime_names(_tenpak)


@pytest.mark.parametrize("name", [n.name for n in STUB.body if isinstance(n, ast.FunctionDef)])
def test_functions_have_the_signatures_of_the_stub(name: str) -> None:
    node = stub_names(STUB.body)[name]
    assert isinstance(node, ast.FunctionDef)
    assert stub_signature(node) == runtime_signature(getattr(_tenpak, name))
    assert node.returns is not None and all(a.annotation is not None for a in node.args.args)


@pytest.mark.parametrize("name", [n.name for n in STUB.body if isinstance(n, ast.ClassDef)])
def test_classes_have_the_members_and_signatures_of_the_stub(name: str) -> None:
    node = stub_names(STUB.body)[name]
    assert isinstance(node, ast.ClassDef)
    thing = getattr(_tenpak, name)
    members = stub_names(node.body)
    constructor = members.pop("__new__", None)
    assert set(members) == runtime_names(thing)
    for member, stub in members.items():
        assert isinstance(stub, ast.FunctionDef)
        runtime = inspect.getattr_static(thing, member)
        if any(isinstance(d, ast.Name) and d.id == "property" for d in stub.decorator_list):
            assert inspect.isgetsetdescriptor(runtime), member
        else:
            assert stub_signature(stub) == runtime_signature(getattr(thing, member)), member
    if constructor is None:
        with pytest.raises(TypeError):
            thing()
    else:
        assert isinstance(constructor, ast.FunctionDef)
        assert stub_signature(constructor) == runtime_signature(thing)


def test_final_classes_cannot_be_derived_from() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            assert any(isinstance(d, ast.Name) and d.id == "final" for d in node.decorator_list)
            with pytest.raises(TypeError):
                type("Derived", (getattr(_tenpak, node.name),), {})


def test_everything_in_the_extension_module_is_documented() -> None:
    for name in runtime_names(_tenpak) - {"__version__"}:
        thing = getattr(_tenpak, name)
        assert thing.__doc__, name
        if isinstance(thing, type):
            for member in runtime_names(thing):
                assert getattr(thing, member).__doc__, f"{name}.{member}"


def test_everything_that_is_exported_is_documented() -> None:
    assert sorted(tenpak.__all__) == list(tenpak.__all__)
    for name in set(tenpak.__all__) - {"__version__"}:
        thing = getattr(tenpak, name)
        assert inspect.getdoc(thing), name
        if isinstance(thing, type) and not issubclass(thing, Exception):
            for member, value in vars(thing).items():
                if not member.startswith("_"):
                    assert inspect.getdoc(value), f"{name}.{member}"


def test_docstrings_give_shapes_and_errors() -> None:
    for thing in (tenpak.encode, tenpak.Artifact.decode, tenpak.Artifact.planes):
        doc = inspect.getdoc(thing) or ""
        assert "shape" in doc and "Raises" in doc and "Returns" in doc, thing
    verbs = (
        tenpak.compress,
        tenpak.decompress,
        tenpak.delta,
        tenpak.export,
        tenpak.materialize,
        tenpak.merge_index,
        tenpak.verify,
        tenpak.open,
    )
    for verb in verbs:
        doc = inspect.getdoc(verb) or ""
        for parameter in inspect.signature(verb).parameters:
            assert parameter in doc, f"{verb.__name__}: {parameter}"
        assert "Raises" in doc and "Returns" in doc, verb


@pytest.mark.parametrize(
    "name",
    ["compress", "decompress", "delta", "export", "materialize", "merge_index", "verify", "encode", "decode", "open"],
)
def test_public_functions_are_annotated(name: str) -> None:
    signature = inspect.signature(getattr(tenpak, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_options_are_keywords() -> None:
    positional = {
        "compress": ["source", "output"],
        "decompress": ["artifact", "output"],
        "delta": ["base", "variant", "output"],
        "export": ["artifact", "output", "to"],
        "materialize": ["base", "deltas", "output"],
        "merge_index": ["directory"],
        "verify": ["path"],
        "open": ["path"],
    }
    for name, want in positional.items():
        parameters = inspect.signature(getattr(tenpak, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == want, name
        assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
