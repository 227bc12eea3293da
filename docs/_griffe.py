"""Shows values to the API pages: `@value` makes a keyword-only dataclass, which griffe cannot know by itself."""

import griffe


class Values(griffe.Extension):
    """Reads `@value` as `@dataclass(kw_only=True)`, and types without the bounds that the text next to them states."""

    def on_class_instance(self, *, cls: griffe.Class, **_: object) -> None:
        """Exchange the decorator, before griffe's own extension looks for dataclasses."""
        for decorator in cls.decorators:
            if decorator.callable_path == "unbackdoor._value.value":
                keyword = griffe.ExprKeyword("kw_only", "True")
                decorator.value = griffe.ExprCall(griffe.ExprName("dataclasses.dataclass"), [keyword])

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Take `Annotated[int, Field(ge=1)]`, or a private name for it in the same module, as `int`."""
        declared = attr.annotation
        if isinstance(declared, griffe.ExprName) and declared.name.startswith("_"):
            alias = attr.module.members.get(declared.name)
            declared = alias.value if isinstance(alias, griffe.Attribute) else declared
        if isinstance(declared, griffe.ExprSubscript) and declared.canonical_path == "typing.Annotated":
            attr.annotation = declared.slice.elements[0]
