"""Volumes that are not DICOM (.mhd .mha .nii .nii.gz .nrrd) -> int16 HU in DICOM's orientation, or the reason why not.

    header = read_header(path)      # a few lines of text or bytes; what it promises is compared with the file
    volume = read_volume(header)    # through SimpleITK, an optional extra

Nothing is allocated before the file was seen to hold what its header says. Axes are exchanged and turned round, never
resampled: x runs to the patient's left, y to the back, z to the head.
"""

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import regular
from tools.lib.dicom import MAX_FILE_PIXELS, MAX_PIXELS, PADDING_HU, Reject, Volume

INSTALL = "pip install SimpleITK"
ENDINGS = (".mhd", ".mha", ".nii.gz", ".nii", ".nrrd", ".nhdr")
TEXT_BYTES = 1 << 16  # of a header of text
MAX_RATIO = 100  # of unpacked to packed bytes; CT shrinks to a half, one that is half padding to a fifth
MAX_OBLIQUE_DEG = 20
AIR_HU, MIN_AIR = (-1100, -900), 2e-4  # a chest that fills the circle of reconstruction still has 2% of it in the lungs
META_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8, "LONG": 4,
              "ULONG": 4, "LONG_LONG": 8, "ULONG_LONG": 8}  # fmt: skip
NIFTI_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 64: 8, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8}
NRRD_BYTES = {"char": 1, "int8": 1, "short": 2, "int16": 2, "int": 4, "int32": 4, "float": 4, "double": 8}
NRRD_BYTES |= {f"u{name}": NRRD_BYTES[name] for name in ("int8", "int16", "int32", "short", "int")}
NRRD_BYTES |= {f"unsigned {name}": NRRD_BYTES[name] for name in ("char", "short", "int")} | {"uchar": 1}


class Header(NamedTuple):
    path: Path
    data: Path  # where the pixels are
    start: int  # of the first byte of pixels, or of what is packed
    skip: int  # unpacked bytes before the pixels
    packed: bool
    size: tuple  # voxels along x, y, z of the file
    voxel_bytes: int


def ending(path):
    """The ending of a volume, or ""."""
    name = Path(path).name.lower()
    return next((end for end in ENDINGS if name.endswith(end)), "")


def beside(path, name):
    """The data file that a header names: a plain file in its own folder."""
    if not re.fullmatch(r"[^/\\%\0]+", name) or name.upper().startswith("LIST"):
        raise Reject("header", "pixels in several files, or in another folder")
    return path.parent / name


def numbers(text, count, kind=float):
    """A text of `count` finite numbers."""
    try:
        values = tuple(kind(part) for part in text.split())
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise Reject("header", f"a field that is not {count} numbers")
    return values


def wanted(fields, *names):
    """The value of the first of these fields that is there."""
    for name in names:
        if fields.get(name):
            return fields[name]
    raise Reject("header", f"{names[0]} missing")


# Headers: what is said, in the words of each format.


def read_meta(path):
    """MetaImage: lines `Key = value`, ElementDataFile last."""
    fields = {}
    with open(path, "rb") as f:
        while "ElementDataFile" not in fields and f.tell() < TEXT_BYTES and (line := f.readline(4096)):
            key, _, value = line.decode("ascii", "replace").partition("=")
            fields[key.strip()] = value.strip()
        end = f.tell()
    if numbers(wanted(fields, "NDims"), 1, int) != (3,) or fields.get("ElementNumberOfChannels", "1") != "1":
        raise Reject("not_3d", "dimensions or channels")
    if fields.get("HeaderSize", "0") != "0" or fields.get("BinaryData", "True").lower() != "true":
        raise Reject("header", "HeaderSize or BinaryData")
    numbers(wanted(fields, "ElementSpacing"), 3)
    numbers(wanted(fields, "Offset", "Position", "Origin"), 3)
    if not (fields.get("TransformMatrix") or fields.get("Orientation") or fields.get("Rotation")):
        raise Reject("no_orientation", "TransformMatrix")
    voxel_bytes = META_BYTES.get(wanted(fields, "ElementType").removeprefix("MET_"), 0)
    local = fields.get("ElementDataFile") == "LOCAL"
    data = path if local else beside(path, wanted(fields, "ElementDataFile"))
    packed = fields.get("CompressedData", "False").lower() == "true"
    return Header(path, data, end if local else 0, 0, packed, numbers(wanted(fields, "DimSize"), 3, int), voxel_bytes)


