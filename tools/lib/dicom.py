"""DICOM bytes -> a volume in HU, or the reason why not. Library of preprocess_dicom.py and of the label tools.

Nothing here trusts a header: a value that is missing, of the wrong type or at odds with the rest of its series is
a Reject with one of REASONS, never a guess. Reject details are our own words and numbers, never header text.
"""

import contextlib
import functools
import hashlib
import hmac
import io
import math
import os
import re
import secrets
import stat
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset, read_partial
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from checkpoint import atomic_write
from data import regular

PADDING_HU = -1024  # what PixelPaddingValue becomes: the lowest value of a 12-bit scanner
SAME_POSITION_MM = 0.01
COSINE_TOLERANCE = 1e-3
MAX_PIXELS = 1 << 24  # of one slice; a larger matrix is a damaged header, not a scanner
MAX_FILE_PIXELS = 1 << 31  # of all frames of one file: 8,000 of 512 x 512
MAX_ITEMS = 1 << 17  # of sequences in one file; 4,000 frames have about 40,000
ITEM = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # begins one, in either byte order

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE, DICOMDIR = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, "1.2.840.10008.1.2.2")
# What may follow the pixels: trailing padding (FFFC,FFFC), digital signatures (FFFA,FFFA), in both byte orders.
TRAILING = (b"\xfc\xff\xfc\xff", b"\xff\xfc\xff\xfc", b"\xfa\xff\xfa\xff", b"\xff\xfa\xff\xfa")
DECODER_PACKAGES = {  # transfer syntaxes below 1.2.840.10008.1.2 -> what decodes them
    **dict.fromkeys("4.50 4.51 4.57 4.70 4.80 4.81".split(), "pylibjpeg pylibjpeg-libjpeg"),  # JPEG, JPEG-LS
    **dict.fromkeys("4.90 4.91 4.201 4.202 4.203".split(), "pylibjpeg pylibjpeg-openjpeg"),  # JPEG 2000
    "5": "",  # RLE: pydicom itself
}
GROUPS = {  # where a multi-frame file keeps what others have at the top level (DICOM PS3.3 C.7.6.16, C.8.15.3)
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "FrameType": "CTImageFrameTypeSequence",
}
SCAN_FIELDS = {
    "series": "SeriesInstanceUID",
    "sop": "SOPInstanceUID",
    "patient": "PatientID",
    "identity": "PatientIdentityRemoved",
}
GRAYSCALE = ("MONOCHROME1", "MONOCHROME2")
ID_TAGS = ("SOPInstanceUID", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
SCAN_TAGS = [tag_for_keyword(k) for k in ("SOPClassUID", "ImageType", "Modality", *SCAN_FIELDS.values())]
READ_TAGS = (
    "SOPClassUID SOPInstanceUID ImageType Modality PatientID StudyInstanceUID FrameOfReferenceUID SamplesPerPixel "
    "PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue "
    "PixelPaddingRangeLimit NumberOfFrames SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelData"
).split() + list(GROUPS)

REASONS = {  # code -> what it means and, where there is something to do, what
    "not_dicom": "not a DICOM file",
    "unreadable": "cannot be opened or read: check permissions, links and the disk",
    "dicomdir": "a DICOMDIR: the list of the files of a disc, no image",
    "no_series": "DICOM without SeriesInstanceUID",
    "not_ct": "another object or modality than a CT image",
    "secondary_capture": "secondary capture: a screenshot, not measured HU",
    "localizer": "scout view",
    "derived": "derived or secondary (ImageType): not as the scanner measured it",
    "header": "a needed header value is missing, damaged or of the wrong type",
    "not_grayscale": "colour or palette pixels",
    "pixel_format": "not 16-bit integers, or an impossible matrix or bit layout",
    "rescale_missing": "no RescaleSlope or RescaleIntercept: stored values cannot become HU",
    "rescale_not_hu": "RescaleType is not HU",
    "rescale_implausible": "RescaleSlope or RescaleIntercept that no CT writes",
    "pixel_size": "pixel data missing, truncated or not of the size of the matrix",
    "transfer_syntax": "unknown transfer syntax",
    "compressed": "compressed and no decoder is installed",
    "decode": "compressed pixels that cannot be decoded",
    "no_patient_id": "no PatientID: cannot be kept on one side of a split",
    "mixed_patient": "several patients or studies under one SeriesInstanceUID",
    "mixed_frame": "several frames of reference: positions cannot be compared",
    "mixed_matrix": "several matrix sizes in one series",
    "mixed_orientation": "several slice orientations in one series",
    "mixed_spacing": "several pixel spacings in one series",
    "coding_disagrees": "rescale, bits or padding of a slice contradict its neighbours",
    "duplicate_position": "different images at one position",
    "duplicate_sop": "one SOPInstanceUID on different images",
    "irregular_spacing": "missing or irregularly spaced slices (--allow-gaps keeps regular runs)",
    "too_few_slices": "fewer usable slices than --min-slices",
    # of volumes that are not DICOM
    "not_volume": "no .mhd, .nii, .nii.gz or .nrrd file, nor the pixels of one",
    "not_3d": "not one volume of three dimensions",
    "not_hu": "values that are no HU: a mask, scaled, windowed, or before their rescale",
    "no_orientation": "the header does not say how the volume lies: left could be right",
    "orientation_disagrees": "the header says twice how the volume lies, and differently",
    "oblique": "the axes of the volume are far from those of the body",
}

# What pydicom 3.0 was seen to raise on damaged files. Only its reading of one file runs under these, no code of ours.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    OSError,  # of the buffer: the file itself is read before
    RuntimeError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)


