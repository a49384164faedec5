"""Published numbers with their sources, and citations of papers, as a data file holds them."""

from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dbp_bench.declaration import Strict, read_yaml
from dbp_bench.reporting.rendering import tex

_FILE = Path(__file__).with_name("literature.yaml")


class Source(Strict):
    """The publication that a number was read from."""

    cite: str
    url: str


class Number(Strict):
    """The published accuracies of a defense under one attack."""

    defense: str
    clean: float | None = Field(ge=0, le=100)
    """The clean accuracy in percent; null where the source doesn't state it."""
    robust: float = Field(ge=0, le=100)
    attack: str
    knows: str
    source: str
    """The key of its source in the file."""
    where: str
    """The place in the source, such as a table."""


class NumberSet(Strict):
    """Numbers that may stand in one table."""

    title: str
    data: str
    norm: str
    eps: Annotated[float, BeforeValidator(lambda value: float(Fraction(str(value))))]
    rows: list[Number]


class Paper(Strict):
    """The citation of a paper that entries name by its address."""

    url: str
    type: Literal["inproceedings", "article", "misc"]
    key: str
    title: str
    author: str
    booktitle: str | None
    year: int

    def bibtex(self) -> str:
        """An entry for a BibTeX file."""
        fields: dict[str, Any] = {"title": f"{{{tex(self.title)}}}", "author": tex(self.author)}
        if self.booktitle is not None:
            fields["booktitle"] = tex(self.booktitle)
        fields |= {"year": self.year, "url": self.url}
        lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
        return f"@{self.type}{{{self.key},\n{lines}\n}}"


class Published(Strict):
    """The contents of the file."""

    sources: dict[str, Source]
    sets: list[NumberSet]
    papers: list[Paper]

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        for row in (row for each in self.sets for row in each.rows):
            if row.source not in self.sources:
                raise ValueError(f"{row.defense}: no source {row.source!r}")
        return self

    def paper(self, url: str | None) -> Paper | None:
        """The paper at `url`, if it is known."""
        return next((paper for paper in self.papers if paper.url == url), None)


@cache
def published() -> Published:
    """The numbers and citations that come with the package."""
    return read_yaml(_FILE, Published)
