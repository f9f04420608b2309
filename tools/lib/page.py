"""Pages for people: one self-contained HTML file without script, opened from disk, offline, years later.

    plot = line_plot("loss", {"train": (steps, losses)}, "step", marks=[("y", 1.5, "limit")])
    html = page("Run lidc", "In words.", section("Trends", row(plot, image("sheet.png", "now"))))

Plain strings are text and are escaped; markup is what these functions return (Html, a str).
"""

import base64
import html
import math
from pathlib import Path
from urllib.parse import quote

from tools.lib.cli import shown
from tools.lib.files import last_per_step

LARGEST = 1e100  # beyond it a value is damage, and differences overflow
COLOURS = "#0868ac #d94801 #238b45 #88419d #b8860b #cb181d #2b8cbe #777777".split()
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 300, 72, 14, 48, 48  # of a plot, in units of its view box
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 1.5em auto; padding: 0 1em; color: #1b1f24;
  background: #ffffff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 1.8em 0 .5em; border-bottom: 1px solid #d0d4d9; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .2em .7em; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e2e5e9; font-variant-numeric: tabular-nums; } th { background: #f2f4f6; }
td:first-child { white-space: nowrap; } td small { color: #555; white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; } .scroll { overflow-x: auto; }
figure { margin: .5em 0; } figcaption { color: #555; font-size: .9em; } img { max-width: 100%; }
svg.plot { width: 370px; max-width: 100%; height: auto; border: 1px solid #e2e5e9; }
@media (max-width: 600px) { body { padding: 0 .5em; } th, td { padding: .2em .3em; font-size: 13px; } }
.good, .warn, .bad { padding: .5em .8em; border-left: 6px solid; }
.good { border-color: #238b45; background: #eef7f0; } .warn { border-color: #d98c00; background: #fdf6e7; }
.bad { border-color: #cb181d; background: #fcedec; }
"""


class Html(str):
    """Markup that is inserted as it is; any other text is escaped."""

    __slots__ = ()


def escape(text):
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def paragraph(text, tone=""):
    """One paragraph; tone "good", "warn" or "bad" puts it in a box of that colour."""
    return Html(f'<p class="{escape(tone)}">{escape(text)}</p>' if tone else f"<p>{escape(text)}</p>")


def as_parts(parts):
    return "\n".join(part if isinstance(part, Html) else paragraph(part) for part in parts)


def section(title, *parts):
    return Html(f"<h2>{escape(title)}</h2>\n{as_parts(parts)}")


def row(*parts):
    """Side by side, on the next line where the window ends."""
    return Html(f'<div class="row">{as_parts(parts)}</div>')


def page(title, *parts):
    """A whole document; a plain string among the parts is a paragraph."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{as_parts(parts)}\n</body></html>\n"
    )


def number(value):
    """4 digits for a person; what is no float stays as it is, None is a dash."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.3e}"
    return "-" if value is None else value


def table(header, rows):
    """Header texts and rows of values; floats are shown with 4 digits."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(number(cell))}</td>' for cell in cells)}</tr>" for cells in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def image(png, caption="", link=""):
    """A PNG (its bytes, or the path of a file) inside the page; link: address of a file that a click opens."""
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    code = base64.b64encode(data).decode()
    picture = f'<img alt="{escape(caption or "picture")}" src="data:image/png;base64,{code}">'
    if link:
        picture = f'<a href="{escape(quote(link))}">{picture}</a>'
    return Html(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")


# ----- plots


def ticks(low, high, count=5):
    """Round numbers 1, 2 or 5 times a power of ten inside [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Of an axis in log10: whole powers of ten, with 2 and 5 between them where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    stride = max(1, len(powers) // 6)
    fine = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [p + math.log10(k) for p in powers if p % stride == 0 for k in fine]
    return [t for t in found if low - 1e-9 <= t <= high + 1e-9]


def limits(values, margin=0.04):
    """Ends of an axis, a little beyond the values; of equal values, around them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = margin * (high - low) or max(abs(high) * 0.1, 1e-9)
    room = max(room, 1e-9 * max(abs(low), abs(high)))  # numbers of 16 digits have no finer ticks
    return low - room, high + room


def drawable(xs, ys, log_y):
    """Points as lists of runs: what is not finite, or huge (or not positive on a log axis), leaves a gap."""
    runs = [[]]
    for x, y in zip(map(float, xs), map(float, ys)):
        if abs(x) < LARGEST and abs(y) < LARGEST and (y > 0 or not log_y):
            runs[-1].append((x, math.log10(y) if log_y else y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def svg_text(x, y, text, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def svg_line(x0, y0, x1, y1, style):
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {style}/>'


def tick_texts(values):
    """Labels with as many digits as tell the ticks apart."""
    apart = min((b - a for a, b in zip(values, values[1:])), default=1)
    largest = max(map(abs, values), default=1)
    digits = max(0, math.ceil(-math.log10(apart) - 1e-9))
    if largest >= 1e6 or digits > 5:
        return [f"{v:.{max(0, math.ceil(math.log10(max(largest, apart) / apart)))}e}" for v in values]
    return [f"{v:.{digits}f}" for v in values]


def axes(across, up, x_range, y_range, log_y):
    """Grid, tick labels and frame; across and up turn values into view box units."""
    x_ticks, y_ticks = ticks(*x_range), log_ticks(*y_range) if log_y else ticks(*y_range)
    x_texts, y_texts = tick_texts(x_ticks), [f"{10**y:.4g}" for y in y_ticks] if log_y else tick_texts(y_ticks)
    grid = 'stroke="#e6e9ec"'
    for x, text in zip(x_ticks, x_texts):
        yield svg_line(across(x), TOP, across(x), HEIGHT - BOTTOM, grid)
        yield svg_text(across(x), HEIGHT - BOTTOM + 17, text)
    for y, text in zip(y_ticks, y_texts):
        yield svg_line(LEFT, up(y), WIDTH - RIGHT, up(y), grid)
        yield svg_text(LEFT - 5, up(y) + 5, text, "end")
    w, h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    yield f'<rect x="{LEFT}" y="{TOP}" width="{w}" height="{h}" fill="none" stroke="#9aa2aa"/>'


def draw_marks(marks, across, up, log_y):
    """("x" or "y", value, text): a dashed line across the plot with its text."""
    for axis, value, text in marks:
        dashed = 'stroke="#cb181d" stroke-dasharray="4 3"'
        if axis == "x":
            yield svg_line(across(value), TOP, across(value), HEIGHT - BOTTOM, dashed)
            yield svg_text(across(value) + 3, TOP + 14, text, "start", 'fill="#cb181d"')
        elif value > 0 or not log_y:
            y = up(math.log10(value) if log_y else value)
            yield svg_line(LEFT, y, WIDTH - RIGHT, y, dashed)
            yield svg_text(WIDTH - RIGHT - 3, y + (14 if y < TOP + 17 else -4), text, "end", 'fill="#cb181d"')


def draw_runs(runs, colour, across, up, points):
    """A curve, broken at its gaps; single points (and all of a scatter) are dots."""
    for run in runs:
        if len(run) > 1 and not points:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in run)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        if points or len(run) == 1:
            yield from (f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in run)


def legend(names):
    """Coloured names in one line below the title; 7.7 units is a wide guess for a bold letter of size 12.5."""
    x = 10
    for k, name in enumerate(names):
        style = f'fill="{COLOURS[k % len(COLOURS)]}" font-size="12.5" font-weight="600"'
        yield svg_text(x, TOP - 8, name, "start", style)
        x += 7.7 * len(name) + 12


def line_plot(title, curves, x_label="", y_label="", marks=(), log_y=False, points=False):
    """Curves {name: (xs, ys)} as inline SVG; points: dots instead of lines, for all (True) or for the names in it.

    marks: ("x" or "y", value, text) draws a dashed line there, inside the axes whatever the curves' range.
    Values that are not finite leave a gap; a plot without any point says "no data".
    """
    runs = {name: drawable(xs, ys, log_y) for name, (xs, ys) in curves.items()}
    dots = [point for parts in runs.values() for run in parts for point in run]
    of_axis = {a: [v for axis, v, _ in marks if axis == a and (a == "x" or v > 0 or not log_y)] for a in "xy"}
    levels = [math.log10(v) if log_y else v for v in of_axis["y"]]
    x_range = limits([x for x, _ in dots] + of_axis["x"], 0.02)
    y_range = limits([y for _, y in dots] + levels)

    def across(x):
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def up(y):
        return HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [svg_text(WIDTH / 2, 18, title, more='font-size="16" font-weight="600"')]
    parts += axes(across, up, x_range, y_range, log_y) if dots else [svg_text(WIDTH / 2, HEIGHT / 2, "no data")]
    for k, (name, pieces) in enumerate(runs.items()):
        dotted = points if isinstance(points, bool) else name in points
        parts += draw_runs(pieces, COLOURS[k % len(COLOURS)], across, up, dotted)
    parts += draw_marks(marks, across, up, log_y) if dots else ()
    parts += legend(runs) if len(runs) > 1 else ()
    parts.append(svg_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    y = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(svg_text(13, y, y_label, more=f'transform="rotate(-90 13 {y:.0f})"'))
    frame = f'class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="14"'
    return Html(f'<svg {frame} role="img" aria-label="{escape(title)}">\n' + "\n".join(parts) + "\n</svg>")


# ----- the page of a run, as monitor.py fills it


def thin(rows, most=400):
    """At most so many rows, evenly spread, the first and the last among them."""
    stride = max((len(rows) - 1) / max(most - 1, 1), 1)
    return [rows[round(k * stride)] for k in range(min(len(rows), most))]


# what each number of a look means, in a clause
EXPLAINED = {
    # of the look
    "teacher_entropy": "of the teacher's targets, share of ln K: 0 one prototype each, 1 no preference",
    "sharp_entropy": "the same of the centred logits, without Sinkhorn, which spreads one-hot targets",
    "marginal_entropy": "of the mean target, share of ln K: 1 when all prototypes are used alike",
    "perplexity": "prototypes in use",
    "dead_prototypes": "share of prototypes that get less than 1% of an equal part",
    "kl": "nats from the teacher's to the student's targets; 0: both say the same",
    "cosine": "mean over pairs of slices; 1: all features point one way",
    "feature_std": "spread of the normalised embeddings; 1 even, 0 collapsed",
    "rankme": "effective number of dimensions of the embeddings",
    "effective_rank": "the same around their mean",
    "retrieval_top1": "share of slices whose other view is the nearest of all views",
    "retrieval_top5": "share of slices whose other view is among the five nearest",
    "uniformity": "spread over the sphere (arXiv:2005.10242); 0 when all embeddings are one point, lower is wider",
    "patch_rank": "effective number of dimensions of the patch features",
    "cls_patch_cosine": "mean cosine of the cls token and the patches of its slice",
    "norm_outliers": "share of patches with more than 4 times the usual norm",
    "attention_body": "share of the attention that falls on the body",
    "attention_lung": "share of the attention that falls on the lung",
    "area_body": "share of the picture that is body: even attention would give this",
    "area_lung": "share of the picture that is lung: even attention would give this",
    "nonfinite": "share of numbers that are NaN or infinite",
    "slices": "images behind these numbers",
    "view_slices": "images whose training views are behind targets and retrieval",
    "gram_drift": "change of patch similarities since the first look; 0 none",
    "colours_kept": "mean correlation of the PCA colours with those of the first look; 1 all kept",
    "knn": "balanced accuracy of the nearest neighbours from other patients",
    "knn_chance": "what guessing gives",
    "knn_slices": "labelled images behind it",
    # of the run's log
    "loss": "of the last logged update",
    "dino": "its part from cls tokens, in nats",
    "ibot": "its part from masked patches, in nats",
    "excess": "DINO + iBOT above the entropy of their targets, which no student can beat",
    "lr": "learning rate of the last logged update",
    "images_s": "images per second, median of the last 5 lines",
    "data_wait": "share of time that waits for data, median of the last 5 lines",
    "memory_gb": "GB, median of the last 5 lines",
    "rise": "of DINO + iBOT over their best since warm-up, as a share",
    "slope_per_1000": "change of DINO + iBOT in 1000 updates",
    "last_step": "updates done by the newest line of metrics.jsonl",
    "finished": "whether all updates are done",
    "age_s": "seconds since metrics.jsonl grew",
    "log_interval_s": "seconds between its lines",
    "eta_h": "hours until the end",
    "nonfinite_loss": "1: the last loss is NaN or infinite",
    "spikes": "of the last 20 lines, how many lie half above the usual loss",
    "odd_step": "the newest update that spiked or was skipped; tools/inspect_step.py --why says why",
    "skipped": "updates skipped in the last 20 intervals, because a gradient was not finite",
    "images_s_change": "of images per second since the start, as a share",
    "memory_change": "of memory since the start, as a share",
    "failed_save": "why the last save failed",
    "last_event": "newest event of metrics.jsonl",
    "disk_free_gb": "GB free where the run saves",
    "checkpoint_gb": "GB of this checkpoint",
    "saves_that_fit": "checkpoints that still fit on that disk",
}


def trend(title, rows, keys, y_label="", marks=(), log_y=False):
    """Keys of rows ({"step": ..., key: ...}) over steps, absent values left out; None where no two steps have one."""
    curves = {k: [(r["step"], r[k]) for r in rows if isinstance(r.get(k), (int, float))] for k in keys}
    if not any(len({x for x, _ in xy}) > 1 for xy in curves.values()):
        return None
    return line_plot(title, {k: tuple(zip(*xy)) for k, xy in curves.items() if xy}, "step", y_label, marks, log_y)


def explained(title, values):
    """A table of named numbers, each with what it means; None without numbers."""
    same = values.get("slices") == values.get("view_slices")
    plain = {True: "yes", False: "no"}
    values = {
        k: plain[v] if isinstance(v, bool) else shown(v, 600) if isinstance(v, str) else v for k, v in values.items()
    }
    rows = [(shown(k), v, EXPLAINED.get(k, "")) for k, v in values.items() if not (same and k == "view_slices")]
    return table((title, "value", "what it is"), rows) if rows else None


READING = (
    "How to read the pictures: attention is bright where the cls token, which stands for the whole image, looks. PCA "
    "gives patches of alike features alike colours, over all test images, and turns them to match the first look, so "
    "that colours may be compared over time. Similarity is bright where patches resemble the one at the cross. Images "
    "are several times larger than those of training; what is seen at its own resolution stands small below."
)


def run_page(status, looks, lines, limits, pictures):
    """Verdict, trends, pictures {title: paths}. looks: numbers of looks of one kind; lines: those of metrics.jsonl."""
    held_out, rows = thin(last_per_step(lines, "val_loss")), thin(last_per_step(lines, "loss"))
    at = {name: [("y", value, name.replace("_", " "))] for name, value in limits.items()}
    plots = [
        trend("DINO loss", rows, ("dino",), "nats"),
        trend("iBOT loss", rows, ("ibot",), "nats"),
        trend("held-out DINO loss", held_out, ("val_dino",), "nats"),
        trend("teacher entropy", rows, ("teacher_entropy",), "share of ln K", at["max_entropy"] + at["min_entropy"]),
        trend("rank of embeddings", looks, ("effective_rank", "rankme"), "dimensions", at["min_rank"]),
        trend("spread of embeddings", looks, ("feature_std",), "1: even", at["min_std"], log_y=True),
        trend("finding the other view, k-NN", looks, ("retrieval_top1", "retrieval_top5", "knn"), "share"),
        trend("patch features", looks, ("patch_rank",), "rank"),
        trend("patches", looks, ("cls_patch_cosine", "norm_outliers", "gram_drift")),
        trend("attention", looks, ("attention_body", "attention_lung", "area_body", "area_lung"), "share"),
        trend("speed", rows, ("images_s",), "images/s"),
        trend("waiting for data", rows, ("data_wait",), "share of time", at["max_wait"]),
        trend("memory", rows, ("memory_gb",), "GB"),
        trend("hottest sensor", looks, ("temperature",), "degrees C", at["max_temp"]),
    ]
    plots = [plot for plot in plots if plot]
    said = f"{status['verdict']}, exit code {status['code']}, step {status['step']}, looked at {status['when']}"
    names = {"numbers": "of this look", "pulse": "of the run's log", "sensors": "sensor"}
    tables = [explained(title, status[part]) for part, title in names.items()]
    return page(
        f"{shown(status['run'])}: {status['verdict']}",
        paragraph(said, ("good", "warn", "bad", "bad")[status["code"]]),
        *(f"{f['word']}: {shown(f['text'], 600)}" for f in status["findings"]),
        *(f"Note: {text}" for text in status["notes"]),
        section("Trends", row(*plots)) if plots else "Charts are drawn from the second look on.",
        READING if pictures else Html(""),
        *(section(title, row(*map(linked, paths))) for title, paths in pictures.items()),
        section("Numbers", *(part for part in tables if part)),
    )


def linked(path):
    """A picture of a folder beside the page, which a click opens at its full size."""
    name = "/".join(path.parts[-2:])
    return image(path, f"{name} (click for its full size)", name)


def prometheus(status, words):
    """The same for machines: the text format that node_exporter's textfile collector reads."""

    def label(text):
        return shown(text, 200).translate(str.maketrans('\\"', "__"))

    name = f'run="{label(status["run"])}"'
    flat = {"exit_code": status["code"], "look_time_seconds": status["time"], "step": status["step"]}
    flat |= status["numbers"] | {f"run_{key}": value for key, value in status["pulse"].items()}
    flat = {key: value for key, value in flat.items() if isinstance(value, (int, float))}
    lines = [f"# TYPE dinox_{key} gauge\ndinox_{key}{{{name}}} {float(value):.10g}" for key, value in flat.items()]
    lines.append("# TYPE dinox_verdict gauge")
    lines += [f'dinox_verdict{{{name},verdict="{word}"}} {int(word == status["verdict"])}' for word in words]
    lines += ["# TYPE dinox_sensor gauge"] * bool(status["sensors"])
    lines += [f'dinox_sensor{{{name},sensor="{label(key)}"}} {value:.10g}' for key, value in status["sensors"].items()]
    return "\n".join(lines) + "\n"