class Reject(Exception):
    """A file or series that is not used: Reject(reason, detail), reason one of REASONS."""

    def __init__(self, reason, detail=""):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Scan(NamedTuple):
    """By what a file finds its series; reason is empty for a CT slice."""

    path: str
    content: str  # names a file that belongs to no series: hash of its beginning, since its path may hold a name
    series: str
    sop: str
    patient: str
    identity: str  # PatientIdentityRemoved
    reason: str
    detail: str


class Coding(NamedTuple):
    """How a stored 16-bit word means HU."""

    bits_stored: int
    high_bit: int
    signed: bool
    slope: float
    intercept: float
    padding: int | None  # as a 16-bit word
    padding_limit: int | None


class Slice(NamedTuple):
    sop: str
    frame: int
    patient: str
    study: str
    frame_of_reference: str
    position: tuple  # mm, centre of the first pixel
    orientation: tuple  # row cosines, column cosines
    spacing: tuple  # mm between rows, between columns
    coding: Coding
    words: np.ndarray  # uint16 [H, W], as stored
    notes: tuple  # what was special about the file


class Volume(NamedTuple):
    hu: np.ndarray  # int16 [Z, H, W], ascending along the slice normal
    sops: list
    z_mm: list  # position along the slice normal
    spacing: tuple  # mm z, y, x
    patient: str
    study: str
    handled: dict  # what was found and dealt with: name -> number


# Ids that may leave the raw folder.


def default_key_file(out):
    """Beside the processed root, never inside it."""
    return Path(out).resolve().parent / "dinox_id_key"


def load_key(path):
    """32 secret bytes from `path`; created there once, readable by its owner only."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(f):
            os.chmod(f.name, 0o600)  # before the secret is in it
            f.write(secrets.token_hex(32).encode())

        mine = atomic_write(path.with_name(f".{path.name}.{secrets.token_hex(4)}"), write)
        try:
            os.link(mine, path)  # of several shards that begin at once the first one's key is everybody's
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(mine, path)
        finally:
            mine.unlink(missing_ok=True)
    text = regular(path).read_text(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{path}: a key file holds 64 hex digits; restore it or name another with --key-file")
    return bytes.fromhex(text)


def public_id(kind, text, key=None):
    """The id of a "patient", "study", "series" or "sop" as our files show it; usable as a file name.

    With a key HMAC-SHA256, as a UID under 2.25 where DICOM has a UID. Without one (identity already removed) the id
    itself, or its hash where it is no plain id and might be a path or free text.
    """
    secret = f"{kind}:{text}".encode(errors="surrogatepass")
    if key is not None:
        digest = hmac.new(key, secret, hashlib.sha256).digest()
        return f"p{digest[:8].hex()}" if kind == "patient" else f"2.25.{int.from_bytes(digest[:16], 'big')}"
    plain = "[A-Za-z0-9][A-Za-z0-9_.-]*" if kind == "patient" else r"[0-9]+(\.[0-9]+)*"
    if len(text) <= 64 and re.fullmatch(plain, text):
        return text
    return f"x{hashlib.sha256(secret).hexdigest()[:32]}"


# One file.


@contextlib.contextmanager
def parsing(reason):
    """pydicom's errors on damaged bytes become Rejects; its warnings, which quote header text, are not printed."""
    settings, mode = pydicom.config.settings, pydicom.config.settings.reading_validation_mode
    settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DAMAGE as error:
        raise Reject(reason, type(error).__name__) from None
    finally:
        settings.reading_validation_mode = mode


