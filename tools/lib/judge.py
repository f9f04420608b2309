"""What a probe says: its predictions beside those of baselines, with intervals over patients, in words and on a page.

    result = judge(labels, groups, {"probe": p, "size": q}, folds)      # p, q: probabilities [R, n, K]
    print(verdict(result), tone(result), compared(result, "probe", "size"))

The first of the predictions is named "probe". Whether a difference is proven is decided in `standing` alone.
"""

import functools

import numpy as np
import torch

import data
from model import build_vit
from tools.lib import fits, metrics, page, policies

CLAIMS = {  # pair whose AUCs are compared: what a proven gain means, a proven loss, neither
    ("probe", "size"): (
        "the backbone tells more than a ruler", "the ruler is better", "not shown to tell more than a ruler"
    ),
    ("size + features", "size"): ("features add to size", "features harm", "features are not shown to add to size"),
    ("probe", "random weights"): ("pretraining helps", "pretraining harms", "pretraining is not shown to help"),
    ("probe", "raw pixels"): ("more than pixels", "less than pixels", "not shown to tell more than pixels"),
}  # fmt: skip


FEWEST = 8  # groups: resampling fewer gives intervals far too short (of 2, one point)


# ----- numbers


def estimate(statistic, predictions, groups, repeats=2000):
    """statistic(p, weights) -> {name: value}, over R repeated predictions -> {name: {value, low, high, spread}}, draws.

    value: mean over the R; low, high: 95% interval over resampled groups; spread: standard deviation over the R;
    draws {name: [repeats]}: resampled means, of the same resamples for the same groups, so that they can be paired.
    """
    points = [statistic(p, None) for p in predictions]
    names = list(points[0])

    def means(weights):
        values = [statistic(p, weights) for p in predictions]
        return np.stack([np.mean([one[name] for one in values], 0) for name in names], 1)

    drawn, out = metrics.resample(means, groups, repeats), {}
    if len(np.unique(groups)) < FEWEST:
        drawn = np.full_like(drawn, np.nan)
    for name, low, high in zip(names, *metrics.interval(drawn)):
        values = [point[name] for point in points]
        out[name] = {"value": np.mean(values), "low": low, "high": high, "spread": np.std(values)}
    return {name: {k: float(v) for k, v in item.items()} for name, item in out.items()}, dict(zip(names, drawn.T))


def difference(values, draws):
    """Two values and their paired draws -> {value, low, high, p}."""
    apart = draws[0] - draws[1]
    low, high = metrics.interval(apart)
    return {"value": float(values[0] - values[1]), "low": float(low), "high": float(high), "p": metrics.p_value(apart)}


def judge(labels, groups, predictions, folds, sizes=None, repeats=2000):
    """-> {samples, patients, predictors, differences of AUC, and with sizes [n] in mm: matched, terciles}.

    folds [R, n]: by which fit each sample was predicted (see metrics.auc).
    """

    def everything(item, weights):
        return metrics.all_metrics(labels, item[0], weights, item[1])

    estimates = {name: estimate(everything, list(zip(p, folds)), groups, repeats) for name, p in predictions.items()}
    result = {"samples": len(labels), "patients": len(np.unique(groups)), "unit": "patients", "differences": {}}
    result["predictors"] = {name: values for name, (values, _) in estimates.items()}
    for pair in CLAIMS:
        if set(pair) <= set(estimates):
            values, draws = zip(*((estimates[name][0]["auc"]["value"], estimates[name][1]["auc"]) for name in pair))
            result["differences"][" - ".join(pair)] = difference(values, draws)
    result["calibration_by_chance"] = calibration_by_chance(predictions["probe"])
    return result if sizes is None else result | judge_by_size(labels, groups, predictions, folds, sizes, repeats)


