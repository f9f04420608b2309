"""Real files of scanners, where the packages that hold them are installed; nothing of them lies in the repository."""

import importlib.util
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tools.lib import dicom

FOUND = importlib.util.find_spec("data_store")
FILES = Path(FOUND.origin).parent / "data" if FOUND and FOUND.origin else None
needs_files = pytest.mark.skipif(FILES is None, reason="real DICOM files: pip install pydicom-data")


def needs(module):
    installed = importlib.util.find_spec(module)
    return pytest.mark.skipif(installed is None, reason=f"decoder: pip install pylibjpeg pylibjpeg-{module}")


def words_of(name):
    """The 16-bit words of a file of any modality, as our reader gives them."""
    data = (FILES / name).read_bytes()
    with dicom.parsing("decode"):
        ds = pydicom.dcmread(BytesIO(data), specific_tags=dicom.READ_TAGS)
        frames = int(ds.get("NumberOfFrames") or 1)
        return dicom.pixel_words(ds, frames, ds.Rows, ds.Columns)


@needs_files
@needs("openjpeg")
def test_jpeg_2000_of_a_scanner_is_its_uncompressed_twin():
    assert np.array_equal(words_of("693_J2KR.dcm"), words_of("693_UNCR.dcm"))
    [one], [other] = (dicom.read_slices((FILES / name).read_bytes()) for name in ("693_J2KR.dcm", "693_UNCR.dcm"))
    tables = [dicom.hu_table(s.coding)[s.words] for s in (one, other)]
    assert np.array_equal(*tables) and tables[0].std() > 100 and tables[0].shape == (512, 512)
    assert "compressed_slices" in one.notes and "compressed_slices" not in other.notes
    assert np.array_equal(words_of("emri_small_jpeg_2k_lossless.dcm"), words_of("emri_small.dcm"))
    with pytest.raises(dicom.Reject, match="decode"):
        words_of("emri_small_jpeg_2k_lossless_too_short.dcm")


@needs_files
@needs("libjpeg")
def test_jpeg_ls_of_ten_frames_is_its_uncompressed_twin():
    assert words_of("emri_small_jpeg_ls_lossless.dcm").shape == (10, 64, 64)
    assert np.array_equal(words_of("emri_small_jpeg_ls_lossless.dcm"), words_of("emri_small.dcm"))


@needs_files
def test_run_lengths_and_big_endian_words_are_the_same_pixels():
    for name in ("emri_small_RLE.dcm", "emri_small_big_endian.dcm"):
        assert np.array_equal(words_of(name), words_of("emri_small.dcm")), name


@needs_files
def test_a_multi_frame_ct_is_read_and_a_perfusion_map_is_none():
    """The one real file is a map of blood flow: rejected as derived. Called original, its frames are read in place."""
    path = FILES / "eCT_Supplemental.dcm"
    assert dicom.scan_file(path).reason == "derived"
    ds = pydicom.dcmread(path)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = ds.SharedFunctionalGroupsSequence[0]
    shared.CTImageFrameTypeSequence[0].FrameType = ds.ImageType
    for groups in [shared, *ds.PerFrameFunctionalGroupsSequence]:
        for one in groups.get("PixelValueTransformationSequence") or []:
            one.RescaleType = "HU"
    file = BytesIO()
    ds.save_as(file)
    first, second = dicom.read_slices(file.getvalue())
    assert np.array_equal(np.stack([first.words, second.words]), ds.pixel_array)
    positions = [g.PlanePositionSequence[0].ImagePositionPatient for g in ds.PerFrameFunctionalGroupsSequence]
    assert [first.position, second.position] == [tuple(map(float, p)) for p in positions] != 2 * [first.position]
    assert (first.frame, second.frame) == (0, 1) and "multiframe_slices" in first.notes