def read_nrrd(path):
    """NRRD: lines `key: value` until an empty one, then the pixels or, in a .nhdr, nothing."""
    fields = {}
    with open(path, "rb") as f:
        if not re.fullmatch(rb"NRRD000[1-5]\r?\n", f.readline(16)):
            raise Reject("header", "no NRRD file")
        while f.tell() < TEXT_BYTES and (line := f.readline(4096)).strip():
            key, _, value = line.decode("ascii", "replace").partition(":")
            fields[key.strip().lower()] = value.strip()
        end = f.tell()
    if wanted(fields, "dimension") != "3":
        raise Reject("not_3d", f"{len(wanted(fields, 'sizes').split())} dimensions")
    if not (fields.get("space") and fields.get("space directions") and fields.get("space origin")):
        raise Reject("no_orientation", "space, space directions or space origin")
    packed = {"raw": False, "gzip": True, "gz": True}.get(wanted(fields, "encoding").lower())
    if packed is None or any(fields.get(f"{unit} skip", "0") != "0" for unit in ("line", "byte")):
        raise Reject("header", "encoding other than raw or gzip, or bytes to skip")
    other = fields.get("data file") or fields.get("datafile")
    voxel_bytes = NRRD_BYTES.get(re.sub("_t$", "", wanted(fields, "type").lower()), 0)
    size = numbers(wanted(fields, "sizes"), 3, int)
    return Header(path, beside(path, other) if other else path, 0 if other else end, 0, packed, size, voxel_bytes)


def quaternion_matrix(b, c, d):
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    return np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip


def check_nifti_place(size, spacing, qfac, codes, quaternion, offset, rows):
    """Refuse a file that does not say how it lies, or says it twice and differently: left could be right."""
    if not any(code > 0 for code in codes):
        raise Reject("no_orientation", "qform_code and sform_code are 0")
    by_quaternion = quaternion_matrix(*quaternion) * np.array([*spacing[:2], spacing[2] * (-1 if qfac < 0 else 1)])
    by_rows = np.array(rows)
    if not np.isfinite([*by_quaternion.ravel(), *offset, *by_rows.ravel()]).all():
        raise Reject("header", "qform or sform")
    if codes[0] > 0 and codes[1] > 0:
        corners = np.array([[x, y, z] for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])], float)
        apart = corners @ (by_quaternion - by_rows[:, :3]).T + (np.array(offset) - by_rows[:, 3])
        if (worst := np.linalg.norm(apart, axis=1).max()) > min(spacing) / 2:
            raise Reject("orientation_disagrees", f"qform and sform are up to {worst:.1f} mm apart")
    elif codes[1] > 0 and np.abs(np.linalg.norm(by_rows[:, :3], axis=0) / spacing - 1).max() > 0.01:
        raise Reject("orientation_disagrees", "pixdim and sform")


def read_nifti(path):
    """NIfTI 1 and 2, plain or gzipped."""
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as f:
        try:
            head = f.read(540)
        except (OSError, EOFError, zlib.error):
            raise Reject("pixel_size", "the packed file is damaged") from None
    order = next((o for o in "<>" if head[:4] in (struct.pack(f"{o}i", 348), struct.pack(f"{o}i", 540))), None)
    two = order and head[:4] == struct.pack(f"{order}i", 540)
    if not order or len(head) < (540 if two else 348) or head[4:7] != b"n+2" and head[344:347] != b"n+1":
        raise Reject("header", "no NIfTI file that holds its own pixels")

    def get(code, first, second):
        form = order + (code[1] if two else code[0])
        return struct.unpack_from(form, head, second if two else first)

    dim = get(("8h", "8q"), 40, 16)
    size, spacing = dim[1:4], get(("4f", "4d"), 76, 104)
    if not 3 <= dim[0] <= 7 or any(n != 1 for n in dim[4 : dim[0] + 1]):
        raise Reject("not_3d", f"{' x '.join(map(str, dim[1 : min(max(dim[0], 1), 7) + 1]))} voxels")
    (kind,), (offset,) = get(("h", "h"), 70, 12), get(("f", "q"), 108, 168)
    codes = get(("2h", "2i"), 252, 344)
    if get(("B", "i"), 123, 500)[0] & 7 not in (0, 2) or not all(0.01 < s < 100 for s in spacing[1:]):
        raise Reject("header", "units that are not millimetres, or pixdim implausible")
    if not (math.isfinite(offset) and 348 <= offset < TEXT_BYTES):
        raise Reject("header", "vox_offset")
    place = (
        get(("3f", "3d"), 256, 352),
        get(("3f", "3d"), 268, 376),
        np.reshape(get(("12f", "12d"), 280, 400), (3, 4)),
    )
    if all(n > 0 for n in size):
        check_nifti_place(size, spacing[1:], spacing[0], codes, *place)
    packed = path.name.lower().endswith(".gz")
    start, skip = (0, int(offset)) if packed else (int(offset), 0)
    return Header(path, path, start, skip, packed, tuple(size), NIFTI_BYTES.get(kind, 0))


