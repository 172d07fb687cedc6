"""What came of holding a model to its description: each thing that was tried, and whether it held."""

from __future__ import annotations

from dataclasses import dataclass

from hooks import InterpError, table

GROUPS = ("sites", "executors", "identities", "generation", "paths")


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        group: one of `GROUPS`; `name`: what was tried.
        passed: whether it held; None where the model does not offer it.
        detail: why not.
    """

    group: str
    name: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        word = {True: "yes", False: "NO", None: "not offered"}[self.passed]
        return f"{self.group:11} {self.name:34} {word}{self.detail and ': ' + self.detail}"


@dataclass(frozen=True)
class Conformance:
    """What came of `conformance`.

    Attributes:
        family: what the model's adapter calls it.
        checks: all that was tried, in order.
    """

    family: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether everything that the model offers held."""
        return all(check.passed is not False for check in self.checks)

    def __bool__(self) -> bool:
        return self.passed

    def require(self) -> Conformance:
        """Itself.

        Raises:
            InterpError: something did not hold; the message lists it.
        """
        failed = [str(check) for check in self.checks if check.passed is False]
        if failed:
            raise InterpError(f"the description of {self.family} is not true of the model:\n" + "\n".join(failed))
        return self

    def of(self, group: str) -> tuple[Check, ...]:
        """The checks of a group."""
        return tuple(check for check in self.checks if check.group == group)

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.family}: {'conforms' if self.passed else 'DOES NOT CONFORM'}", *map(str, self.checks)]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        words = {True: "yes", False: "no", None: "not offered"}
        return table(("group", "what", "", ""), [(c.group, c.name, words[c.passed], c.detail) for c in self.checks])
