"""Look at random slices before training on them: a sheet of pictures and numbers, and pass or fail in words.

In: a processed CT folder (rgb-v1 or hu16-v1) or a folder of photographs. Out: DATA/_validation/samples_*.png with one
row per slice, one printed line per slice, and exit code 0 when all pass, 1 when some fail, 2 when nothing can be read.

    python tools/validate_samples.py --data data/processed --n 10 --seed 0

Both encodings are judged by the same three channels (lung window of slice z-1, soft tissue of z, bone of z+1).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PURPOSES, RGB_WINDOWS, WINDOWS_HU, open_for, open_source, window_codes
from tools.lib import sheet
from tools.lib.cli import Parser, natural, run, shown, within
from tools.lib.slices import slice_name

SIDE, TYPE = 288, 15  # pixels of a tile, six of which fill a sheet, and of its type
PHOTO = 1180  # width of the sheet of photographs
LUNG_HU = (-950, -500)  # aerated lung; air is below, tissue above
SLICES = ("z-1", "z", "z+1")
RED_GREEN_BLUE = ("#ff5050", "#50d060", "#6090ff")
LANDMARKS = ((-1000, "air"), (-850, "lung"), (-100, "fat"), (50, "muscle"))  # HU
# <- change the limits of pass and fail here. Shares of the body box; phantom chests have R 10%, G 58%, B 50% saturated
SATURATED = (0.5, 0.95, 0.95)
TISSUE, AIR_OR_LUNG = 0.05, 0.005
TISSUE_HU = 150  # soft tissue lies within +- this, also with fat or contrast medium
SAME_HU = 2  # codes of one slice through two windows agree to 1.5 HU on average; neighbours differ by their noise
PHOTO_SATURATED, PHOTO_SPREAD = 0.95, 2  # share of pixels at 0 or 255; standard deviation in codes


def open_split(root, split):
    """The images to draw samples from: all of them, or those of one split but val_test."""
    if split is None:
        return open_source(root)
    purposes = {name: purpose for purpose, name in PURPOSES.items() if purpose != "test"}
    if split == PURPOSES["test"]:
        raise ValueError(
            f"--split {split} gives the final number once, and no picture of it is needed to choose anything; "
            f"use one of {', '.join(purposes)}, or leave --split away"
        )
    if split not in purposes:
        raise ValueError(f"--split {split}: use one of {', '.join(purposes)}, or leave --split away")
    return open_for(root, purposes[split], allow_duplicates=True)  # duplicates do not matter for pictures


def as_rgb(image, encoding):
    """What an encoding stores [3, H, W] -> the three channels as codes."""
    if encoding != "hu16-v1":
        return image
    return np.stack([window_codes(hu, *WINDOWS_HU[name]) for hu, name in zip(image, RGB_WINDOWS)])


def in_hu(codes):
    """Channels R, G, B [3, ...] as the HU that they stand for; the ends of each window stand for all beyond."""
    level, width = (np.array(v).reshape(3, *[1] * (codes.ndim - 1)) for v in zip(*map(WINDOWS_HU.get, RGB_WINDOWS)))
    return codes / 255.0 * width + level - width / 2


def saturated(codes):
    """Share of pixels at 0 or 255 of each channel."""
    return ((codes == 0) | (codes == 255)).mean(tuple(range(1, codes.ndim)))


def difference(codes, a, b):
    """Mean |difference| in HU of two channels where both are inside their windows; nan where that is nowhere."""
    both = ((codes[[a, b]] > 0) & (codes[[a, b]] < 255)).all(0)
    hu = in_hu(codes)
    return np.abs(hu[a] - hu[b])[both].mean() if both.any() else np.nan


def measure(rgb, box):
    """Numbers of a CT slice inside its body box (y0, x0, y1, x1)."""
    codes = rgb[:, box[0] : box[2], box[1] : box[3]]
    hu = in_hu(codes)
    tissue = hu[0] > -300
    return {
        "saturated": saturated(codes),
        "lung": ((hu[0] > LUNG_HU[0]) & (hu[0] < LUNG_HU[1])).mean(),
        "air_or_lung": ((hu[0] > -1000) & (hu[0] < -300)).mean(),  # from -1000: not the -1024 of padding
        "tissue": tissue.mean(),
        "tissue_hu": np.median(hu[1][tissue]) if tissue.any() else np.nan,
        "differences": (difference(codes, 0, 1), difference(codes, 1, 2)),
        "identical": np.array_equal(codes[0], codes[1]) and np.array_equal(codes[1], codes[2]),
    }


def judge(m):
    """Reasons to fail, in words; none: the slice passes."""
    over = [share > limit for share, limit in zip(m["saturated"], SATURATED)]
    shares, limits = (" / ".join(f"{share:.0%}" for share in values) for values in (m["saturated"], SATURATED))
    saturation = [f"saturated: {shares} of channels R / G / B are 0 or 255, limits {limits}"] * any(over)
    if all(over):
        return saturation
    if m["identical"]:
        return ["all three channels are identical (no windows, no neighbours)"]
    reasons = []
    if m["tissue"] < TISSUE:
        reasons.append(f"no body: {m['tissue']:.1%} of the box is tissue, above -300 HU (all air?)")
    if m["air_or_lung"] < AIR_OR_LUNG:
        reasons.append(
            f"neither air nor lung: {m['air_or_lung']:.1%} of the box lies in -1000..-300 HU"
            " (HU off by ten, rescale missing, or a field of view inside the body?)"
        )
    if abs(m["tissue_hu"]) > TISSUE_HU:
        end = " or beyond" * (m["tissue_hu"] in (-160, 240))  # the ends of the soft window hide the rest
        reasons.append(f"soft tissue has {m['tissue_hu']:.0f} HU{end}, expected 0 +- {TISSUE_HU} (wrong rescale?)")
    for pair, hu in zip(("R and G", "G and B"), m["differences"]):
        if hu < SAME_HU:  # nan compares false
            reasons.append(f"channels {pair} show the same slice: they differ by {hu:.1f} HU (neighbours lost?)")
    return reasons + saturation


def judge_photo(rgb):
    reasons = []
    if rgb.std((1, 2)).max() < PHOTO_SPREAD:
        reasons.append(f"constant image: standard deviation {rgb.std((1, 2)).max():.1f} codes")
    elif (worst := saturated(rgb).max()) > PHOTO_SATURATED:
        reasons.append(f"saturated: {worst:.0%} of a channel is 0 or 255, at most {PHOTO_SATURATED:.0%} expected")
    return reasons


def histogram(codes, ct, size=(SIDE, SIDE)):
    """Curves of the three channels, of CT on one axis in HU, without the two ends of each window."""
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in codes])
    counts[:, [0, 255]] = 0
    # bins of 24 HU: the soft window has more codes than HU, which would show as a comb
    sizes = (4, 16, 4) if ct else (4, 4, 4)
    middles = np.tile(np.arange(256), (3, 1))
    axis = in_hu(middles) if ct else middles
    lines = [
        (x.reshape(-1, n).mean(1), y.reshape(-1, n).sum(1), colour)
        for x, y, n, colour in zip(axis, counts, sizes, RED_GREEN_BLUE)
    ]
    if ct:
        return sheet.curves(lines, -1400, 1100, (-1000, -500, 0, 500, 1000), size, LANDMARKS)
    return sheet.curves(lines, 0, 255, (0, 64, 128, 192, 255), size)


def window_in_words(name):
    level, width = WINDOWS_HU[name]
    return f"{name} window L {level} W {width}"


def windows(image, rgb, source):
    """(title, picture) of the lung, soft and bone windows: of slice z where HU are known, else the three channels."""
    if source.encoding == "hu16-v1":
        channels = [window_codes(image[1], *WINDOWS_HU[name]) for name in RGB_WINDOWS]
        titles = [f"{window_in_words(name)}, slice z" for name in RGB_WINDOWS]
    else:
        channels = rgb
        titles = [f"{c}: {window_in_words(name)}, slice {z}" for c, name, z in zip("RGB", RGB_WINDOWS, SLICES)]
    return [(title, sheet.picture(codes)) for title, codes in zip(titles, channels)]


def inspect_ct(image, source, i):
    """One CT slice -> (reasons, short numbers for the line, long ones for the sheet, tiles)."""
    row, box, rgb = source.rows[i], source.body(i), as_rgb(image, source.encoding)
    m = measure(rgb, box)
    spacing = [row[f"spacing_{axis}"] for axis in "yxz"]
    shares = " / ".join(f"{share:.0%}" for share in m["saturated"])
    apart = " / ".join("unknown" if np.isnan(hu) else f"{hu:.0f}" for hu in m["differences"])
    numbers = [
        ("In the yellow box, the body's:", sheet.DIM),
        f"{m['lung']:.1%} is lung, {LUNG_HU[0]} to {LUNG_HU[1]} HU",
        f"{shares} of R / G / B lie beyond their windows",
        f"soft tissue has {m['tissue_hu']:.0f} HU, the median",
        f"neighbours differ by {apart} HU (R, G / G, B)",
        ("The slice:", sheet.DIM),
        f"{rgb.shape[1]} x {rgb.shape[2]} pixels, {source.encoding}",
        f"of {spacing[0]:.3f} x {spacing[1]:.3f} mm",
        f"the next one after {spacing[2]:.3f} mm",
    ]
    if source.encoding == "hu16-v1":
        numbers.append(f"HU from {image[1].min()} to {image[1].max()}")
    factor = SIDE / max(rgb.shape[1:])
    panels = [*windows(image, rgb, source), ("RGB: lung z-1, soft z, bone z+1", sheet.picture(rgb))]
    pictures = [(title, sheet.scale_bar(sheet.fit(p, SIDE), spacing[1] / factor)) for title, p in panels]
    pictures[0] = (pictures[0][0], sheet.outline(pictures[0][1], [(np.array(box) * factor, "#f4e04d", "", 1)]))
    codes = rgb[:, box[0] : box[2], box[1] : box[3]]
    pictures.append(("HU of R, G, B in their windows", histogram(codes, True)))
    line = f"lung {m['lung']:.0%}, saturated {shares}, channels apart {apart} HU"
    return judge(m), line, numbers, [sheet.titled(p, [title], size=TYPE) for title, p in pictures]


def inspect_photo(rgb):
    shares = " / ".join(f"{share:.0%}" for share in saturated(rgb))
    means = " / ".join(f"{m:.0f} +- {s:.0f}" for m, s in zip(rgb.mean((1, 2)), rgb.std((1, 2))))
    apart = np.abs(np.diff(rgb.astype(int), axis=0)).mean()
    numbers = [f"{shares} of red / green / blue are 0 or 255", f"mean and spread {means}"]
    numbers += [f"neighbouring channels differ by {apart:.1f} codes", "a grey picture"][: 1 + bool(apart == 0)]
    numbers.append(f"{rgb.shape[1]} x {rgb.shape[2]} pixels")
    aspect = rgb.shape[2] / rgb.shape[1]
    height = min(SIDE, 2 * SIDE / aspect)  # of the picture, and of its histogram, which takes the room that is left
    picture = sheet.fit(sheet.picture(rgb), max(1, round(height * max(aspect, 1))))
    plot = histogram(rgb, False, (PHOTO - SIDE - picture.width - 2 * sheet.GAP, max(picture.height, 60)))
    tiles = [
        sheet.titled(picture, ["picture"], size=TYPE),
        sheet.titled(plot, ["codes of R, G, B, without 0 and 255"], size=TYPE),
    ]
    return judge_photo(rgb), f"saturated {shares}", numbers, tiles


def inspect_sample(source, i):
    """-> (reasons to fail, printed line, picture of the slice). A slice that cannot be read fails like any other."""
    name = slice_name(source, i)
    if source.encoding != "photo":
        name += f", patient {source.rows[i]['group']}"
    try:
        image = source.read(i).numpy()
        look = inspect_photo(image) if source.encoding == "photo" else inspect_ct(image, source, i)
        reasons, line, numbers, tiles = look
    except OSError as error:
        reasons, line, numbers, tiles = [str(error)], "", [], []
    verdict, colour = ("FAIL", sheet.BAD) if reasons else ("pass", sheet.GOOD)
    failures = [(reason, sheet.BAD) for reason in reasons]
    width = PHOTO if source.encoding == "photo" else sheet.WIDTH
    tiles.append(sheet.paragraphs([*failures, *numbers], SIDE if tiles else width, TYPE))
    text = f"{verdict}  {shown(name, 400)}: {'; '.join(reasons) or line}"
    return reasons, text, sheet.stack([sheet.heading(f"{verdict}   {name}", width, colour), sheet.row(tiles)], 4)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="processed CT folder, or folder tree of photographs")
    parser.add_argument("--n", type=within("[1, 100]", int), default=10, help="images to look at, at most 100")
    parser.add_argument("--seed", type=natural, default=0, help="another seed draws other slices")
    parser.add_argument("--split", help="only slices of train, val_select or val_calib; default: of everything")
    parser.add_argument("--out", type=Path, help="PNG to write; default: DATA/_validation/samples_<split>_<seed>.png")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    source = open_split(args.data, args.split)
    chosen = np.random.default_rng(args.seed).permutation(len(source))[: args.n]
    failed, pictures = 0, []
    for i in chosen:
        reasons, text, drawn = inspect_sample(source, i)
        print(text)
        failed += bool(reasons)
        pictures.append(drawn)
    summary = f"{len(chosen) - failed} of {len(chosen)} pass"
    title = f"{args.data}: {summary} ({source.encoding}, split {args.split or 'all'}, seed {args.seed})"
    out = args.out or args.data / "_validation" / f"samples_{args.split or 'all'}_{args.seed}.png"
    width, colour = max(p.width for p in pictures), sheet.BAD if failed else sheet.GOOD
    whole = [sheet.heading(title, width, colour, 20)] if len(chosen) > 1 else []  # one says it itself
    sheet.save(out, sheet.stack([*whole, *pictures]))
    print(f"{summary}; wrote {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
