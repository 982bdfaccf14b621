"""Mutation tests of the reader of untrusted files: is each piece of its code needed by some test?

`python -m tests.hostile.mutate` changes the files of READER in one place at a time (another comparison, a
number one larger, a condition turned round, a statement left out) and runs TESTS against each such mutant, in
a process of its own that may take LIMIT seconds. Mutants that no test notices are printed.
`python -m tests.hostile.mutate zip_reader 100-120` looks at these lines of one file. It needs os.fork.

Tests that measure time or the memory of the process are left out: what they see is not the same each time.

Of 1302 mutants 19 remain, on 2026-11-21. They mean the same, or differ in speed alone:

- zip_reader, WORTH_A_THREAD (3) and `workers` (4): how many threads compute checksums.
- zip_reader, `0xFFFF` and `at + 1` in the search for the end (2): one byte more to look at, or one less, in
  which no end that counts can begin; `at >= 0` to `at >= -1` (1): a slice from -1 is empty.
- zip_reader, `at + CENTRAL.size > end` (1) and `at + 4 <= len(extra)` (2): an entry needs a name, a field a
  number, so that one which ends just there is refused by the next check.
- zip_reader, `member.size + 1 - len(raw)` (1): a second byte too many before the member is refused.
- pickle_reader, `end < 0` (2): no line begins at byte 0 of a pickle.
- `zip(strict=True)` in all three places (3): the lengths are known to be equal.
"""

from __future__ import annotations

import ast
import copy
import gc
import importlib.abc
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
READER = {  # and the tests that find most
    "pickle_names": "formats/test_pickle_names.py",
    "pickle_reader": "formats/test_pickle_reader.py",
    "rebuild": "formats/test_rebuild.py",
    "legacy": "formats/test_legacy.py",
    "zip_reader": "formats/test_zip_reader.py",
}
TESTS = [*dict.fromkeys(READER.values()), "formats/test_checkpoints.py", "hostile/test_refusals.py"]
LIMIT = 30  # seconds for the tests of one mutant
MEMORY = 8 << 30  # bytes of address space

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
# Messages may be worded in any way, and a module that is not imported is simply missing.
SKIPPED = (ast.Import, ast.ImportFrom, ast.JoinedStr)
ANNOTATIONS = {"annotation", "returns"}


def alternatives(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of `node`. None: nothing, in a list of things."""
    match node:
        case ast.Compare(ops=[op, *others]):
            for other in COMPARISONS[type(op)]:
                yield ast.Compare(node.left, [other(), *others], node.comparators)
            if others:  # a < b < c
                for other in COMPARISONS[type(others[-1])]:
                    yield ast.Compare(node.left, [op, *others[:-1], other()], node.comparators)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, ARITHMETIC[type(op)](), value)
            yield ast.Pass()
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.IfExp(test, one, other):
            yield ast.IfExp(test, other, one)
        case ast.If(ast.BoolOp() | ast.Call() | ast.Name() | ast.Attribute() as test, body, other):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, other)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Constant(str(value)):
            yield ast.Constant(value + "x")
        case ast.Constant(bytes(value)):
            yield ast.Constant(bytes([value[0] ^ 0x40]) + value[1:] if value else b"x")
        case ast.Slice(lower, upper, step) if lower and upper:
            yield ast.Slice(lower, None, step)
            yield ast.Slice(None, upper, step)
        case ast.Return(ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Assign() | ast.AnnAssign() | ast.Expr() | ast.Raise() | ast.Break():
            yield ast.Pass()
        case ast.comprehension(target, iterated, [_, *_], is_async):
            yield ast.comprehension(target, iterated, [], is_async)
        case ast.match_case() | ast.Starred():
            yield None
        case ast.match_case(pattern, ast.expr(), body):
            yield ast.match_case(pattern, None, body)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Parent, field, index (in a list) and node of everything below `node` that may change."""
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED) or field in ANNOTATIONS:
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            yield node, field, i, child
            # Of a refusal, only that it happens matters here, not its words.
            if not isinstance(child, ast.Raise):
                yield from places(child)


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, description and code of each mutant: `tree` itself, which is changed back afterwards."""
    for parent, field, i, node in list(places(tree)):
        for other in alternatives(node):
            kept = getattr(parent, field)
            if i is None:
                changed: Any = other
            else:
                changed = kept[:i] + ([] if other is None else [other]) + kept[i + 1 :]
            setattr(parent, field, changed)
            placed: Any = getattr(node, "pattern", getattr(node, "target", node))
            shown = ast.unparse(other).splitlines()[0] if other else "nothing"
            yield placed.lineno, f"{ast.unparse(node).strip().splitlines()[0]}  ->  {shown}", tree
            setattr(parent, field, kept)


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `code` under `name`."""

    def __init__(self, name: str, code: ast.Module) -> None:
        self.name, self.code = name, ast.fix_missing_locations(copy.deepcopy(code))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.code, self.name, "exec"), module.__dict__)


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass. Their process has all that is slow to import, but nothing of ours."""
    import pytest

    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.meta_path.insert(0, mutant)
        own = READER[mutant.name.removeprefix("ldm.formats.")]
        for tests in [own], [file for file in TESTS if file != own]:
            paths = [str(ROOT / "tests" / file) for file in tests]
            if status := pytest.main(["-x", "--assert=plain", "-p", "no:cacheprovider", *paths]):
                os._exit(status)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status not in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
    return status == 0


def examine(name: str, first: int, last: int) -> tuple[int, int]:
    """Number of mutants of one file, and of those that no test noticed, which are printed."""
    source = (ROOT / f"ldm/formats/{name}.py").read_text("utf-8")
    module = f"ldm.formats.{name}"
    if not survives(Mutant(module, ast.parse(source))):
        sys.exit("the tests fail without a change, too")
    count = survived = 0
    for line, description, code in mutants(ast.parse(source)):
        if first <= line <= last:
            count += 1
            if survives(Mutant(module, code)):
                survived += 1
                print(f"{name}.py:{line}: {description}", flush=True)
    return count, survived


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import tests.conftest  # noqa: F401 - which imports torch

    gc.freeze()  # so that no child looks through all of it

    lines = [int(n) for n in sys.argv[2].split("-")] if len(sys.argv) > 2 else [1, 10**6]
    counts = [examine(name, *lines) for name in sys.argv[1:2] or READER]
    every, survivors = (sum(column) for column in zip(*counts, strict=True))
    print(f"{every - survivors} of {every} mutants are noticed: {(every - survivors) / every:.1%}")
