"""Inject the alignment into the text of OpenVLA-OFT's fine-tuning script.

Places are found by structure (functions, parameters, calls, names of variables), in the syntax tree, so that comments,
layout and unrelated edits of the script do not matter. Nothing else of the text changes, not even white space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import libcst as cst
from libcst import matchers as m

NAME = "rocket"  # the variable and parameter that the injected lines share
CONFIG_CLASS, FORWARD, VALIDATE, SAVE, MAIN = (
    "FinetuneConfig",
    "run_forward_pass",
    "run_validation",
    "save_training_checkpoint",
    "finetune",
)

NodeT = TypeVar("NodeT", bound=cst.CSTNode)
Edit = Callable[[cst.CSTNode], cst.CSTNode | cst.FlattenSentinel[cst.CSTNode]]


class PlaceNotFound(ValueError):
    """The script lacks a place that the injection needs, or has it twice."""


class _Edits(cst.CSTTransformer):
    """Edits of single nodes, keyed by the node of the original tree."""

    def __init__(self) -> None:
        super().__init__()
        self._edits: dict[cst.CSTNode, list[Edit]] = {}

    def add(self, node: cst.CSTNode, edit: Edit) -> None:
        self._edits.setdefault(node, []).append(edit)

    def insert_after(self, node: cst.CSTNode, comment: str, *lines: str, blank: bool = True) -> None:
        self.add(node, lambda updated: cst.FlattenSentinel([updated, *_statements(comment, lines, blank)]))

    def insert_before(self, node: cst.CSTNode, comment: str, *lines: str, blank: bool = True) -> None:
        self.add(node, lambda updated: cst.FlattenSentinel([*_statements(comment, lines, blank), updated]))

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
        for edit in self._edits.get(original_node, ()):
            updated_node = edit(updated_node)  # type: ignore[assignment]
        return updated_node


def _statements(
    comment: str, lines: Sequence[str], blank: bool
) -> list[cst.BaseCompoundStatement | cst.SimpleStatementLine]:
    """Parsed statements, the first one under a comment and, if wanted, a blank line."""
    parsed = [cst.parse_statement(line) for line in lines]
    above = [cst.EmptyLine(indent=False)] if blank else []
    above.append(cst.EmptyLine(comment=cst.Comment(f"# ROCKET: {comment}")))
    return [parsed[0].with_changes(leading_lines=above), *parsed[1:]]


def _only(candidates: Iterable[NodeT], what: str) -> NodeT:
    nodes = list(candidates)
    if len(nodes) != 1:
        raise PlaceNotFound(f"found {len(nodes) or 'no'} {what}")
    return nodes[0]


def _function(module: cst.Module, name: str) -> cst.FunctionDef:
    functions = [node for node in module.body if isinstance(node, cst.FunctionDef) and node.name.value == name]
    function = _only(functions, f"function {name}")
    if not isinstance(function.body, cst.IndentedBlock):
        raise PlaceNotFound(f"function {name} has no body of its own lines")
    return function


def _parameters(function: cst.FunctionDef) -> list[str]:
    return [parameter.name.value for parameter in function.params.params]


def _inside(node: cst.CSTNode, matcher: m.BaseMatcherNode) -> list[cst.CSTNode]:
    return list(m.findall(node, matcher))


def _assignments(function: cst.FunctionDef) -> list[tuple[cst.SimpleStatementLine, str, cst.BaseExpression]]:
    """Lines of a function that bind one plain name: (line, name, value)."""
    assignments = []
    for line in _inside(function, m.SimpleStatementLine(body=[m.Assign() | m.AnnAssign()])):
        line = cst.ensure_type(line, cst.SimpleStatementLine)
        statement = line.body[0]
        targets = (
            [target.target for target in statement.targets]
            if isinstance(statement, cst.Assign)
            else [cst.ensure_type(statement, cst.AnnAssign).target]
        )
        value = cast(cst.Assign | cst.AnnAssign, statement).value
        if len(targets) == 1 and isinstance(targets[0], cst.Name) and value is not None:
            assignments.append((line, targets[0].value, value))
    return assignments


def _calls(node: cst.CSTNode, name: str) -> list[cst.Call]:
    return [cst.ensure_type(call, cst.Call) for call in _inside(node, m.Call(func=m.Name(name)))]


def _commas(items: Sequence[cst.Arg] | Sequence[cst.Param]) -> tuple[cst.Comma, cst.Comma | cst.MaybeSentinel]:
    """Commas that separate the items of a list, and what follows its last one."""
    between = items[-2].comma if len(items) > 1 else None
    if not isinstance(between, cst.Comma):
        between = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    return between, items[-1].comma


def _with_parameter(function: cst.FunctionDef) -> cst.FunctionDef:
    """The function with one more parameter, keyword-only: every caller has to say what it aligns."""
    old = function.params
    between, last = _commas(old.params)
    kept = [*old.params[:-1], old.params[-1].with_changes(comma=between)]
    new = cst.Param(cst.Name(NAME), comma=last)
    return function.with_changes(
        params=old.with_changes(params=kept, star_arg=cst.ParamStar(comma=between), kwonly_params=[new])
    )


def _with_argument(call: cst.Call) -> cst.Call:
    between, last = _commas(call.args)
    new = call.args[-1].with_changes(
        keyword=cst.Name(NAME),
        value=cst.Name(NAME),
        star="",
        equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
        comma=last,
    )
    return call.with_changes(args=[*call.args[:-1], call.args[-1].with_changes(comma=between), new])


def _pass_along(module: cst.Module, edits: _Edits) -> None:
    """A parameter for the functions that need the alignment, and an argument wherever they are called."""
    for name, callers in ((FORWARD, (VALIDATE, MAIN)), (VALIDATE, (MAIN,)), (SAVE, (MAIN,))):
        function = _function(module, name)
        others = (function.params.star_arg, function.params.star_kwarg)
        if not function.params.params or any(isinstance(other, (cst.Param, cst.ParamStar)) for other in others):
            raise PlaceNotFound(f"function {name} takes other than plain parameters")
        edits.add(function, lambda updated: _with_parameter(cst.ensure_type(updated, cst.FunctionDef)))
        calls = _calls(module, name)
        within = [call for caller in callers for call in _calls(_function(module, caller), name)]
        if len(within) != len(calls):
            raise PlaceNotFound(f"a call of {name} outside of {' and '.join(callers)}")
        for caller in callers:
            if not any(call.args for call in _calls(_function(module, caller), name)):
                raise PlaceNotFound(f"no call of {name} in {caller}")
        for call in calls:
            edits.add(call, lambda updated: _with_argument(cst.ensure_type(updated, cst.Call)))


def _configure(module: cst.Module, edits: _Edits) -> None:
    """The imports, and the flags as a base class of the configuration."""
    imports = [node for node in module.body if m.matches(node, m.SimpleStatementLine([m.Import() | m.ImportFrom()]))]
    if not imports:
        raise PlaceNotFound("no import at the top of the file")
    edits.insert_after(
        imports[-1],
        "align hidden states with a frozen 3D teacher (rocket_align/ and rocket_join.py beside this file)",
        "from rocket_align.flags import AlignFlags",
        "from rocket_join import RocketJoin, check_flags",
    )
    classes = [node for node in module.body if isinstance(node, cst.ClassDef) and node.name.value == CONFIG_CLASS]
    config = _only(classes, f"class {CONFIG_CLASS}")
    if not any(_inside(decorator, m.Name("dataclass")) for decorator in config.decorators):
        raise PlaceNotFound(f"class {CONFIG_CLASS} is no dataclass")
    base = cst.Arg(cst.Name("AlignFlags"))
    edits.add(config, lambda updated: updated.with_changes(bases=[*cst.ensure_type(updated, cst.ClassDef).bases, base]))


def _add_loss(module: cst.Module, edits: _Edits) -> None:
    """The alignment loss, on what the policy's forward pass returned, before the loss is returned."""
    function = _function(module, FORWARD)
    if not {"vla", "batch"} <= set(_parameters(function)):
        raise PlaceNotFound(f"no parameters vla and batch of function {FORWARD}")
    outputs = [name for _, name, value in _assignments(function) if m.matches(value, m.Call(func=m.Name("vla")))]
    if len(outputs) != 1:
        raise PlaceNotFound(f"found {len(outputs) or 'no'} calls of vla in {FORWARD} whose result has a name")
    last = function.body.body[-1]
    two_names = m.Tuple([m.Element(m.Name()), m.Element(m.Name())])
    if not m.matches(last, m.SimpleStatementLine([m.Return(two_names)])):
        raise PlaceNotFound(f"no loss and metrics returned at the end of {FORWARD}")
    pair = cst.ensure_type(_inside(last, two_names)[0], cst.Tuple)
    loss, metrics = (cst.ensure_type(element.value, cst.Name).value for element in pair.elements)
    arguments = f'{loss}, {metrics}, {outputs[0]}.hidden_states, batch["pixel_values"], batch'
    edits.insert_before(
        last,
        "add the alignment loss, and what is to be logged of it",
        f"{loss}, {metrics} = {NAME}.add_loss({arguments})",
    )