READERS = {".mhd": read_meta, ".mha": read_meta, ".nrrd": read_nrrd, ".nhdr": read_nrrd}


def read_header(path, mask=False):
    """-> Header, if what it says can be; Reject if not. Only a mask may have 8 bits."""
    path = Path(path)
    header = READERS.get(ending(path), read_nifti)(regular(path))
    if not header.voxel_bytes:
        raise Reject("pixel_format", "colours, vectors or an unknown type of voxel")
    if header.voxel_bytes == 1 and not mask:
        raise Reject("not_hu", "8 bits per voxel: a mask, or a picture")
    x, y, z = sorted(header.size)
    if not (x > 0 and y * z <= MAX_PIXELS and x * y * z <= MAX_FILE_PIXELS):
        raise Reject("pixel_format", f"{' x '.join(map(str, header.size))} voxels")
    return header


def unpacked_bytes(path, start, most):
    """Bytes that a gzip or zlib file unpacks to from `start` on, at most about `most`; none of them are kept."""
    total, inflate = 0, zlib.decompressobj(47)  # 47: either kind
    with open(path, "rb") as f:
        f.seek(start)
        rest = f.read(1 << 20)
        while rest and total <= most:
            if inflate.eof:
                inflate = zlib.decompressobj(47)  # gzip files may be several, one after the other
            total += len(inflate.decompress(rest, 1 << 22))
            rest = (inflate.unused_data if inflate.eof else inflate.unconsumed_tail) or f.read(1 << 20)
    if total <= most and not inflate.eof:
        raise zlib.error("ends early")
    return total


def check_data(header):
    """The file holds as many bytes as its header promises, before anything is allocated for them."""
    promised = header.skip + math.prod(header.size) * header.voxel_bytes
    found = regular(header.data).stat().st_size - header.start
    if header.packed:
        if promised > max(1 << 27, MAX_RATIO * found):
            raise Reject("pixel_size", f"{promised} bytes promised by {found} packed ones")
        try:
            found = unpacked_bytes(header.data, header.start, promised)
        except zlib.error:
            raise Reject("pixel_size", "the packed pixels are damaged or end early") from None
    if found != promised:
        raise Reject("pixel_size", f"{'more' if found > promised else 'fewer'} bytes than the {promised} promised")


# Pixels.


def load_itk():
    try:
        import SimpleITK
    except ImportError:
        raise ValueError(
            f"{' '.join(ENDINGS)} files are read by SimpleITK, which is not installed: {INSTALL}"
        ) from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return SimpleITK


