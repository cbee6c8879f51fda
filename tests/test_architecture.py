"""The directions of imports and the absence of module-level state, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("modulation", "server") for path in (ROOT / folder).rglob("*.py"))
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATING_METHODS = {
    *("append", "extend", "insert", "remove", "pop", "clear", "add", "discard", "update", "setdefault"),
    *("popitem", "appendleft", "popleft", "sort", "reverse"),
}


def module_name(path: Path) -> str:
    """The dotted name of the module in `path`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, *, only_at_start: bool = False) -> Iterator[str]:
    """Every module that `path` imports, and every name it imports from one, dotted.

    `only_at_start` leaves out what functions import and what only type checkers see.
    """
    tree = ast.parse(path.read_text())
    for node in _at_start(tree) if only_at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_start(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_start(child)


def within(name: str, *packages: str) -> bool:
    """Whether the dotted `name` is one of `packages` or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(inside: str, *forbidden: str, but: str = "") -> list[str]:
    """Imports of `forbidden` packages in the modules inside `inside`."""
    return [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if within(module, inside)
        for name in imports(path)
        if within(name, *forbidden) and not (but and within(name, but))
    ]


def reached(module: str) -> set[str]:
    """Everything that importing `module` imports, ours followed to the end."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        # Importing a.b.c imports a and a.b as well; a name imported from a module is not one itself.
        for parts in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:parts])
            if part not in seen:
                seen.add(part)
                if part in MODULES:
                    waiting += imports(MODULES[part], only_at_start=True)
    return seen


def test_the_source_was_found() -> None:
    assert {"modulation.levels", "server.app", "server.engines.base"} <= set(MODULES)


def test_modulation_knows_no_server() -> None:
    assert not offenders("modulation", "server", "fastapi", "starlette", "uvicorn", "vllm")


def test_rivals_know_no_masks_and_no_demo() -> None:
    masks = ("modulation.masks", "modulation.modulator", "modulation.levels", "modulation.demo")
    assert not offenders("modulation.rivals", *masks)


@pytest.mark.parametrize("module", ["modulation.levels", "modulation.errors", "server.engines.base"])
def test_levels_errors_and_the_contract_reach_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "numpy", "safetensors"} & reached(module)


@pytest.mark.parametrize("module", ["server.app", "server.cli", "server.process", "server.engines.fake"])
def test_the_http_side_reaches_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "vllm"} & reached(module)


def test_engines_know_no_http_and_no_settings() -> None:
    http = ("fastapi", "starlette", "uvicorn", "server.routes", "server.app", "server.streaming")
    assert not offenders("server.engines", *http, "server.settings", "server.cli", "server.metrics")


def test_routes_see_the_contract_and_no_engine() -> None:
    assert not offenders("server.routes", "server.engines", but="server.engines.base")
    for module in ("server.access", "server.body", "server.metrics", "server.schemas", "server.streaming"):
        assert not offenders(module, "server.engines", but="server.engines.base")


def test_settings_are_read_only_where_parts_are_joined() -> None:
    readers = {
        module
        for module, path in MODULES.items()
        for name in imports(path)
        if within(name, "server.settings")
    }
    assert readers == {"server.app", "server.cli"}


def test_only_the_joint_knows_the_web_framework_and_the_command_line_knows_neither() -> None:
    assert not offenders("server.access", "fastapi", "starlette")
    assert not offenders("server.schemas", "fastapi", "starlette")
    assert not offenders("server.cli", "fastapi", "starlette", "uvicorn")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_keeps_no_state(path: Path) -> None:
    """Constants in capitals are fine as long as nothing in their module changes them."""
    tree = ast.parse(path.read_text())
    assert not path.read_text().strip() or ast.get_docstring(tree), "no module docstring"
    found = [f"line {node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    names = {name: value for node in tree.body for name, value in _assigned(node)}
    found += [
        f"{name}: a mutable value that is not named as a constant"
        for name, value in names.items()
        if _is_mutable(value) and not name.lstrip("_").isupper() and name != "__all__"
    ]
    found += [
        f"line {node.lineno}: changes {name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and (name := _changed(node)) in names
    ]
    assert not found


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
        yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        yield from ((one.id, node.value) for one in node.targets if isinstance(one, ast.Name))


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name | ast.Attribute):
        name = value.func.id if isinstance(value.func, ast.Name) else value.func.attr
        return name in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _changed(node: ast.expr) -> str | None:
    """The name that `node` changes in place: `X[...] = `, `del X[...]` or `X.append(...)`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return node.value.id if isinstance(node.value, ast.Name) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        on = node.func.value
        return on.id if isinstance(on, ast.Name) and node.func.attr in MUTATING_METHODS else None
    return None
