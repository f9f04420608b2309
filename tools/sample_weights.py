"""Write how often each training picture is drawn: weights.csv (path,weight), the product of the columns of --by.

    class                  1 / number of pictures with this label
    source                 1 / number of pictures of this source; source:natix=70,extra=30 draws 70% from natix
    gps:regions.csv        by km to the nearest centre (columns lat,lon): 5 below 50, 2.5 below 200, 1 below 500, else
                           0.3; a picture without a place gets the median
    hard:predictions.csv   2 for a picture of the first class that predictions on train give the second, above 0.7

Only ids of train are written; each column and an epoch drawn with them are reported. The mean weight is 1.

    python tools/sample_weights.py --data data/roadwork --by class source:natix=70,extra=30 gps:regions.csv
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import find_table, open_for, read_csv
from tools.lib.cli import Parser, run, shown
from tools.lib.files import csv_cell, csv_text

EARTH_KM = 6371.0
RINGS_KM, RING_WEIGHTS = (50, 200, 500), np.array((5.0, 2.5, 1.0, 0.3))
SAME_PLACE_KM = 0.01  # nearer than that a centre is the place of a picture
SURE, HARD_WEIGHT = 0.7, 2.0


def read_facts(table):
    """Rows of a table as dicts; names of columns without case and outer spaces."""
    header, *pieces = read_csv(table)
    names = [name.strip().casefold() for name in header]
    rows = [dict(zip(names, line)) for piece in pieces for line in piece if line]
    if odd := next((k for k, row in enumerate(rows, 1) if len(row) < len(names)), None):
        raise ValueError(f"{table}, row {odd}: fewer cells than the {len(names)} of its header; write it anew")
    return rows


def column(rows, name, table):
    if rows and name not in rows[0]:
        raise ValueError(f"{table} has no column {name}; it has {', '.join(map(shown, rows[0]))}")
    return [row[name].strip() for row in rows]


def places(rows, table):
    """[N, 2] degrees of latitude and longitude; NaN where a cell is empty."""
    texts = zip(column(rows, "lat", table), column(rows, "lon", table))
    try:
        found = np.array([[float(text or "nan") for text in pair] for pair in texts]).reshape(-1, 2)
    except ValueError as error:
        raise ValueError(f"{table}: a lat or lon is no number ({shown(error)}); correct or empty it") from None
    if (wrong := (abs(found) > (90, 180)).any(1)).any():
        raise ValueError(f"{table}, row {wrong.argmax() + 1}: {found[wrong.argmax()].tolist()} is no place on Earth")
    found[np.isnan(found).any(1)] = np.nan
    return found


def nearest_km(points, centres):
    """[N]: great circle to the nearest centre (haversine); NaN for a point without a place."""
    distance = np.full(len(points), np.inf)
    for lat, lon in np.radians(centres):
        y, x = np.radians(points).T
        h = np.sin((y - lat) / 2) ** 2 + np.cos(y) * np.cos(lat) * np.sin((x - lon) / 2) ** 2
        distance = np.minimum(distance, 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(h, 0, 1))))
    return distance


# Columns: (rows of train, all other rows, argument, name of the table) -> weights [N].


def by_class(train, others, argument, table):
    counts = Counter(labels := column(train, "label", table))
    return np.array([1 / counts[label] for label in labels])


def by_source(train, others, argument, table):
    counts = Counter(names := column(train, "source", table))
    try:
        pairs = [part.split("=") for part in argument.split(",")] if argument else [(name, 1) for name in counts]
        mix = {name.strip(): float(n) for name, n in pairs}
    except ValueError:
        raise ValueError(f"--by source:{argument}: write it like source:natix=70,extra=30") from None
    if mix.keys() != counts.keys() or not all(0 < share < np.inf for share in mix.values()):
        there = ", ".join(f"{shown(name) or '(none)'} {n}" for name, n in sorted(counts.items()))
        raise ValueError(f"--by source:{argument}: each source of train needs a share above 0; there are {there}")
    return np.array([mix[name] / counts[name] for name in names])


def by_place(train, others, argument, table):
    if not argument:
        raise ValueError("--by gps needs a table of centres: gps:regions.csv, columns lat,lon")
    centres = places(read_facts(Path(argument)), argument)
    if not len(centres) or np.isnan(centres).any():
        raise ValueError(f"{argument}: each row needs lat and lon, and there must be one")
    held, own = places(others, table), places(train, table)
    for number, centre in enumerate(centres[:, None], 1):
        if (nearest_km(held, centre) < SAME_PLACE_KM).any() and not (nearest_km(own, centre) < SAME_PLACE_KM).any():
            raise ValueError(f"{argument}, row {number}: this centre is the place of a picture outside train, which "
                             "must not decide what is trained on; take centres from a map")  # fmt: skip
    distance = nearest_km(own, centres)
    known = ~np.isnan(distance)
    if not known.any():
        raise ValueError(f"{table}: no picture of train has lat and lon; leave gps away")
    weights = RING_WEIGHTS[np.searchsorted(RINGS_KM, distance, "right").clip(max=3)]
    weights[~known] = np.median(weights[known])
    return weights


def by_errors(train, others, argument, table):
    rows = read_facts(Path(argument)) if argument else []
    classes = [name for name in (rows[0] if rows else ()) if name.startswith("p_")]
    if len(classes) != 2 or "id" not in rows[0]:
        raise ValueError(f"--by hard:{argument}: a table of predictions has id and two columns p_<class>")
    index = {csv_cell(row["path"]): i for i, row in enumerate(train)}
    if strangers := [row["id"] for row in rows if row["id"] not in index]:
        raise ValueError(f"{argument}: {len(strangers)} ids are not in train, first {shown(strangers[0])}: predict on "
                         "train alone; other pictures must not decide what is trained on")  # fmt: skip
    labels = [label.casefold() for label in column(train, "label", table)]
    if odd := set(labels) - {name[2:] for name in classes}:
        raise ValueError(f"{argument} has columns {', '.join(classes)}, but train has label {shown(min(odd))}")
    weights = np.ones(len(train))
    for row in rows:
        i = index[row["id"]]
        if labels[i] == classes[0][2:] and float(row[classes[1]]) > SURE:
            weights[i] = HARD_WEIGHT
    return weights


COLUMNS = {"class": by_class, "source": by_source, "gps": by_place, "hard": by_errors}


def report(columns, weights, train, distance, table):
    """Print each column, what is drawn of each label and source, and one drawn epoch."""
    print(f"{'column':>28} {'least':>9} {'median':>9} {'most':>9}")
    for name, w in {**columns, "all": weights}.items():
        w = w / w.mean()
        print(f"{shown(name, 28):>28} {w.min():9.3g} {np.median(w):9.3g} {w.max():9.3g}")
    drawn = np.random.default_rng(0).choice(len(train), len(train), p=weights / weights.sum())
    print(f"{'of train':>28} {'pictures':>9} {'share':>9} {'drawn':>9}")
    for name in [name for name in ("label", "source") if name in train[0]]:
        values = np.array(column(train, name, table))
        for value in sorted(set(values)):
            shares = (values == value).mean(), (values[drawn] == value).mean()
            print(f"{shown(f'{name} {value}', 28):>28} {(values == value).sum():9} {shares[0]:9.1%} {shares[1]:9.1%}")
    print(f"an epoch of {len(drawn)} draws holds {len(set(drawn.tolist()))} different pictures")
    if distance is not None:
        for name, km in (("train", distance), ("drawn", distance[drawn])):
            km = km[~np.isnan(km)]
            near = f"{(km <= 50).mean():.1%} within 50 km, {(km <= 100).mean():.1%} within 100 km"
            print(f"{name}: {near}, mean {km.mean():.0f} km")


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="data folder of photographs with _splits/splits.json")
    p.add_argument(
        "--by",
        nargs="+",
        required=True,
        metavar="COLUMN",
        help="class, source, source:a=70,b=30, gps:CENTRES.csv or hard:PREDICTIONS.csv; several are multiplied",
    )
    p.add_argument(
        "--labels", type=Path, default=Path("labels.csv"), help="table with the facts, also sought in --data"
    )
    p.add_argument("--out", type=Path, help="file to write; default: DATA/_labels/weights.csv")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    source = open_for(args.data, "fit")
    table = find_table(args.data, args.labels)
    paths = [path.decode() for path in source.rows.columns["path"].tolist()]
    facts = read_facts(table)
    known = dict(zip(column(facts, "path", table), facts))
    if missing := [path for path in paths if path not in known]:
        raise ValueError(f"{table} has no row of {shown(missing[0])} ({len(missing)} pictures of train); add them")
    train, inside = [known[path] for path in paths], set(paths)
    others = [row for path, row in known.items() if path not in inside]
    columns = {}
    for text in args.by:
        name, _, argument = text.partition(":")
        if name not in COLUMNS or name in {key.partition(":")[0] for key in columns}:
            raise ValueError(f"--by {text}: columns are {', '.join(COLUMNS)}, each once")
        columns[text] = COLUMNS[name](train, others, argument, table)
    weights = np.prod(list(columns.values()), 0)
    weights = weights / weights.mean()
    regions = next((text.partition(":")[2] for text in columns if text.startswith("gps")), None)
    distance = nearest_km(places(train, table), places(read_facts(Path(regions)), regions)) if regions else None
    report(columns, weights, train, distance, table)
    out = args.out or args.data / "_labels" / "weights.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, csv_text([["path", "weight"], *([p, f"{w:.9g}"] for p, w in zip(paths, weights))], exact=1))
    print(f"{out}: {len(paths)} pictures of train")
    return 0


if __name__ == "__main__":
    run(main)