def calibration_by_chance(predictions, draws=500):
    """Calibration errors where the truth follows predictions [R, n, K] exactly: their mean and 95th percentile."""
    random, errors = np.random.default_rng(0), []
    for p in (predictions[k % len(predictions)] for k in range(draws)):
        truth = (random.random((len(p), 1)) > np.cumsum(p, 1)[:, :-1]).sum(1)
        errors.append(metrics.calibration_error(truth, metrics.score_of(p)))
    return {"mean": float(np.mean(errors)), "high": float(np.quantile(errors, 0.95))}


def judge_by_size(labels, groups, predictions, folds, sizes, repeats):
    """AUC over pairs whose sizes differ by at most 10%, and within thirds of the sizes (none where one class is)."""
    edges = np.quantile(sizes, [0, 1 / 3, 2 / 3, 1])
    third = np.searchsorted(edges[1:3], sizes, "right")
    parts = [np.flatnonzero(third == k) for k in range(3)]
    result = {"matched": {"pairs": int(metrics.matched_pairs(labels, sizes).sum()), "tolerance": 0.1}}
    result["terciles"] = [{"mm": edges[k : k + 2].tolist(), "samples": len(part)} for k, part in enumerate(parts)]

    def matched(item, weights):
        return {"auc": metrics.matched_auc(labels, item[0], sizes, weights=weights, folds=item[1])}

    def within(item, weights, part):
        return {"auc": metrics.auc(labels[part], item[0][part], weights, item[1][part])}

    for name in (name for name in ("probe", "size", "random weights") if name in predictions):
        items = list(zip(map(metrics.score_of, predictions[name]), folds))
        if result["matched"]["pairs"]:
            result["matched"][name] = estimate(matched, items, groups, repeats)[0]["auc"]
        for line, part in zip(result["terciles"], parts):
            if len(np.unique(labels[part])) == 2:
                values, _ = estimate(functools.partial(within, part=part), items, groups[part], repeats)
                line[name] = values["auc"]
    return result


FRACTIONS = (0.1, 0.2, 0.5, 1.0)  # of the label-efficiency curve


def label_efficiency(predictors, labels, groups, train, seeds):
    """AUC on the other rows after fitting on a share of the training patients: {name: [[mean, low, high] or None]}.

    Low and high are the extremes over seeds; None where the share has not two patients of each class.
    """
    tenths = [fits.group_folds(labels[train], groups[train], 10, seed) for seed in range(seeds)]
    curves = {name: [] for name in predictors}
    for share in FRACTIONS:
        plans = []
        for tenth in tenths:
            fit = train.copy()
            fit[train] = tenth < 10 * share
            enough = set(labels[fit]) == set(labels) and fits.fold_count(labels[fit], groups[fit]) > 1
            plans += [(fit[None], ~train[None])] if enough else []
        predictions = fits.held_out(predictors, labels, groups, plans)[0] if len(plans) == seeds else {}
        for name, points in curves.items():
            aucs = [metrics.auc(labels[~train], metrics.score_of(p[~train])) for p in predictions.get(name, ())]
            points.append([float(np.mean(aucs)), min(aucs), max(aucs)] if aucs else None)
    return {"shares": FRACTIONS, "auc": curves}


def refuse_constant(predictions):
    """A probe that says the same of everybody has learned nothing."""
    for k, p in enumerate(predictions):
        if np.ptp(p, 0).max() < 1e-9:
            raise ValueError(f"the probe's predictions are constant (repeat {k}): features carry nothing; check --ckpt")


# ----- words: of a result as judged, or as it came back from JSON, where NaN is None


def exists(number):
    return number is not None and bool(np.isfinite(number))


def standing(result, name, other):
    """1: that `name` has the larger AUC is proven, -1: the smaller, 0: neither; None: they were not compared.

    Proven: the whole interval of the difference lies above 0, p < 0.05, and the AUC of `name` is itself above chance,
    since beating a predictor below chance proves nothing.
    """
    d, own = result["differences"].get(f"{name} - {other}"), result["predictors"][name]["auc"]
    if d is None or not exists(d["low"]):
        return None if d is None else 0
    if d["low"] > 0 and d["p"] < 0.05 and exists(own["low"]) and own["low"] > 0.5:
        return 1
    return -1 if d["high"] < 0 else 0