def text_of(ds, keyword):
    value = ds.get(keyword)
    return "" if value is None else str(value).strip(" \0")


def check_image_type(values):
    values = [values] if isinstance(values, str) else list(values or [])
    kinds = [str(value).strip().upper() for value in values]
    if "LOCALIZER" in kinds:
        raise Reject("localizer")
    if "DERIVED" in kinds[:1] or "SECONDARY" in kinds[1:2]:
        raise Reject("derived")


def check_kind(ds):
    """Raises unless this is a CT slice as measured."""
    sop_class = text_of(ds, "SOPClassUID")
    if sop_class == SECONDARY_CAPTURE or sop_class.startswith(f"{SECONDARY_CAPTURE}."):
        raise Reject("secondary_capture")
    if sop_class != CT and sop_class not in ENHANCED_CT:
        raise Reject("not_ct", "SOPClassUID")
    if text_of(ds, "Modality") != "CT":
        raise Reject("not_ct", "Modality")
    check_image_type(ds.get("ImageType"))


def unpacked(data):
    """The bytes of a file and, if it is deflated, what it unpacks to, in pieces."""
    yield data
    if DEFLATED.encode() not in data:
        return
    file = io.BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    rest = file.read() if text_of(meta, "TransferSyntaxUID") == DEFLATED else b""
    while rest and not inflate.eof:
        yield inflate.decompress(rest, 1 << 20)
        rest = inflate.unconsumed_tail


def check_size(data):
    """Refuse what is small on the disk and large in memory: pydicom needs 1.4 GB for a million empty items (8 MB)."""
    size = items = 0
    for piece in unpacked(data):
        size, items = size + len(piece), items + max(map(piece.count, ITEM))
        if size > max(1 << 27, 20 * len(data)):
            raise Reject("header", f"{len(data)} bytes that unpack to more than {size}")
        if items > MAX_ITEMS:
            raise Reject("header", f"more than {MAX_ITEMS} items of sequences")


def read_scan(data):
    """The beginning of a file -> fields of Scan; raises when it ends before its SeriesInstanceUID is complete."""
    passed, groups = [], set()

    def beyond_series(tag, vr, length):
        groups.add(tag >> 16)
        if tag > tag_for_keyword("SeriesInstanceUID"):
            passed.append(tag)
        return bool(passed)

    with parsing("header"):
        check_size(data)
        ds = read_partial(io.BytesIO(data), beyond_series, force=True, specific_tags=SCAN_TAGS)
        if text_of(ds.file_meta, "MediaStorageSOPClassUID") == DICOMDIR or 4 in groups:  # the group of directories
            raise Reject("dicomdir")
        if not passed:
            raise Reject("header", "the file ends early")
        fields = {name: text_of(ds, keyword) for name, keyword in SCAN_FIELDS.items()}
        if not fields["series"]:
            raise Reject("no_series")
        try:
            check_kind(ds)
        except Reject as reject:
            fields |= {"reason": reject.reason, "detail": reject.detail}
    return fields


def scan_file(path):
    """Header of one file -> Scan. Reads 16 KiB, the rest only where these are not enough."""
    found = dict.fromkeys(Scan._fields, "") | {"path": path}
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path} is no regular file")  # opening a pipe would wait for ever
        with open(path, "rb") as f:
            head = f.read(1 << 14)
            found["content"] = hashlib.sha256(head).hexdigest()[:16]
            magic = head[128:132] == b"DICM"
            if not magic and head[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):
                raise Reject("not_dicom")  # nor group 2 or 8 in either byte order, as files without preamble begin
            try:
                found |= read_scan(head)
            except Reject:
                found |= read_scan(head + f.read(1 << 26))  # of a huge file that is none of ours, not all
    except OSError:
        found["reason"] = "unreadable"
    except Reject as reject:
        found |= {"reason": reject.reason if magic else "not_dicom", "detail": reject.detail if magic else ""}
    return Scan(**found)