def _save(module: cst.Module, edits: _Edits) -> None:
    """The projectors' file, after the block that writes the other components' files."""
    function = _function(module, SAVE)
    prefix = m.FormattedStringText(value=m.MatchIfTrue(lambda text: text.startswith("action_head--")))
    path = m.BinaryOperation(operator=m.Divide(), right=m.FormattedString(parts=[prefix, m.ZeroOrMore()]))
    blocks = [
        block
        for block in _inside(function, m.If())
        for line in cst.ensure_type(block, cst.If).body.body
        if isinstance(line, cst.SimpleStatementLine) and _inside(line, path)
    ]
    block = _only(blocks, f"place in {SAVE} that writes action_head--*")
    expression = module.code_for_node(_inside(block, path)[0]).replace("action_head--", "align_projectors--")
    edits.insert_after(block, "the projectors, beside the other components", f"{NAME}.save({expression})")


def _build(module: cst.Module, edits: _Edits) -> None:
    """In the main function: check the flags first, build the alignment as soon as the policy stands."""
    function = _function(module, MAIN)
    if not _parameters(function):
        raise PlaceNotFound(f"no parameter of function {MAIN}")
    config = _parameters(function)[0]
    body = cast(cst.IndentedBlock, function.body).body
    first = body[1 if function.get_docstring() is not None and len(body) > 1 else 0]
    edits.insert_before(first, "refuse wrong flags before anything is loaded", f"check_flags({config})", blank=False)
    lines = _assignments(function)
    if "processor" not in {name for _, name, _ in lines}:
        raise PlaceNotFound(f"no variable processor in {MAIN}")
    wraps = [line for line, name, value in lines if name == "vla" and m.matches(value, m.Call(func=m.Name("wrap_ddp")))]
    edits.insert_after(
        _only(wraps, f"line in {MAIN} that wraps vla in DDP"),
        "the teacher and the projectors, the latter in a DDP wrapper of their own",
        f"{NAME} = RocketJoin.build({config}, vla, processor)",
    )


