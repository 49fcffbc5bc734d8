"""The key of a method, in PEFT's registry, that PEFT doesn't know."""


class ForeignPeftType(str):
    """A PEFT type from outside PEFT's closed enum: equal to its string, with what PEFT reads off a member of the enum.

    Those are two attributes, and "PeftType.NAME" where it is written out.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return self.value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"