def value_of(ds, keyword, count=1):
    """A finite number of the type that the standard gives it, or a tuple of `count` of them."""
    if keyword not in ds or ds[keyword].is_empty:
        raise Reject("header", f"{keyword} missing")
    element = ds[keyword]
    if dictionary_VR(element.tag) != element.VR:
        raise Reject("header", f"{keyword} of the wrong type")
    values = (element.value,) if count == 1 else tuple(element.value)
    values = tuple(float(v) if element.VR == "DS" else int(v) for v in values)
    if len(values) != count or not all(map(math.isfinite, values)):
        raise Reject("header", f"{keyword} damaged")
    return values[0] if count == 1 else values


def layout_of(ds):
    """-> frames, rows, cols, (bits stored, high bit, signed)"""
    if value_of(ds, "SamplesPerPixel") != 1 or text_of(ds, "PhotometricInterpretation") not in GRAYSCALE:
        raise Reject("not_grayscale")
    rows, cols = value_of(ds, "Rows"), value_of(ds, "Columns")
    allocated, stored, high_bit = (value_of(ds, k) for k in ("BitsAllocated", "BitsStored", "HighBit"))
    signed = value_of(ds, "PixelRepresentation")
    if allocated != 16 or not 1 <= stored <= high_bit + 1 <= 16 or signed not in (0, 1):
        raise Reject("pixel_format", f"{allocated} bits allocated, {stored} stored, high bit {high_bit}")
    if not 0 < rows * cols <= MAX_PIXELS:
        raise Reject("pixel_format", f"{rows} x {cols} pixels")
    frames, groups = int(ds.get("NumberOfFrames") or 1), ds.get("PerFrameFunctionalGroupsSequence") or []
    if not 0 < frames * rows * cols <= MAX_FILE_PIXELS:
        raise Reject("pixel_format", f"{frames} frames of {rows} x {cols} pixels")
    if len(groups) != (frames if text_of(ds, "SOPClassUID") in ENHANCED_CT else 0) or frames > max(len(groups), 1):
        raise Reject("header", f"{frames} frames, {len(groups)} functional groups")
    return frames, rows, cols, (stored, high_bit, bool(signed))


def part_of(ds, frame, keyword):
    """The dataset that holds `keyword` of this frame: the file, or a functional group of a multi-frame file."""
    if "PerFrameFunctionalGroupsSequence" not in ds:
        return ds
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    for groups in (ds.PerFrameFunctionalGroupsSequence[frame], *shared):
        if groups.get(GROUPS[keyword]):
            return groups[GROUPS[keyword]][0]
    return pydicom.Dataset()


def rescale_of(ds):
    """-> slope, intercept. Absent is not 1 and 0: that would be 1024 HU off without a word."""
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        if keyword not in ds or ds[keyword].is_empty:
            raise Reject("rescale_missing", keyword)
    if text_of(ds, "RescaleType").upper() not in ("", "HU"):
        raise Reject("rescale_not_hu")
    slope, intercept = value_of(ds, "RescaleSlope"), value_of(ds, "RescaleIntercept")
    if not 0 < slope <= 100 or abs(intercept) > 1e5:
        raise Reject("rescale_implausible")
    return slope, intercept


