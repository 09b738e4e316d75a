"""List files, JSON as SSv2 has it or CSV, as rows: which video, which part of it, which label."""

import csv
import io
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np

from salt.errors import InputError
from salt.folders import SPLIT_WORDS, VIDEO_SUFFIXES, find_videos, is_clean


class Row(NamedTuple):
    id: str
    path: str | None  # None where the list names a video that the folder lacks
    label: str | None  # SSv2: the template without brackets; None in unlabelled lists
    start: float | None = None  # seconds from the file's first frame on: the row is this
    end: float | None = None  # stretch of it; None: from the beginning, to the end


def read_list(path, folder, log=lambda line: None):
    if path.endswith(".csv"):
        return read_csv(path, folder, log)
    return read_json(path, find_videos(folder, log), log)


def is_stretch(row):
    return row.start is not None or row.end is not None


def check_id(name, where):
    if not name or name in (".", "..") or re.search(r"[/\\]", name) or not is_clean(name):
        raise InputError(
            f"{where}: the id {name!r} is no plain file name; an id has no slashes, control"
            " characters or broken UTF-8, with which it could leave the video folder"
        )
    return name


def read_json(path, videos, log=lambda line: None):
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not a readable JSON list: {error}") from None
    if not isinstance(entries, list):
        raise InputError(
            f"{path} holds {'an object' if isinstance(entries, dict) else type(entries).__name__},"
            " as a label table "
            f'does; a split list is a JSON list of objects with an "id"'
        )
    rows, keys = [], set()
    for number, entry in enumerate(entries):
        where = f"{path}, row {number}"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("id"), (str, int))
            or isinstance(entry["id"], bool)
        ):
            raise InputError(f'{where}: {json.dumps(entry)[:80]} is not an object with an "id"')
        if "start" in entry or "end" in entry:
            raise InputError(
                f"{where} is a stretch of a video; a JSON list has none: use a CSV with the columns"
                " path,start,end,label"
            )
        keys |= entry.keys()
        name = check_id(str(entry["id"]), where)
        label = entry.get("template", entry.get("label"))
        if label is not None and not isinstance(label, str):
            raise InputError(f"{where}: the label {label!r} is not a string")
        rows.append(Row(name, videos.get(name), label and label.replace("[", "").replace("]", "")))
    if not rows:
        raise InputError(f"{path} is empty; a split list has a row a video")
    ignored = sorted(keys - {"id", "template", "label", "placeholders"})
    if ignored:
        log(f"{path}: keys not used: {', '.join(ignored)}; those that are: id, template, label")
    return rows


PATH_COLUMNS = ("path", "video", "filename", "file", "file_name", "filepath", "video_path")


def read_csv(path, folder=None, log=lambda line: None):
    """Rows of a CSV list. Relative paths start from the data folder and may not leave it.

    A first line may name the columns, in any order: path (or one of PATH_COLUMNS), label, start and
    end in seconds, id. Without it a row is a path and an optional label. The separator is a comma,
    semicolon or tab, whichever comes first outside quotes; where there is none, a space may stand
    between path and label, as in V-JEPA's lists. The id is the path without suffix, with the
    stretch after it ("pick/a@1.5-3") where the row is one. The data folder is the list's own by
    default. Rows that are not good are left out and logged; raises InputError where none is good.
    """
    folder = folder or os.path.dirname(path) or "."
    columns, lines = csv_columns(path, csv_lines(path))
    if not lines:
        raise InputError(f"{path} is empty; a row is a path and an optional label")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice: {','.join(columns)}")
    refuse_hidden_columns(path, columns, lines, log)
    rows, bad = [], []
    for number, fields in lines:
        try:
            rows.append(csv_row(columns, fields, folder))
        except InputError as error:
            bad.append(f"line {number}: {error}")
    told = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if not rows:
        raise InputError(
            f"{path} has no row of a video in {folder}: {told}. "
            "A row is a path and an optional label, or what a "
            "first line like path,label,start,end,id names"
        )
    if bad:
        log(f"{path}: {len(bad)} rows not used: {told}")
    return rows