def in_words(item):
    """0.870 (0.801 to 0.925)"""
    if not exists(item["low"]):
        return f"{item['value']:.3f} (too few for an interval)"
    return f"{item['value']:.3f} ({item['low']:.3f} to {item['high']:.3f})"


def compared(result, name, other):
    """Proven or not, in one sentence without a full stop; "" where the two were not compared."""
    side = standing(result, name, other)
    if side is None:
        return ""
    gain, loss, neither = CLAIMS[name, other]
    d, claim = result["differences"][f"{name} - {other}"], {1: gain, -1: loss, 0: neither}[side]
    p = f", p = {d['p']:.2g}" if exists(d["p"]) else ""
    text = f"{name} minus {other} {in_words(d)}{p}: {claim}"
    if d["value"] > 0 and result["predictors"][other]["auc"]["value"] < 0.5:
        text += f" (overstated: {other} itself is below chance, 0.5)"
    return text


UNKNOWN = "what the backbone was pretrained on is unknown"


def caveats(seen, patients, known, crossing, earlier_looks=0, unit="patients"):
    """Warnings beside every number: patients seen in pretraining, what is unknown, duplicates, earlier looks."""
    texts = [f"backbone has seen these {unit} ({len(seen)} of {patients})"] if seen else []
    texts += [] if known else [UNKNOWN]
    texts += ["crops, no patient grouping"] if unit == "crops" else []
    texts += [f"near-duplicates cross the splits ({crossing} sets)"] if crossing else []
    # the best of several looks is optimistic
    return texts + ([f"{earlier_looks} other weights or policies looked at val_test before"] if earlier_looks else [])


def titled(title, texts):
    return f"{title}: {'; '.join(texts)}" if texts else title


def verdict(result):
    """What a judgement says, in one paragraph; its caveats are part of it."""
    aucs = {name: item["auc"] for name, item in result["predictors"].items()}
    unit = result.get("unit", "patients")  # groups, of photographs
    what = result.get("what", "frozen probe")
    text = f"On {result['samples']} samples of {result['patients']} {unit} the {what} has AUC "
    sentences = [text + in_words(aucs["probe"])]
    for name, other in CLAIMS:
        if f"{name} - {other}" in result["differences"]:
            own, text = aucs.pop(other, None), compared(result, name, other)  # an AUC is told once
            sentences.append(f"{other.capitalize()}: {in_words(own)}; {text}" if own else text[0].upper() + text[1:])
    if result.get("matched", {}).get("pairs"):
        both = [in_words(result["matched"][name]) for name in ("probe", "size")]
        pairs = f"{result['matched']['pairs']} pairs of one size"
        sentences.append(f"On {pairs} the probe has {both[0]}, the ruler {both[1]}")
    sentences += [text[0].upper() + text[1:] for text in result.get("caveats", ())]
    return f"{'. '.join(sentences)}."


def calibration(result, filled):
    """Whether the probe's calibration error is more than chance gives so few samples; filled: bins that hold any."""
    error, chance, n = result["predictors"]["probe"]["ece"]["value"], result["calibration_by_chance"], result["samples"]
    more = "more than that: its probabilities are off" if error > chance["high"] else "no more than that"
    return (
        f"Reliability: {n} samples in {filled} of 10 bins, {n / filled:.0f} in each on average. Probabilities that are "
        f"exactly right would have a calibration error of {chance['mean']:.3f} by chance, and one above "
        f"{chance['high']:.3f} in 5 of 100 cases. The probe's {error:.3f} is {more}."
    )


def tone(result):
    """good: more than a ruler and more than random weights, proven; bad: proven worse than one of them; else warn."""
    sides = [standing(result, "probe", other) for other in ("size", "random weights")]
    sides = [side for side in sides if side is not None]
    low = result["predictors"]["probe"]["auc"]["low"]
    if -1 in sides:
        return "bad"
    return "good" if set(sides) <= {1} and exists(low) and low > 0.5 else "warn"


