"""The key of a method, in PEFT's registry, that PEFT doesn't know."""


class ForeignPeftType(str):
    """A PEFT type from outside PEFT's closed enum: equal to its string, with the two attributes that PEFT reads."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)
