"""Write how often each training photograph is drawn: DATA/weights.csv (path,weight), the product of the columns --by.

    class                  1 / number of pictures with this label
    source                 1 / number of pictures of this source; source:natix=70,extra=30 draws 70% from natix
    gps:regions.csv        by km to the nearest centre (columns lat,lon): 5 below 50, 2.5 below 200, 1 below 500, else
                           0.3; a picture without a place gets the median
    hard:predictions.csv   2 for a picture of the first class that predictions on train give the second, above 0.7
    loss:predictions.csv   the mean log loss of its source, by predictions on train: a second run trains on what is hard

Facts are columns of DATA/labels.csv. Only ids of train are written, the mean weight is 1; each column and an epoch that
is drawn with them are reported.

    python tools/sample_weights.py --data data/roadwork --by class source:natix=70,extra=30 gps:regions.csv
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import open_for, open_source, read_csv
from tools.lib.cli import Parser, run, shown
from tools.lib.files import csv_cell, csv_text

EARTH_KM = 6371.0
RINGS_KM, RING_WEIGHTS = (50, 200, 500), np.array((5.0, 2.5, 1.0, 0.3))
SAME_PLACE_KM = 0.01  # nearer than that a centre is the place of a picture
SURE, HARD_WEIGHT = 0.7, 2.0


def fact(source, name):
    """A column of labels.csv as texts, one for each picture."""
    if name not in source.rows.columns:
        raise ValueError(f"{source.root / 'labels.csv'} has no column {name}; add it, or weigh by others")
    return source.rows.texts(name)


def read_table(path, *columns):
    """{name: cells} of a table of the user's; these columns must be there, whatever their case."""
    if not path:
        raise ValueError(f"--by gps, hard and loss need a table with columns {', '.join(columns)}: write gps:FILE")
    header, *pieces = read_csv(Path(path))
    names, rows = [name.strip().casefold() for name in header], [row for piece in pieces for row in piece if row]
    if {*columns} - {*names} or any(len(row) != len(names) for row in rows):
        raise ValueError(f"{path}: each row needs {', '.join(columns)} as its header names them; correct it")
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def places(lat, lon, where):
    """[N, 2] degrees; NaN where one is empty."""
    try:
        found = np.array([[float(text.strip() or "nan") for text in pair] for pair in zip(lat, lon)]).reshape(-1, 2)
    except ValueError as error:
        raise ValueError(f"{where}: a lat or lon is no number ({shown(error)}); correct or empty it") from None
    if len(wrong := found[(abs(found) > (90, 180)).any(1)]):
        raise ValueError(f"{where}: {wrong[0].tolist()} is no place on Earth; correct or empty it")
    return np.where(np.isnan(found).any(1, keepdims=True), np.nan, found)


def places_of(source):
    return places(fact(source, "lat"), fact(source, "lon"), source.root / "labels.csv")


def nearest_km(points, centres):
    """[N]: great circle to the nearest centre (haversine); NaN for a point without a place."""
    distance, (y, x) = np.full(len(points), np.inf), np.radians(points).T
    for lat, lon in np.radians(centres):
        h = np.sin((y - lat) / 2) ** 2 + np.cos(y) * np.cos(lat) * np.sin((x - lon) / 2) ** 2
        distance = np.minimum(distance, 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(h, 0, 1))))
    return distance


# Columns: (pictures of train, all others, argument) -> weights [N].


def by_class(train, others, argument):
    counts = Counter(labels := fact(train, "label"))
    return np.array([1 / counts[label] for label in labels])


def by_source(train, others, argument):
    counts = Counter(names := fact(train, "source"))
    try:
        pairs = [part.split("=") for part in argument.split(",")] if argument else [(name, 1) for name in counts]
        mix = {name.strip(): float(n) for name, n in pairs}
    except ValueError:
        raise ValueError(f"--by source:{argument}: write it like source:natix=70,extra=30") from None
    if mix.keys() != counts.keys() or not all(0 < share < np.inf for share in mix.values()):
        there = ", ".join(f"{shown(name) or '(none)'} {n}" for name, n in sorted(counts.items()))
        raise ValueError(f"--by source:{argument}: each source of train needs a share above 0; there are {there}")
    return np.array([mix[name] / counts[name] for name in names])


def read_centres(path):
    table = read_table(path, "lat", "lon")
    centres = places(table["lat"], table["lon"], path)
    if not len(centres) or np.isnan(centres).any():
        raise ValueError(f"{path}: each row needs lat and lon, and there must be one; correct it")
    return centres


def by_place(train, others, argument):
    centres, held, own = read_centres(argument), places_of(others), places_of(train)
    for number, centre in enumerate(centres[:, None], 1):
        if (nearest_km(held, centre) < SAME_PLACE_KM).any() and not (nearest_km(own, centre) < SAME_PLACE_KM).any():
            raise ValueError(f"{argument}, row {number}: this centre is the place of a picture outside train, which "
                             "must not decide what is trained on; take centres from a map")  # fmt: skip
    distance = nearest_km(own, centres)
    known = ~np.isnan(distance)
    if not known.any():
        raise ValueError(f"{train.root / 'labels.csv'}: no picture of train has lat and lon; leave gps away")
    weights = RING_WEIGHTS[np.searchsorted(RINGS_KM, distance, "right").clip(max=3)]
    weights[~known] = np.median(weights[known])
    return weights


