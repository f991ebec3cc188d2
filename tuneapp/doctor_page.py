"""What an examination found, as one HTML page that needs nothing but itself."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from tuneapp.data.decode import Unreadable
from tuneapp.data.examples import SPLITS, Example
from tuneapp.data.findings import Finding
from tuneapp.data.reading import read_example
from tuneapp.errors import DataError
from tuneapp.examination import LONG, SMALL, Examination, Spread, printable
from tuneapp.rundir import write_atomically

THUMBNAIL = 96
"""Pixels of the longer side of an image on the page."""
MAX_OF_FINDING, MAX_ON_PAGE = 12, 300
"""Images that are shown: of each finding, and in all."""

_MAX_NAMED = 40  # images that cannot be shown and are named, of a finding
_IMAGENET = (("ImageNet mean", (0.485, 0.456, 0.406)), ("ImageNet std", (0.229, 0.224, 0.225)))


def write_page(file: Path, examination: Examination, exclusions: Path | None, command: str) -> None:
    """Write the page, whole or not at all.

    Args:
        file: where to.
        examination: what was found.
        exclusions: the list of what to leave out, if there is one.
        command: what to do next.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuneapp"),
        autoescape=True,  # names of files and classes are anybody's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("doctor.html").render(
        **_overview(examination),
        **_tables(examination),
        findings=list(_findings(examination)),
        exclusions=printable(str(exclusions)) if exclusions else "",
        num_excluded=examination.num_excluded,
        command=printable(command),
    )
    write_atomically(file, lambda aside: aside.write_text(page, encoding="utf-8"))


def _overview(examination: Examination) -> dict[str, Any]:
    images = examination.images
    bad = sum(bool(e.bad) for e in images.examples)
    facts = [
        ("images", len(images.examples)),
        ("classes", len(images.classes)),
        *((split, len(images.of(split))) for split in SPLITS),
        ("unreadable", bad),
    ]
    return {
        "name": printable(images.data.source),
        "facts": [(what, f"{number:,}") for what, number in facts],
        "num_serious": sum(finding.is_serious for finding in examination.findings),
    }


def _findings(examination: Examination) -> Iterator[dict[str, Any]]:
    by_path = {e.path: e for e in examination.images.examples}
    causes = dict(examination.images.skipped)
    room = MAX_ON_PAGE
    for finding in examination.findings:
        thumbs: list[dict[str, str]] = []
        names: list[str] = []
        shown = 0
        for path in dict.fromkeys(finding.paths):
            if len(thumbs) >= min(MAX_OF_FINDING, room) or len(names) >= _MAX_NAMED:
                break
            shown += 1
            example = by_path.get(path)
            jpeg = "" if example is None or example.bad else _thumbnail(examination, example)
            if example is not None and jpeg:
                thumbs.append({"jpeg": jpeg, "caption": _caption(examination, example)})
            else:
                cause = causes.get(path, "") if example is None else example.bad
                names.append(printable(f"{path} {cause}"))
        room -= len(thumbs)
        yield _finding(finding, thumbs, names, len(set(finding.paths)) - shown)


def _finding(
    finding: Finding, thumbs: list[dict[str, str]], names: list[str], num_more: int
) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "is_serious": finding.is_serious,
        "words": printable(finding.words),
        "thumbs": thumbs,
        "names": names,
        "num_more": num_more,
    }


def _caption(examination: Examination, example: Example) -> str:
    names = ", ".join(examination.images.classes[label] for label in example.labels)
    fold = f", fold {example.fold}" if example.fold else ""
    return printable(f"{example.path} ({names or 'no class'}, {example.split}{fold})")


def _thumbnail(examination: Examination, example: Example) -> str:
    """Return a small JPEG of an image in base64; nothing if it cannot be read any more."""
    try:
        image = read_example(examination.images, example)
    except (Unreadable, DataError):
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode("ascii")


def _tables(examination: Examination) -> dict[str, Any]:
    images = examination.images
    present = [split for split in SPLITS if images.of(split)]
    counts = [images.counts(split) for split in present]
    largest = max((count for column in counts for count in column), default=0) or 1
    colours = examination.colours
    own = [] if colours is None else [("mean", colours.mean), ("std", colours.std)]
    return {
        "splits": present,
        "classes": [
            {
                "name": printable(name),
                "cells": [(column[i], round(100 * column[i] / largest, 1)) for column in counts],
            }
            for i, name in enumerate(images.classes)
        ],
        "spreads": [{"name": s.name, "cells": _cells(s)} for s in examination.spreads],
        "size_lines": _size_lines(examination),
        "colours": [*own, *_IMAGENET] if own else [],
        "pixels": f"{colours.pixels:,}" if colours else "",
    }


def _cells(spread: Spread) -> list[str]:
    values = (spread.least, spread.low, spread.median, spread.high, spread.most)
    return [f"{value:,.0f}" if value >= 20 else f"{value:.3g}" for value in values]


def _size_lines(examination: Examination) -> list[str]:
    formats = ", ".join(f"{name} {count:,}" for name, count in examination.formats.items())
    return [
        f"{examination.num_small:,} image(s) have fewer than {SMALL} pixels on the shorter side; "
        f"{examination.num_long:,} are longer than {LONG:g} : 1.",
        f"Formats: {formats}. {examination.num_turned:,} are turned as EXIF says; "
        f"of {examination.num_animated:,} with several frames the first one is taken.",
    ]