def _train(module: cst.Module, edits: _Edits) -> None:
    """In the main function: the optimizer's list of parameters, and the metrics that are averaged and logged."""
    lines = _assignments(_function(module, MAIN))
    over_a_list = m.Call(args=[m.Arg(m.Name()), m.ZeroOrMore()])
    optimizers = [value for _, name, value in lines if name == "optimizer" and m.matches(value, over_a_list)]
    optimizer = cst.ensure_type(_only(optimizers, f"optimizer over a named list in {MAIN}"), cst.Call)
    parameters = cst.ensure_type(optimizer.args[0].value, cst.Name).value
    edits.insert_after(
        _only([line for line, name, _ in lines if name == parameters], f"line in {MAIN} that starts {parameters}"),
        "the optimizer updates the projectors too",
        f"{parameters} += {NAME}.parameters()",
        blank=False,
    )
    key = m.DictElement(key=m.SimpleString(value=m.MatchIfTrue(lambda text: text.strip("'\"") == "loss_value")))
    queues = [line for line, _, value in lines if isinstance(value, cst.Dict) and _inside(value, key)]
    line = _only(queues, f"dictionary of recent metrics in {MAIN}")
    name = next(name for other, name, _ in lines if other is line)
    edits.insert_after(line, "average and log these as well", f"{NAME}.add_queues({name})")


def inject(source: bytes) -> bytes:
    """The script with the alignment in it.

    Args:
        source: OpenVLA-OFT's vla-scripts/finetune.py.

    Raises:
        PlaceNotFound: one line that says what is missing.
    """
    try:
        module = cst.parse_module(source)
    except (cst.ParserSyntaxError, UnicodeDecodeError) as error:
        raise PlaceNotFound(f"not readable as Python ({str(error).splitlines()[0]})") from error
    if _inside(module, m.Name(NAME) | m.Name("AlignFlags")):
        raise PlaceNotFound(f"the name {NAME} or AlignFlags is in use: it was changed for the alignment before")
    edits = _Edits()
    for step in (_configure, _pass_along, _add_loss, _save, _build, _train):
        step(module, edits)
    return module.visit(edits).bytes
