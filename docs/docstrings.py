"""Reads docstrings that are written as transformers writes them: references as [`~Class.method`], bare arguments."""

import re
import textwrap
from pathlib import Path

import griffe


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[)")

# What `auto_docstring` of transformers completes starts with the arguments, without a heading.
BARE_ARGUMENTS = re.compile(r"\w+ \(\[?`")

# An argument whose type is written in Markdown.
ARGUMENT = re.compile(r"^([ ]*\w[\w, ]* \()(.*?[`*].*?)(\):)", re.MULTILINE)

# By its last name, what the reference describes.
DESCRIBED = {
    path.rsplit(".", 1)[-1]: path
    for path in re.findall(r"^::: (\S+)", Path(__file__).with_name("api.md").read_text(encoding="utf-8"), re.MULTILINE)
}


class TransformersDocstrings(griffe.Extension):
    """Turns [`Name`] into a link where the reference describes it, and into plain code elsewhere."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        if pkg.name == "infini_transformers":
            # Its `__path__`, which leads to the folders at the top of a clone, is not read.
            for name in ("conversion", "evaluation"):
                pkg.set_member(name, loader.load(name))
        for member in _objects(pkg):
            if member.docstring is None:
                continue
            text = member.docstring.value
            if BARE_ARGUMENTS.match(text):
                arguments, *rest = text.split("\n\n", 1)
                text = "\n\n".join(["Args:\n" + textwrap.indent(arguments, "    "), *rest])
            text = ARGUMENT.sub(lambda match: match[1] + re.sub(r"[`*\[\]~]", "", match[2]) + match[3], text)
            member.docstring.value = REFERENCE.sub(_link, text)


def _objects(parent: griffe.Object):
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _link(match: re.Match) -> str:
    shortened, name = match.groups()
    title = name.rsplit(".", 1)[-1] if shortened else name
    for described, path in DESCRIBED.items():
        if (of_it := re.search(rf"(?:^|\.){described}((?:\.\w+)?)$", name)) is not None:
            return f"[`{title}`][{path}{of_it[1]}]"
    return f"`{title}`"