def geometry_of(ds, frame):
    """-> position, orientation, spacing"""
    check_image_type(part_of(ds, frame, "FrameType").get("FrameType"))
    wanted = (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    position, orientation, spacing = (value_of(part_of(ds, frame, k), k, count) for k, count in wanted)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 0.01:
        raise Reject("header", "ImageOrientationPatient is not two perpendicular directions")
    if not all(0.01 < s < 10 for s in spacing):
        raise Reject("header", "PixelSpacing implausible")
    return position, orientation, spacing


def padding_word(ds, keyword):
    """As the 16-bit word: writers disagree about the sign of this tag (63536 stands for -2000)."""
    return int(ds[keyword].value) & 0xFFFF if keyword in ds and not ds[keyword].is_empty else None


def pixel_words(ds, frames, rows, cols):
    """Pixel data -> uint16 [frames, H, W], bits as stored."""
    syntax = UID(text_of(ds.file_meta, "TransferSyntaxUID"))
    if not ds.get("PixelData"):
        raise Reject("pixel_size", "no pixel data")
    if not syntax or syntax in NATIVE:
        ds.buffer.seek(ds["PixelData"].file_tell + len(ds.PixelData))
        rest = ds.buffer.read()
        if len(ds.PixelData) != 2 * frames * rows * cols or rest and rest[:4] not in TRAILING:
            found = f"{len(ds.PixelData)} bytes, then {len(rest)} others"  # bytes were lost or slipped in
            raise Reject("pixel_size", f"{found}, for {frames} x {rows} x {cols} pixels")
        byte_order = "<" if ds.original_encoding[1] else ">"
        return np.frombuffer(ds.PixelData, f"{byte_order}u2").astype(np.uint16, copy=False).reshape(frames, rows, cols)
    package = DECODER_PACKAGES.get(syntax.removeprefix("1.2.840.10008.1.2."))
    if package is None:
        raise Reject("transfer_syntax")
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise Reject("compressed", f"pip install {package}")
    warnings.simplefilter("error")  # pydicom warns, and goes on, where decoded bytes and header disagree
    try:
        planes = [plane for plane, _ in decoder.iter_array(ds, raw=True)]
    except DAMAGE as error:  # Pillow counts as a decoder and reads 8 of the 12 bits of lossy JPEG
        hint = f", if sound: pip install {package}" if package and decoder.missing_dependencies else ""
        raise Reject("decode", type(error).__name__ + hint) from None
    if len(planes) != frames or any(p.shape != (rows, cols) or p.dtype.itemsize != 2 for p in planes):
        raise Reject("decode", "decoded matrix and header disagree")
    return np.stack(planes).view(np.uint16)


def notes_of(plane, layout_bits, padding, **facts):
    _, high_bit, signed = layout_bits
    facts["padding_slices"] = padding[0] is not None
    facts["stray_bits_slices"] = not signed and int(plane.max()) >> (high_bit + 1) > 0
    return tuple(name for name, is_so in facts.items() if is_so)


def read_slices(data):
    """The bytes of one file -> its slices: one, or one per frame."""
    with parsing("header"):
        check_size(data)
        ds = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=READ_TAGS)
        check_kind(ds)
        frames, rows, cols, bits = layout_of(ds)
        sop, *ids = (text_of(ds, k) for k in ID_TAGS)
        if not sop:
            raise Reject("header", "SOPInstanceUID missing")
        padding = padding_word(ds, "PixelPaddingValue"), padding_word(ds, "PixelPaddingRangeLimit")
        geometries = [geometry_of(ds, frame) for frame in range(frames)]
        codings = [Coding(*bits, *rescale_of(part_of(ds, frame, "RescaleSlope")), *padding) for frame in range(frames)]
        facts = {
            "multiframe_slices": frames > 1,
            "compressed_slices": text_of(ds.file_meta, "TransferSyntaxUID") not in ("", *NATIVE),
            # The display is inverted, the stored values are not: HU = slope * stored + intercept holds (PS3.3 C.11.1).
            "monochrome1_slices": text_of(ds, "PhotometricInterpretation") == "MONOCHROME1",
        }
    with parsing("decode"):
        words = pixel_words(ds, frames, rows, cols)
    return [
        Slice(sop, frame, *ids, *geometries[frame], codings[frame], plane, notes_of(plane, bits, padding, **facts))
        for frame, plane in enumerate(words)
    ]


# Stored words to HU.


def stored_values(bits_stored, high_bit, signed):
    """The value of each of the 65,536 words: int32; bits outside the stored ones are dropped, the sign extended."""
    top = np.arange(1 << 16, dtype=np.uint16) << (15 - high_bit)  # stray high bits fall off
    return (top.view(np.int16) if signed else top).astype(np.int32) >> (16 - bits_stored)


@functools.lru_cache(256)
def padding_table(coding):
    """-> bool [65536]: is this word padding? A value that the stored bits cannot hold is compared as a whole word."""
    if coding.padding is None:
        return np.zeros(1 << 16, bool)
    stored = stored_values(coding.bits_stored, coding.high_bit, coding.signed)
    limits = [coding.padding, coding.padding if coding.padding_limit is None else coding.padding_limit]
    low, high = sorted(np.array(limits, np.uint16).view(np.int16 if coding.signed else np.uint16).tolist())
    if stored.min() <= low and high <= stored.max():
        return (stored >= low) & (stored <= high)
    return np.isin(np.arange(1 << 16), limits)