def row_name(result, name):
    """A predictor as its row is called; of `size + features` also how often it was size alone."""
    chosen = result.get("settings", {}).get(name) or []
    if name != "size + features" or not chosen:
        return name
    return f"{name} ({fits.ALONE} in {chosen.count(fits.ALONE)} of {len(chosen)} fits)"


# ----- the page


COLUMNS = {"auc": "AUC", "average_precision": "average precision", "accuracy": "accuracy",
         "sensitivity_at_90": "sensitivity at 90% specificity", "mcc": "MCC", "brier": "Brier",
         "ece": "calibration error"}  # fmt: skip


def show(result):
    """One protocol on the terminal."""
    print(f"\n{result['title']}")
    for name, item in result["predictors"].items():
        spread = f"spread over repeats {item['auc']['spread']:.4f}"
        print(f"  {row_name(result, name):16} AUC {in_words(item['auc'])}, {spread}")
    print(result["verdict"], flush=True)


def draw(result, labels, classes, predictions, sizes):
    """ROC, precision-recall, reliability, score against diameter; scores are means over the repeats."""
    two, mean = len(classes) == 2, {name: p.mean(0) for name, p in predictions.items()}
    if two:
        names = [name for name in ("probe", "size", "random weights", "size + features") if name in predictions]
        scores = {name: (labels, mean[name][:, 1]) for name in names}
    else:
        scores = {name: (labels == k, mean["probe"][:, k]) for k, name in enumerate(classes)}
    chance = {"chance": ([0, 1], [0, 1])}
    roc = {name: metrics.roc_curve(*pair) for name, pair in scores.items()}
    recall = {name: metrics.precision_recall_curve(*pair) for name, pair in scores.items()}
    weight, probability, truth = metrics.reliability(labels, metrics.score_of(mean["probe"]))
    full = weight > 0
    bins = {"probe, 10 bins": (probability[full] / weight[full], truth[full] / weight[full])}
    plots = [
        page.line_plot("ROC", roc | chance, "1 - specificity", "sensitivity"),
        page.line_plot("Precision and recall", recall, "recall", "precision"),
        page.line_plot(
            "Reliability",
            bins | {"perfect": ([0, 1], [0, 1])},
            "predicted probability",
            "true share",
            points=list(bins),
        ),
    ]
    if sizes is not None and two:
        members = {f"class {name}": labels == k for k, name in enumerate(classes)}
        dots = {name: (sizes[mine], mean["probe"][mine, 1]) for name, mine in members.items()}
        plots.append(page.line_plot("Score and size", dots, "diameter in mm", "score of the probe", points=True))
    if curve := result.get("label_efficiency"):
        points = {name: [(share, point[0]) for share, point in zip(curve["shares"], line) if point]
                  for name, line in curve["auc"].items()}  # fmt: skip
        lines = {name: tuple(zip(*line)) for name, line in points.items() if line}
        plots.append(page.line_plot("Label efficiency", lines, f"share of training {result['unit']}", "AUC"))
    return plots


def two_lines(text):
    """What stands in brackets below what stands before."""
    first, _, rest = text.partition(" (")
    return page.Html(f"{page.escape(first)}<br><small>({page.escape(rest)}</small>") if rest else first