def csv_columns(path, lines):
    """(names of the columns, the lines without one that names them)."""
    if not lines:
        return ["path", "label"], lines
    first = ["path" if name.lower() in PATH_COLUMNS else name.lower() for name in lines[0][1]]
    if "path" in first and not any(name.endswith(VIDEO_SUFFIXES) for name in first):
        return first, lines[1:]
    if {"start", "end", "label", "id"} & set(first):
        raise InputError(
            f"{path} names the columns {','.join(first)} in its first line, but none that "
            f"holds the videos; call it path ({', '.join(PATH_COLUMNS[1:])} do, too)"
        )
    return ["path", "label"], lines


def refuse_hidden_columns(path, columns, lines, log):
    """Raises InputError where a column that is not read looks like times or splits."""
    ignored = [name for name in columns if name not in ("path", "label", "start", "end", "id")]
    if ignored:
        log(
            f"{path}: columns not used: {', '.join(ignored)}; "
            "those that are: path, label, start, end, id"
        )
    for column in [*ignored, *({"label"} & set(columns))]:
        if re.match(r"(start|end|begin|stop)(_|$)|.*_(start|end)$", column):
            raise InputError(
                f"{path} has a column {column}, which is not read: call it start or end, in"
                " seconds, or leave it out"
            )
        place = columns.index(column)
        parts = {fields[place].lower() for _, fields in lines if len(fields) > place}
        named_so = column in ("split", "subset", "partition") or parts <= set(SPLIT_WORDS)
        if named_so and len(parts) > 1:
            raise InputError(
                f"{path} has a column {column} of {', '.join(sorted(parts)[:3])}, which is not"
                " read: write train.csv and validation.csv"
            )


def csv_lines(path):
    """[(line number, fields)] of a CSV file, without spaces around fields and empty lines."""
    try:
        with open(
            path, newline="", encoding="utf-8-sig"
        ) as file:  # spreadsheets write a byte-order mark
            text = file.read()
        separator = re.search(r"[,;\t]", re.sub(r'"[^"]*"', "", text))
        reader = csv.reader(
            io.StringIO(text),
            delimiter=separator[0] if separator else ",",
            skipinitialspace=True,
            strict=True,
        )
        lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV list: {error}") from None
    kept = []
    for number, fields in lines:
        if not separator and fields and not fields[0].lower().endswith(VIDEO_SUFFIXES):
            fields = fields[0].rsplit(None, 1)  # a path, which may hold spaces, and a label
        while fields and not fields[-1]:
            fields.pop()
        if fields:
            kept.append((number, fields))
    return kept


def csv_row(columns, fields, folder):
    """The Row of one line of a CSV list. Raises InputError, saying why, where it is not good."""
    if len(fields) > len(columns):
        raise InputError(f"{len(fields)} fields for the columns {','.join(columns)}")
    if any("\n" in field for field in fields):
        raise InputError("an opened quote takes in the lines after it")
    row = dict(zip(columns, fields, strict=False))
    given = row.get("path", "")
    video = os.path.normpath(given)
    if os.path.isabs(video) and os.path.commonpath(
        [video, os.path.abspath(folder)]
    ) == os.path.abspath(folder):
        video = os.path.relpath(video, os.path.abspath(folder))
    if not video.lower().endswith(VIDEO_SUFFIXES):
        raise InputError(f"{given!r} is no path of a video")
    if video.startswith("../"):
        raise InputError(f"{given!r} leaves {folder}")
    start, end = (seconds(row, name) for name in ("start", "end"))
    if (start or 0) >= (math.inf if end is None else end):
        raise InputError(f"start {start or 0} is not before end {end}")
    name = os.path.splitext(video)[0]
    if start is not None or end is not None:
        name += f"@{mark(start or 0)}-{'end' if end is None else mark(end)}"
    name = row.get("id") or name
    if not is_clean(name) or not is_clean(video):
        raise InputError(f"{name!r} has control characters or broken UTF-8")
    full = os.path.join(folder, video)
    return Row(name, full if os.path.isfile(full) else None, row.get("label") or None, start, end)


def seconds(row, name):
    """A field of a CSV row as seconds, None where it is empty.

    Raises InputError where it is no number of at least 0.
    """
    text = row.get(name)
    try:
        number = float(text) if text else None
    except ValueError:
        number = math.nan
    if number is not None and not 0 <= number < math.inf:
        raise InputError(f"the {name} {text!r} is no number of seconds")
    return number


def mark(time):
    """Seconds to the millisecond, as short as can be: 1.5, 3."""
    return np.format_float_positional(round(time, 3), trim="-")