@functools.lru_cache(256)
def hu_table(coding):
    """-> int16 [65536]: HU of each word, floor(slope * stored + intercept + 0.5), clipped to int16; padding first."""
    stored = stored_values(coding.bits_stored, coding.high_bit, coding.signed)
    hu = np.floor(stored * coding.slope + coding.intercept + 0.5)
    hu[padding_table(coding)] = PADDING_HU
    return np.clip(hu, -32768, 32767).astype(np.int16)


def most_common(values):
    """The most frequent value; of equals the last in the order of repr, so that file order plays no part."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], repr(value)))


def check_codings(slices):
    """A slice coded unlike most of its series must fit its neighbours clearly better its own way than theirs.

    A rescale per slice is lawful, and a damaged slope, sign or padding looks the same in the header: the pixels tell.
    Where no coding has the majority (rescales vary throughout) its own way need only be the better one.
    """
    usual = most_common(s.coding for s in slices)
    factor = 2 if 2 * sum(s.coding == usual for s in slices) > len(slices) else 1

    def quantiles(s, coding):
        return np.quantile(hu_table(coding)[s.words[::2, ::2]], np.linspace(0.05, 0.95, 19))

    for i, s in enumerate(slices):
        if s.coding == usual or np.array_equal(hu_table(s.coding)[s.words], hu_table(usual)[s.words]):
            continue
        near = np.mean([quantiles(n, n.coding) for n in slices[max(i - 1, 0) : i] + slices[i + 1 : i + 2]], axis=0)
        own, others = (np.abs(quantiles(s, coding) - near).mean() for coding in (s.coding, usual))
        if others < factor * own:
            raise Reject("coding_disagrees", f"{own:.0f} HU from its neighbours, {others:.0f} if coded as they are")


# A series.


def check_uniform(slices):
    """Everything that must be one within a volume."""
    if not all(s.patient for s in slices):
        raise Reject("no_patient_id")
    if len({(s.patient, s.study) for s in slices}) > 1:
        raise Reject("mixed_patient")
    if len({s.frame_of_reference for s in slices} - {""}) > 1:
        raise Reject("mixed_frame")
    if len({s.words.shape for s in slices}) > 1:
        raise Reject("mixed_matrix", ", ".join(sorted({"{} x {}".format(*s.words.shape) for s in slices})))
    orientations, spacings = np.array([s.orientation for s in slices]), np.array([s.spacing for s in slices])
    if np.abs(orientations - most_common(s.orientation for s in slices)).max() > COSINE_TOLERANCE:
        raise Reject("mixed_orientation")
    if np.abs(spacings / most_common(s.spacing for s in slices) - 1).max() > 1e-3:
        raise Reject("mixed_spacing")


def normal_of(slices):
    orientation = np.array(most_common(s.orientation for s in slices))
    normal = np.cross(orientation[:3], orientation[3:])
    return normal / np.linalg.norm(normal)


def drop_duplicates(slices, normal):
    """Sorted slices -> those of different positions. Two images at one position cannot both be the slice."""
    kept = slices[:1]
    for s in slices[1:]:
        step = np.subtract(s.position, kept[-1].position)
        if step @ normal > SAME_POSITION_MM:
            kept.append(s)
            continue
        same = np.array_equal(hu_table(s.coding)[s.words], hu_table(kept[-1].coding)[kept[-1].words])
        if not same or np.linalg.norm(step) > SAME_POSITION_MM:
            raise Reject("duplicate_position", f"{len(slices)} slices")
    if len({(s.sop, s.frame) for s in kept}) < len(kept):
        raise Reject("duplicate_sop")
    return kept


def tolerance(length):
    """Of a step in mm: 10% or 0.1 mm, what rounding to one decimal does to 0.625 mm."""
    return min(max(0.1 * length, 0.1), 0.4 * length)


def longest_run(steps, step):
    """Steps [n, 3] -> (first slice, end) of the longest run of slices at this step. Steps are compared as vectors: a
    shift within the plane is as wrong as a gap."""
    odd = np.flatnonzero(np.linalg.norm(steps - step, axis=1) > tolerance(np.linalg.norm(step)))
    ends = [0, *(odd + 1), len(steps) + 1]
    k = max(range(len(ends) - 1), key=lambda i: ends[i + 1] - ends[i])
    return ends[k], ends[k + 1]


def regular_run(slices):
    """-> (first, end, step) of the longest run of one step: the median one, or one that many of the slices have."""
    steps = np.diff([s.position for s in slices], axis=0)
    found, of, counts = np.unique(steps.round(1), axis=0, return_inverse=True, return_counts=True)
    often = np.argsort(-counts, kind="stable")[:16]
    candidates = [np.median(steps, 0), *(np.median(steps[of.ravel() == k], 0) for k in often)]
    runs = [(*longest_run(steps, step), step) for step in candidates]
    return max(runs, key=lambda run: run[1] - run[0])


def regular_runs(slices, min_slices, allow_gaps):
    """-> [(slices of one step, step in mm x 3)], along the normal. With allow_gaps the longest run of each spacing."""
    steps = np.diff([s.position for s in slices], axis=0)  # [Z-1, 3]
    step = np.median(steps, axis=0)
    first, end = longest_run(steps, step)
    if end - first == len(slices):
        return [(slices, step)]
    if not allow_gaps:
        length, errors = np.linalg.norm(step), np.linalg.norm(steps - step, axis=1)
        worst, odd = np.linalg.norm(steps[errors.argmax()]), (errors > tolerance(length)).sum()
        raise Reject("irregular_spacing", f"{odd} odd steps, worst {worst:.2f} mm, median {length:.2f} mm")
    runs, pieces, longest = [], [(0, len(slices))], 0
    while pieces:
        start, stop = pieces.pop()
        if stop - start < max(min_slices, 2):
            continue
        first, end, step = regular_run(slices[start:stop])
        longest = max(longest, end - first)
        if end - first >= min_slices:
            runs.append((start + first, start + end, step))
            pieces += [(start, start + first), (start + end, stop)]
    kept = []
    for first, end, step in sorted(runs, key=lambda run: (run[0] - run[1], run[0])):  # the longest of each spacing
        length = np.linalg.norm(step)
        if all(abs(np.linalg.norm(other) - length) > tolerance(length) for *_, other in kept):
            kept.append((first, end, step))
    if not kept:
        raise Reject("irregular_spacing", f"longest regular run has {longest} of {min_slices} slices")
    return [(slices[first:end], step) for first, end, step in sorted(kept, key=lambda run: run[0])]


def assemble(slices, min_slices, allow_gaps=False):
    """Slices of one series, in any order -> [Volume]: one, or with allow_gaps one per spacing; raises Reject."""
    if len(slices) < min_slices:
        raise Reject("too_few_slices", f"{len(slices)} of {min_slices}")
    check_uniform(slices)
    normal = normal_of(slices)
    slices = sorted(slices, key=lambda s: (float(np.dot(s.position, normal)), s.sop, s.frame))
    check_codings(slices)
    distinct = drop_duplicates(slices, normal)
    if len(distinct) < min_slices:
        raise Reject("too_few_slices", f"{len(distinct)} of {min_slices} after dropping duplicates")
    dropped = len(slices) - len(distinct)
    return [
        volume_of(run, step, normal, duplicates_dropped=dropped, outside_regular_run=len(distinct) - len(run))
        for run, step in regular_runs(distinct, min_slices, allow_gaps)
    ]


def volume_of(run, step, normal, **facts):
    """Slices at one step (mm x 3), sorted -> Volume."""
    z_mm = [float(np.dot(s.position, normal)) for s in run]
    hu = np.empty((len(run), *run[0].words.shape), np.int16)
    for z, s in enumerate(run):
        hu[z] = hu_table(s.coding)[s.words]
    handled = Counter(note for s in run for note in s.notes) + Counter(facts)
    handled["own_rescale_slices"] = len(run) - max(Counter(s.coding[3:5] for s in run).values())
    handled["clipped_pixels"] = int(np.count_nonzero((hu == -32768) | (hu == 32767)))
    handled["tilt_deg"] = round(math.degrees(math.acos(min(1, step @ normal / np.linalg.norm(step)))), 2)
    spacing = (float(np.median(np.diff(z_mm))), *most_common(s.spacing for s in run))
    sops = [s.sop for s in run]
    return Volume(hu, sops, z_mm, spacing, run[0].patient, run[0].study, {k: v for k, v in handled.items() if v})