def check_hu(values):
    """Refuse what is no CT number: air lies near -1000, bone and metal are not cut off."""
    some = values[:: max(1, len(values) // 200), ::2, ::2]
    low, high = float(values.min()), float(values.max())
    span = f"values from {low:g} to {high:g}"
    air = np.mean((some >= AIR_HU[0]) & (some <= AIR_HU[1]))
    reasons = {
        "a mask, or scaled to 0..1 or -1..1": low >= -1 and high <= 1,
        "an 8-bit picture of a window, or a mask": low >= 0 and high <= 255,
        "stored values before their rescale, or shifted: HU of air are near -1000": low >= 0,
        "scaled, windowed or no CT: hardly a voxel near -1000, where air is": air < MIN_AIR,
        "scaled: one voxel in a hundred is above 3100 HU": np.quantile(some, 0.99) > 3100,
        "windowed: cut off at the top": high < 2000 and np.mean(some == high) > 1e-3,
    }
    for reason, wrong in reasons.items():
        if wrong:
            raise Reject("not_hu", f"{span}: {reason}")


def to_hu(values):
    """Voxels of any type -> int16 HU and what was done to them. Whole numbers stay exact; below -1024 is padding."""
    notes = {}
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise Reject("not_hu", "NaN or infinite voxels")
        whole = np.floor(values + 0.5)
        notes["rounded_voxels"] = int(np.count_nonzero(np.abs(values - whole) > 1e-3))
        values = whole
    check_hu(values)
    padding = values < PADDING_HU
    notes["padding_voxels"] = int(np.count_nonzero(padding))
    hu = np.clip(values, PADDING_HU, 32767).astype(np.int16)
    notes["clipped_pixels"] = int(np.count_nonzero(values > 32767))
    return hu, notes


def upright(values, direction, origin, spacing):
    """Array [z, y, x] of a file -> (array, directions, origin, spacing) whose axes run to left, back and head, and
    what was done to it.

    direction [3, 3]: column i is where axis i (x, y, z of the file) points, in mm to left, back, head.
    """
    which = np.abs(direction).argmax(0)  # of left, back, head, for each axis
    angle = math.degrees(math.acos(min(1, np.abs(direction).max(0).min())))
    if angle > MAX_OBLIQUE_DEG or sorted(which) != [0, 1, 2]:
        raise Reject("oblique", f"{angle:.1f} degrees from the axes of the body, at most {MAX_OBLIQUE_DEG}")
    axis = np.argsort(which)  # of the file, for left, back, head
    signs = np.sign(direction[which[axis], axis])
    count = np.array(values.shape)[::-1]
    last = direction * (spacing * (count - 1))  # from the first to the last voxel of each axis
    origin = origin + last[:, axis[signs < 0]].sum(1)
    values = values.transpose([2 - axis[2], 2 - axis[1], 2 - axis[0]])
    values = values[:: int(signs[2]), :: int(signs[1]), :: int(signs[0])]
    done = {f"turned_{name}": int(sign < 0) for name, sign in zip("xyz", signs)}
    done["exchanged_axes"] = int((axis != [0, 1, 2]).any())
    return values, direction[:, axis] * signs, origin, spacing[axis], done


def decimal(value):
    """A number that has been a float32 as the shortest decimal of that: 0.7, not 0.699999988."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


def place_of(image):
    """Directions, origin and spacing of what SimpleITK read (an image, or the reader of its header)."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    if np.abs(direction.T @ direction - np.eye(3)).max() > 0.01:
        raise Reject("header", "axes that are not perpendicular")
    spacing, origin = (np.array([decimal(v) for v in values]) for values in (image.GetSpacing(), image.GetOrigin()))
    if not all(0.01 < s < 100 for s in spacing):
        raise Reject("header", "spacing implausible")
    exact = np.round(direction)
    return (exact if np.abs(direction - exact).max() < 1e-5 else direction), origin, spacing


def read_place(path):
    """(directions, origin, spacing) of a file in our orientation: voxel (x, y, z) lies at
    origin + directions @ (spacing * voxel) mm to left, back and head. No pixel is read."""
    header, reader = read_header(path, mask=True), load_itk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise Reject("decode", "SimpleITK cannot read it") from None
    nothing = np.broadcast_to(np.int16(0), header.size[::-1])
    return upright(nothing, *place_of(reader))[1:4]


def read_array(header):
    """-> array [z, y, x], directions, origin, spacing, what was done to it; as `upright` gives them."""
    check_data(header)
    itk = load_itk()
    try:
        image = itk.ReadImage(str(header.path))
    except RuntimeError:  # its text tells C++ files and lines
        raise Reject("decode", "SimpleITK cannot read it") from None
    if image.GetSize() != header.size or image.GetNumberOfComponentsPerPixel() != 1:
        raise Reject("header", "SimpleITK reads another size than the header says")
    return upright(itk.GetArrayFromImage(image), *place_of(image))


def read_volume(header, patient, min_slices):
    """-> Volume (of no study, without sops); raises Reject."""
    values, direction, origin, spacing, done = read_array(header)
    if len(values) < min_slices:
        raise Reject("too_few_slices", f"{len(values)} of {min_slices}")
    hu, notes = to_hu(values)
    angle = math.degrees(math.acos(min(1, np.abs(direction).max(0).min())))
    notes |= {"oblique_deg": round(angle, 2), **done}
    z_mm = (origin @ direction[:, 2] + np.arange(len(hu)) * spacing[2]).tolist()
    notes = {name: value for name, value in notes.items() if value}
    return Volume(np.ascontiguousarray(hu), [""] * len(hu), z_mm, tuple(spacing[::-1]), patient, "", notes)
