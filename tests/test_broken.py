"""Pictures of every kind that a folder may hold, and broken ones: what is read, what is said, what is left out."""

import numpy as np
import pytest
from PIL import Image, features

import data
import train_ssl
from tools import check_duplicates
from tools.lib import broken

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    data.say_once.cache_clear()


def save(folder, name, image=None, **options):
    folder.mkdir(exist_ok=True)
    (Image.fromarray(PIXELS) if image is None else image).save(folder / name, **options)
    return folder


def only(folder):
    return data.open_source(folder).read(0).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.WEBP", "a.bmp", "a.tif", "a.tiff"])
def test_every_named_format_gives_its_pixels(tmp_path, name):
    if name.lower().endswith("webp") and not features.check("webp"):
        pytest.skip("this pillow has no WebP")
    options = {"lossless": True} if name.lower().endswith("webp") else {}
    save(tmp_path / "p", name, format=None, **options)
    assert np.array_equal(only(tmp_path / "p"), PIXELS)
    image, boxes = data.read_photo(tmp_path / "p" / name, lambda h, w: np.array([[0, 0, h, w]]), [h := 24])
    assert np.array_equal(image.numpy().transpose(1, 2, 0), PIXELS) and boxes.tolist() == [[0, 0, h, 32]]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "p.png", "la.png"])
def test_transparency_is_put_on_white_and_said_once(tmp_path, name, capsys):
    rgba = np.concatenate([PIXELS, np.full((24, 32, 1), 255, np.uint8)], 2)
    rgba[:, :16, 3] = 0
    image = Image.fromarray(rgba)
    if name == "la.png":
        image = image.convert("LA")
    if name == "p.png":  # one colour of a palette is transparent: the left half
        image = Image.fromarray((np.arange(32) >= 16).astype(np.uint8)[None].repeat(24, 0), "P")
        image.putpalette([9, 9, 9, 50, 60, 70])
    save(tmp_path / "p", name, image, **({"transparency": 0} if name == "p.png" else {}))
    save(tmp_path / "p", "b" + name, image, **({"transparency": 0} if name == "p.png" else {}))
    source = data.open_source(tmp_path / "p")
    for i in (0, 1):
        pixels = source.read(i).numpy().transpose(1, 2, 0)
        assert (pixels[:, :16] == 255).all() and not (pixels[:, 16:] == 255).all()
    if name == "a.png":
        assert np.array_equal(pixels[:, 16:], PIXELS[:, 16:])
    assert capsys.readouterr().out == "transparent pictures are put on white\n"


def test_an_opaque_alpha_channel_is_no_news(tmp_path, capsys):
    save(tmp_path / "p", "a.png", Image.fromarray(PIXELS).convert("RGBA"))
    assert np.array_equal(only(tmp_path / "p"), PIXELS) and capsys.readouterr().out == ""


def test_of_several_pages_the_first_is_read_and_said(tmp_path, capsys):
    save(tmp_path / "p", "a.tif", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    assert np.array_equal(only(tmp_path / "p"), PIXELS)
    assert "several pages or frames the first is read" in capsys.readouterr().out


def test_what_is_no_picture_is_counted_and_named_once(tmp_path, capsys):
    folder = save(tmp_path / "p", "a.png")
    for name in ("labels.csv", "b.heic", "notes.txt", "more.txt", "README", ".hidden", "sub/labels.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("path,label\na.png,x\n")
    data.open_source(folder)
    data.open_source(folder)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "5 files are no pictures and are not read" in said
    assert "2 .txt" in said and "1 without an ending" in said and "1 .csv" in said
    assert data.heic_formats() or "pip install pillow-heif reads .heic" in said


def test_a_folder_of_dicom_is_told_what_to_do_first(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "IM0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    with pytest.raises(FileNotFoundError, match="nor a picture .*it holds DICOM files as acquired: preprocess them"):
        data.open_source(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    ("content", "why"),
    [(b"II*\0\x08\0\0\0\0\0", "cannot be read"), (b"RIFF\x10\0\0\0AVI ", "its content is AVI or broken")],
)
def test_another_content_under_a_pictures_name_is_named(tmp_path, content, why):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(data.Unreadable, match=f"a.png.*{why}"):
        only(tmp_path)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_16_bits_are_refused(tmp_path, name):
    save(tmp_path / "p", name, Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80))
    with pytest.raises(data.Unreadable, match="pixels of mode I;16, expected 8 bits"):
        only(tmp_path / "p")


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, three of them broken in ways of their own."""
    root = tmp_path / "photos"
    for k in range(12):
        noise = np.random.default_rng(k).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        save(root, f"{k:02d}.jpg", Image.fromarray(noise))
    (root / "02.jpg").write_bytes((root / "02.jpg").read_bytes()[:600])  # cut
    (root / "05.jpg").write_bytes(b"")
    (root / "09.jpg").write_bytes(b"<html>not found</html>")
    return root


TRAIN = (
    "--no-split --arch vit_test --batch-size 6 --koleo-group 2 --global-size 32 --local-size 16 --local-crops 2 "
    "--prototypes 16 --head-hidden 16 --head-bottleneck 8 --workers 0 --device cpu --steps 2 --gram-weight 0"
).split()


def test_training_names_all_broken_files_at_once_and_how_to_go_on(folder, tmp_path, capsys):
    flags = ["--data", str(folder), "--out", str(tmp_path / "run"), *TRAIN]
    with pytest.raises(data.Unreadable, match="^3 of 12 files cannot be read .*02.jpg.*--skip-bad 3"):
        train_ssl.main(flags)
    said = capsys.readouterr().err
    assert all(f"{name}.jpg cannot be read" in said for name in ("02", "05", "09")) and "HTML, XML or SVG" in said
    assert train_ssl.main([*flags, "--skip-bad", "3"]) == 0


def test_duplicates_are_sought_among_what_can_be_read(folder, capsys):
    flags = ["--data", str(folder), "--workers", "1"]
    with pytest.raises(data.Unreadable, match="^3 of 12 files cannot be read"):
        check_duplicates.main([*flags, "--skip-bad", "2"])
    assert capsys.readouterr().err.count("cannot be read: ") == 3
    assert not (folder / "_splits").exists()
    assert check_duplicates.main([*flags, "--skip-bad", "3"]) == 0
    assert "broken=3" in capsys.readouterr().out


def test_a_source_without_its_broken_files(folder, capsys):
    source = data.open_source(folder)
    assert broken.leave_out(source, 0) is source  # nothing is read where nothing may be left out
    kept = broken.leave_out(source, 3)
    assert [kept.rows[i]["path"] for i in range(len(kept))] == [f"{k:02d}.jpg" for k in range(12) if k not in (2, 5, 9)]
    assert "3 of at most 3 broken files left out" in capsys.readouterr().out
    assert kept.index_sha256 == source.index_sha256


def test_time_for_looking_at_all_files_is_bounded(folder):
    source = data.open_source(folder)
    assert broken.find(source, seconds=-1) == ({}, 0, 12)
    with pytest.raises(data.Unreadable, match="^1 of the first 5 of 12 files cannot be read"):
        broken.check({"x": "x cannot be read"}, 5, 12, 0)