def section(result, labels, classes, predictions, sizes=None):
    """One protocol on the page."""
    rows = [
        [
            two_lines(row_name(result, name)),
            *(two_lines(in_words(item[key])) if key in item else "" for key in COLUMNS),
            f"{item['auc']['spread']:.4f}",
        ]
        for name, item in result["predictors"].items()
    ]
    differences = [[name, two_lines(in_words(d)), d["p"]] for name, d in result["differences"].items()]
    parts = [page.paragraph(result["verdict"], tone(result))]
    parts.append(
        f"Each value with the 95% interval of resampled {result['unit']}. Of Brier and calibration error less is "
        "better; the latter grows with noise, so that it may lie below the interval of its resamples."
    )
    parts.append(page.table(["predictor", *COLUMNS.values(), "spread of AUC over repeats"], rows))
    parts.append(page.table(["difference of AUC", "value", "p"], differences))
    if "matched" in result:
        thirds = [(f"{a['mm'][0]:.1f} to {a['mm'][1]:.1f} mm, {a['samples']} samples", a) for a in result["terciles"]]
        lines = [(f"size-matched pairs ({result['matched']['pairs']})", result["matched"]), *thirds]
        names = ("probe", "size", "random weights")
        cells = [[name, *(two_lines(in_words(a[n])) if n in a else "one class" for n in names)] for name, a in lines]
        parts.append(page.table(["AUC within", *names], cells))
    filled = np.count_nonzero(metrics.reliability(labels, metrics.score_of(predictions["probe"].mean(0)))[0])
    parts.append(calibration(result, filled))
    return page.section(result["title"], *parts, page.row(*draw(result, labels, classes, predictions, sizes)))


# ----- tables


def balance(table):
    return {name: int((table.labels == k).sum()) for k, name in enumerate(table.classes)}


def prediction_rows(table, splits, outcomes):
    """Header and rows: one per sample; the probe's score by each repeat of each protocol, and the fold it was in.

    outcomes {protocol: (rows that it judges [n], predictions [R, rows, K], its plans)}.
    """
    labels = [table.classes[k] for k in table.labels]
    columns = {"id": table.ids, table.unit[:-1]: table.groups, "split": [name or "none" for name in splits]}
    columns["label"] = labels
    names = {"score": 1} if len(table.classes) == 2 else {f"score_{c}": k for k, c in enumerate(table.classes)}
    for protocol, (keep, predictions, plans) in outcomes.items():
        for r, (p, (_, tests)) in enumerate(zip(predictions, plans)):
            tested, place = tests.any(0), np.flatnonzero(keep)
            for name, values in [*((n, p[:, k]) for n, k in names.items()), ("fold", tests.argmax(0))]:
                column = np.full(len(keep), "", object)
                column[place[tested]] = [f"{v:.6g}" for v in values[tested]]
                columns[f"{name}_{protocol}{r}"] = column
    return [list(columns), *zip(*columns.values())]


# ----- who is judged: weights, how they look at an image, and who else looked


def choose_view(facts, encoding, size, patch):
    """The view of the checkpoint where it was trained on this encoding; size 0: its own."""
    trained = facts.get("encoding", encoding)
    if trained != encoding and "photo" not in (trained, encoding):
        raise ValueError(f"--ckpt was trained on {trained}, --data is {encoding}: preprocess with the same --format")
    view = facts.get("eval_view") if trained == encoding else None
    view = dict(view or data.eval_view(encoding))
    view["size"] = size or view["size"]
    if view["size"] % patch:
        raise ValueError(f"--size {view['size']} is not a multiple of the patch size {patch}")
    return view


def neighbour_mm(facts, encoding):
    """The distance of slices that weights were trained with; None: the next ones."""
    return (facts.get("eval_view") or {}).get("neighbour_mm") if facts.get("encoding") == encoding else None


def random_backbones(arch, seed, count=1):
    """Nets of the same architecture that know nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [build_vit(arch["name"], **arch["overrides"]).eval() for _ in range(count)]


def weights_sha256(path):
    """Of a file, or of the safetensors file of a folder; of several files the hash of their hashes."""
    return policies.hash_of(map(data.file_sha256, [path] if path.is_file() else sorted(path.glob("*.safetensors"))))


def used_by(program, ckpt, labels, why):
    """For data.open_for: who looks, with which weights, at which labels. A probe has no policy."""
    return {"program": program, "weights_sha256": weights_sha256(ckpt), "policy_sha256": None,
            "labels_sha256": data.file_sha256(labels), "why": why}  # fmt: skip
