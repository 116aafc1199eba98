"""Programs with one operator changed."""

import ast
from collections.abc import Iterator

CHANGED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(source: str, function: str) -> Iterator[str]:
    """`source` with each operator inside `function` changed in turn, in the order in which they are written."""
    for number in range(_count(source, function)):
        tree = ast.parse(source)
        _, change = _places(tree, function)[number]
        change()
        yield ast.unparse(tree)


def _count(source: str, function: str) -> int:
    return len(_places(ast.parse(source), function))


def _places(tree: ast.Module, function: str):
    found = []
    for top in tree.body:
        if getattr(top, "name", None) != function:
            continue
        for node in ast.walk(top):
            where = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
            if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in CHANGED:
                found.append((where, lambda n=node: setattr(n, "op", CHANGED[type(n.op)]())))
            if isinstance(node, ast.Compare):
                for k, op in enumerate(node.ops):
                    if type(op) in CHANGED:
                        found.append(((*where, k), lambda n=node, k=k: n.ops.__setitem__(k, CHANGED[type(n.ops[k])]())))
    return sorted(found, key=lambda pair: pair[0])