def scored(train, argument):
    """A table of predictions on train -> (places in train [n], labels [n], probabilities [n, C], classes)."""
    table = read_table(argument, "id")
    if len(classes := [name[2:] for name in table if name.startswith("p_")]) < 2:
        raise ValueError(f"{argument}: columns {', '.join(table)}; a table of predictions has some named p_<class>")
    index = {csv_cell(path): i for i, path in enumerate(fact(train, "path"))}
    if strangers := [name for name in table["id"] if name not in index]:
        raise ValueError(f"{argument}: {len(strangers)} ids are not in train, first {shown(strangers[0])}: predict on "
                         "train alone; other pictures must not decide what is trained on")  # fmt: skip
    labels = [label.strip().casefold() for label in fact(train, "label")]
    if odd := {*labels} - {*classes}:
        raise ValueError(f"{argument} has classes {', '.join(classes)}, but train has label {shown(min(odd))}")
    at = np.array([index[name] for name in table["id"]], int)
    p = np.array([[float(text) for text in table[f"p_{c}"]] for c in classes]).T
    return at, np.array([classes.index(labels[i]) for i in at]), p, classes


def by_errors(train, others, argument):
    at, labels, p, classes = scored(train, argument)
    if len(classes) != 2:
        raise ValueError(f"{argument} has classes {', '.join(classes)}: hard negatives are of two classes")
    weights = np.ones(len(train))
    weights[at[(labels == 0) & (p[:, 1] > SURE)]] = HARD_WEIGHT
    return weights


def by_loss(train, others, argument):
    at, labels, p, _ = scored(train, argument)
    losses, sources = -np.log(np.maximum(p[np.arange(len(at)), labels], 1e-6)), np.array(fact(train, "source"))
    means = {name: losses[sources[at] == name].mean() for name in {*sources[at].tolist()}}
    if absent := {*sources.tolist()} - means.keys():
        raise ValueError(f"{argument} scores no picture of source {shown(min(absent))}; predict on all of train")
    return np.array([max(means[name], 1e-6) for name in sources.tolist()])


COLUMNS = {"class": by_class, "source": by_source, "gps": by_place, "hard": by_errors, "loss": by_loss}


def report(columns, weights, train):
    """Print each column, what is drawn of each label and source, and one drawn epoch."""
    print(f"{'column':>28} {'least':>9} {'median':>9} {'most':>9}")
    for name, w in {**columns, "all": weights}.items():
        w = w / w.mean()
        print(f"{shown(name, 28):>28} {w.min():9.3g} {np.median(w):9.3g} {w.max():9.3g}")
    drawn = np.random.default_rng(0).choice(len(train), len(train), p=weights / weights.sum())
    print(f"{'of train':>28} {'pictures':>9} {'share':>9} {'drawn':>9}")
    for name in [name for name in ("label", "source") if name in train.rows.columns]:
        values = np.array(fact(train, name))
        for value in sorted(set(values.tolist())):
            of_value = values == value
            shares = f"{of_value.mean():9.1%} {of_value[drawn].mean():9.1%}"
            print(f"{shown(f'{name} {value}', 28):>28} {of_value.sum():9} {shares}")
    print(f"an epoch of {len(drawn)} draws holds {len(set(drawn.tolist()))} different pictures")
    for regions in [text.partition(":")[2] for text in columns if text.startswith("gps:")]:
        distance = nearest_km(places_of(train), read_centres(regions))
        for name, km in (("train", distance), ("drawn", distance[drawn])):
            km = km[~np.isnan(km)]
            near = f"{(km <= 50).mean():.1%} within 50 km, {(km <= 100).mean():.1%} within 100 km"
            print(f"{name}: {near}, mean {km.mean():.0f} km")


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="data folder of photographs with _splits/splits.json")
    columns = "class, source, source:a=70,b=30, gps:CENTRES.csv, hard:TABLE.csv, loss:TABLE.csv; several are multiplied"
    p.add_argument("--by", nargs="+", required=True, metavar="COLUMN", help=columns)
    p.add_argument("--out", type=Path, help="file to write; default: DATA/weights.csv")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    everything = open_source(args.data)
    train = open_for(everything, "fit")
    paths = [everything.rows.columns["path"], train.rows.columns["path"]]
    others, columns = everything.take(np.flatnonzero(~np.isin(*paths))), {}
    for text in args.by:
        name, _, argument = text.partition(":")
        if name not in COLUMNS or name in {other.partition(":")[0] for other in columns}:
            raise ValueError(f"--by {text}: columns are {', '.join(COLUMNS)}, each once")
        columns[text] = COLUMNS[name](train, others, argument)
    weights = np.prod(list(columns.values()), 0)
    weights = weights / weights.mean()
    report(columns, weights, train)
    out, rows = args.out or args.data / "weights.csv", zip(fact(train, "path"), weights)
    write_text(out, csv_text([["path", "weight"], *([path, f"{weight:.9g}"] for path, weight in rows)], exact=1))
    print(f"{out}: {len(train)} pictures of train")
    return 0


if __name__ == "__main__":
    run(main)
