"""Dense features in patient space: a point in mm is the same point in the CT and in what is written."""

import csv
import gzip
import itertools
import json
import struct

import numpy as np
import pytest
import torch

import checkpoint
from data import eval_view
from model import build_vit, load_backbone
from tools import features, make_phantom, preprocess_dicom
from tools.lib import dense, sheet, space

torch.set_num_threads(1)


def oblique(step=(0.7, 0.8, 2.5), origin=(-150.0, 30.5, -410.25), degrees=12):
    """An affine that is turned about all axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * step, origin
    return affine


def all_turns():
    return [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product([0, 1], repeat=3)]


def stored_as(axes, flips, affine=None, size=(5, 4, 3)):
    """Values that name their place, as a file with these axes holds them: (array [k, j, i], affine of (i, j, k))."""
    affine = oblique() if affine is None else affine
    change = np.zeros((4, 4))  # stored index -> index (x, y, z)
    change[3, 3] = 1
    sides = [0, 0, 0]
    for p, (a, flip) in enumerate(zip(axes, flips)):
        sides[a], change[p, a], change[p, 3] = size[p], -1 if flip else 1, size[p] - 1 if flip else 0
    array = np.zeros(sides[::-1], np.int16)
    for i, j, k in np.ndindex(*sides):
        x, y, z, _ = change @ [i, j, k, 1]
        array[k, j, i] = 100 * z + 10 * y + x
    return array, affine @ change


def decode(path):
    """A NIfTI file read by its definition alone -> [C, Z, Y, X], sform in LPS."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    assert struct.unpack("<i", data[:4]) == (348,) and data[344:348] == b"n+1\0"
    dim, (kind, bits) = struct.unpack("<8h", data[40:56]), struct.unpack("<2h", data[70:74])
    offset, slope, inter = struct.unpack("<3f", data[108:120])
    assert (kind, bits, offset, slope, inter) == (16, 32, 352, 1, 0)
    assert struct.unpack("<h", data[254:256]) == (1,)
    values = np.frombuffer(data, "<f4", offset=352).reshape(dim[5] if dim[0] == 5 else 1, *dim[3:0:-1])
    mirror, *step = np.frombuffer(data, "<f4", 4, 76).tolist()
    b, c, d, *place = np.frombuffer(data, "<f4", 6, 256).astype(float)
    a = np.sqrt(max(0, 1 - b * b - c * c - d * d))  # the quaternion says the same as the rows of sform
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]) * (1, 1, mirror) * step  # fmt: skip
    said = np.frombuffer(data, "<f4", 12, 280).reshape(3, 4)
    assert np.abs(turn - said[:, :3]).max() < 1e-3 and np.array_equal(np.float32(place), said[:, 3])
    rows = np.vstack([np.frombuffer(data, "<f4", 12, 280).reshape(3, 4), [0, 0, 0, 1]])
    return values, np.diag([-1, -1, 1, 1]) @ rows


@pytest.mark.parametrize("axes, flips", all_turns())
def test_any_orientation_is_turned_to_lps_and_back(axes, flips):
    array, affine = stored_as(axes, flips)
    volume = space.turned(array, affine)
    assert (volume.axes, tuple(map(bool, volume.flips))) == (axes, tuple(map(bool, flips)))
    z, y, x = np.indices(volume.hu.shape)
    assert np.array_equal(volume.hu, 100 * z + 10 * y + x) and np.allclose(volume.affine, oblique())
    back, again = space.as_stored(volume, np.stack([volume.hu, -volume.hu]))
    assert np.array_equal(back[0], array) and np.array_equal(back[1], -array) and np.allclose(again, affine)


@pytest.mark.parametrize("every", [2, 3])
def test_means_of_pixels_lie_where_the_pixels_were(every):
    """A volume that holds its own millimetres: whatever grid is written, the value is the place."""
    shape = (4, 6 * every + 1, 5 * every)
    for axes, flips in all_turns()[::7]:
        affine = oblique()
        index = np.indices(shape)[::-1].reshape(3, -1)
        place = (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)
        volume = space.Volume(np.zeros(shape, np.int16), affine, axes, flips)
        h, w = shape[1] // every, shape[2] // every
        means = place[:, :, : h * every, : w * every].reshape(3, 4, h, every, w, every).mean((3, 5))
        stored, found = space.as_stored(volume, means, every)
        index = np.indices(stored.shape[1:])[::-1].reshape(3, -1)
        assert np.allclose((found[:3, :3] @ index + found[:3, 3:]).reshape(stored.shape), stored)


@pytest.mark.parametrize("channels, name", [(1, "y.nii.gz"), (3, "y.nii")])
def test_a_file_holds_values_and_affine(tmp_path, channels, name):
    values = np.random.default_rng(0).normal(size=(channels, 3, 4, 5)).astype(np.float32)
    for axes, flips in all_turns():
        _, place = stored_as(axes, flips)
        found, affine = decode(space.write_nifti(tmp_path / name, values, place))
        assert np.array_equal(found, values) and np.abs(affine - place).max() < 1e-4


@pytest.mark.parametrize("axes, flips", all_turns()[::5])
def test_simpleitk_finds_each_point_where_the_ct_has_it(tmp_path, axes, flips):
    itk = pytest.importorskip("SimpleITK", reason="pip install SimpleITK")
    array, affine = stored_as(axes, flips, size=(7, 6, 5))
    image = itk.GetImageFromArray(array)
    step = space.spacing(affine)
    image.SetSpacing(step.tolist())
    image.SetDirection((affine[:3, :3] / step).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    itk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    ct = itk.ReadImage(str(tmp_path / "ct.nii.gz"))
    volume = space.turned(itk.GetArrayFromImage(ct), affine)
    stored, found = space.as_stored(volume, np.stack([volume.hu] * 2).astype(np.float32))
    written = itk.ReadImage(str(space.write_nifti(tmp_path / "y.nii.gz", stored, found)))
    assert written.GetSize() == ct.GetSize() and written.GetNumberOfComponentsPerPixel() == 2
    for index in np.ndindex(*ct.GetSize()):
        apart = np.subtract(written.TransformIndexToPhysicalPoint(index), ct.TransformIndexToPhysicalPoint(index))
        assert np.abs(apart).max() < 1e-3  # mm
        assert written[index] == (ct[index],) * 2


# ----- slices, tiles, patches


def flat(shape=(6, 90, 70), step=(0.5, 0.7, 2.0)):
    return space.Volume(np.full(shape, -100, np.int16), np.diag([*step, 1.0]), (0, 1, 2), (False,) * 3)


def ramp(shape=(3, 96, 128)):
    z, y, x = np.indices(shape)
    return flat()._replace(hu=(4 * y - 2 * x + 50 * z).astype(np.int16), affine=np.diag([0.5, 0.5, 2.0, 1.0]))


class Means(torch.nn.Module):
    """A stand-in whose features of a patch are its mean colours: what is seen where is known exactly."""

    patch_size = 4

    def __init__(self):
        super().__init__()
        self.cls_token = torch.zeros(1)

    def look(self, images):
        return torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)


VIEW = {"size": 4, "window": [0, 2000]}


def means_of(volume, z, grid, tile):
    net = Means()
    return dense.slice_features(net, VIEW, volume, z, grid, tile, look=net.look)


def test_patches_have_the_size_in_mm_that_was_asked_for():
    grid = dense.grid_of(flat(), 8.0)  # 63 mm high, 35 mm wide
    assert grid == (8, 5, 90, 70)
    assert dense.grid_of(flat(), 1000.0)[:2] == (1, 1)
    assert dense.grid_of(flat((6, 80, 80), (0.8, 0.8, 1.0)), 8.0)[:2] == (8, 8)  # what fits is not cut


@pytest.mark.parametrize("n, side", [(1, 1), (28, 28), (29, 28), (45, 28), (64, 28), (7, 2), (100, 9)])
def test_tiles_cover_all_patches_and_overlap(n, side):
    first = dense.starts(n, side)
    assert first[0] == 0 and first[-1] == n - side
    assert all(0 < b - a <= max(1, int(side * (1 - dense.OVERLAP))) for a, b in zip(first, first[1:]))


@pytest.mark.parametrize("tile", [2, 5, 7, 100])
def test_tiles_leave_no_seam(tile):
    """Of a ramp each patch has the ramp's value at its centre, whatever tiles it was seen in."""
    volume = ramp()
    grid = dense.grid_of(volume, 4.0)
    found = means_of(volume, 1, grid, tile)[..., 1]
    y, x = ((np.arange(n) + 0.5) * 8 - 0.5 for n in (grid.rows, grid.cols))
    hu = 4 * y[:, None] - 2 * x + 50
    shown = (hu / 2000 + 0.5 - 0.456) / 0.224  # window, then ImageNet's green
    inner = slice(1, -1)  # a resize cuts its kernel at the border of a view
    assert np.abs(found.numpy() - shown)[inner, inner].max() < 0.02


def test_patches_become_pixels_at_their_centres():
    """Patches that hold the pixel at their own centre: bilinear between them, each pixel has its own place."""
    grid = dense.Grid(6, 8, 60, 96)
    y, x = (np.arange(6) + 0.5) * 10 - 0.5, (np.arange(8) + 0.5) * 12 - 0.5
    maps = torch.tensor(np.stack(np.meshgrid(y, x, indexing="ij"), -1))
    rows, cols = dense.on_pixels(maps, grid, 1)
    assert torch.allclose(rows[5:-5], torch.arange(5.0, 55.0).double()[:, None].expand(50, 96))
    assert torch.allclose(cols[:, 6:-6], torch.arange(6.0, 90.0).double().expand(60, 84))


def test_a_tile_that_sees_otherwise_is_blended_in():
    """Features that depend on the tile (as those of a network do) change from patch to patch by a part of it only."""
    volume, calls = ramp(), []

    def look(images):
        first = len(calls)
        calls.extend(range(len(images)))
        return torch.arange(first, first + len(images)).float().view(-1, 1, 1, 1).expand(-1, 8, 8, 1)

    net = Means()
    found = dense.slice_features(net, VIEW, volume, 1, dense.Grid(8, 32, 96, 128), 8, look=look)[..., 0]
    assert len(calls) == len(dense.starts(32, 8)) == 5 and found.min() == 0 and found.max() == 4
    assert (found[:, 1:] - found[:, :-1]).abs().max() < 0.55


def test_slices_between_are_blended_from_the_two_around_them():
    asked = []

    def of_slice(z):
        asked.append(z)
        return torch.full((1, 1, 1), float(z))

    out = list(dense.channels_of(8, of_slice, 3))
    assert asked == [0, 3, 6, 7] and [z for z, _ in out] == list(range(8))
    assert [value.item() for _, value in out] == pytest.approx(range(8))


def test_the_ends_of_a_volume_repeat_their_slice():
    volume = ramp()
    assert np.array_equal(dense.neighbours(volume, 0), volume.hu[[0, 0, 1]])
    assert np.array_equal(dense.neighbours(volume, 2), volume.hu[[1, 2, 2]])


@pytest.mark.parametrize("axes, flips", all_turns()[::6])
def test_a_spot_lies_at_its_millimetres(axes, flips):
    """A bright spot at a point in mm: the brightest voxel of what would be written lies within half a patch."""
    hu = np.full((5, 64, 80), -1000, np.int16)
    hu[3, 41:44, 22:25] = 1000
    volume = space.Volume(hu, oblique((0.5, 0.5, 2.0)), axes, flips)
    grid = dense.grid_of(volume, 2.0)
    maps = torch.stack([dense.on_pixels(means_of(volume, z, grid, 7)[..., 1:2], grid, 2) for z in range(5)], 1).numpy()
    stored, affine = space.as_stored(volume, maps, 2)
    k, j, i = np.unravel_index(stored[0].argmax(), stored[0].shape)
    place, truth = affine @ [i, j, k, 1], volume.affine @ [23, 42, 3, 1]
    assert np.linalg.norm(place - truth) < 1.0


def test_a_point_gives_the_feature_of_its_own_patch_and_outside_is_an_error():
    volume = ramp()
    grid = dense.grid_of(volume, 4.0)
    maps = torch.arange(grid.rows * grid.cols).float().view(grid.rows, grid.cols, 1)
    for row, col in ((0, 0), (5, 9), (11, 15)):
        point = volume.affine @ [8 * col + 3.5, 8 * row + 3.5, 1, 1]
        assert dense.at_point(maps, volume, grid, point[:3]).item() == pytest.approx(row * grid.cols + col)
    with pytest.raises(ValueError, match="--point 500 0 0 mm lies outside the volume, whose corners are 0 0 0 and 63"):
        dense.index_of(volume, (500, 0, 0))


def test_directions_have_deviation_one_and_most_comes_first():
    rows = np.random.default_rng(0).normal(size=(500, 6)) * (5, 3, 1, 0.1, 0.1, 0.1) + 7
    mean, axes, shares = sheet.principal(rows, count=4)
    along = (rows - mean) @ axes
    assert np.allclose(np.cov(along.T, bias=True), np.eye(4), atol=1e-6) and list(shares) == sorted(shares)[::-1]
    assert (np.abs(axes[:3, :3]).argmax(0) == [0, 1, 2]).all()


# ----- the program


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    assert make_phantom.main(["--out", str(root / "raw"), "--patients", "2", "--slices", "10", "--size", "64"]) == 0
    flags = ["--raw", str(root / "raw"), "--out", str(root / "processed"), "--dataset", "p", "--format", "hu16"]
    assert preprocess_dicom.main([*flags, "--workers", "1"]) in (0, 1)
    torch.manual_seed(0)
    vit = build_vit("vit_test", layerscale=1.0)
    teacher = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    state = {"step": 1, "args": {}, "arch": vit.arch, "encoding": "hu16-v1", "eval_view": eval_view("hu16-v1", 64)}
    checkpoint.save(root / "net.pth", {**state, "student": {}, "teacher": teacher})
    with open(root / "raw" / "truth.csv") as f:
        return root, list(csv.DictReader(f))


def series_folder(root, row):
    return next(p for p in (root / "raw").rglob(row["series"]) if p.is_dir())


def test_dicom_keeps_its_millimetres(phantom):
    """The phantom's truth names each nodule by index and by mm, from which the file's affine must agree."""
    root, truth = phantom
    for row in truth[:4]:
        volume = space.read(series_folder(root, row))
        index = [float(row[key]) for key in "xyz"]
        place = (volume.affine @ [*index, 1])[:3]
        assert np.abs(place - [float(row[f"{key}_mm"]) for key in "xyz"]).max() < 0.1


def test_a_processed_volume_is_the_same_with_x_and_y_from_zero(phantom):
    root, truth = phantom
    dicom_, npy = space.read(series_folder(root, truth[0])), space.read(root / f"processed/p/{truth[0]['series']}.npy")
    assert np.array_equal(dicom_.hu, npy.hu) and np.allclose(dicom_.affine[:, :3], npy.affine[:, :3], atol=1e-5)
    assert npy.affine[2, 3] == pytest.approx(dicom_.affine[2, 3]) and not npy.affine[:2, 3].any() and npy.note


def write(root, *flags):
    return features.main(["--ckpt", str(root / "net.pth"), "--device", "cpu", "--patch-mm", "20", *map(str, flags)])


def test_channels_open_over_the_volume_and_their_basis_serves_another(phantom, tmp_path):
    root, truth = phantom
    one, two = (f"{root}/processed/p/{name}.npy" for name in sorted({row["series"] for row in truth})[:2])
    assert write(root, "--volume", one, "--out", tmp_path / "new" / "a.nii.gz", "--stride", 3) == 0
    tmp_path = tmp_path / "new"
    values, affine = decode(tmp_path / "a.nii.gz")
    volume = space.read(one)
    assert values.shape == (3, *volume.hu.shape) and np.allclose(affine, volume.affine, atol=1e-4)
    assert 0.2 < values.std() < 3 and np.isfinite(values).all()
    assert write(root, "--volume", one, "--out", tmp_path / "b.nii", "--basis", tmp_path / "a.basis.npz",
                 "--stride", 3, "--every", 2) == 0  # fmt: skip
    again, _ = decode(tmp_path / "b.nii")
    means = values.reshape(3, 10, 32, 2, 32, 2).mean((3, 5))
    assert np.allclose(again, means, atol=1e-5)
    assert write(root, "--volume", two, "--out", tmp_path / "c.nii", "--basis", tmp_path / "a.basis.npz",
                 "--per-channel", "--stride", 9) == 0  # fmt: skip
    assert [decode(tmp_path / f"c_{c:04d}.nii")[0].shape[0] for c in range(3)] == [1, 1, 1]
    assert json.loads((tmp_path / "a.json").read_text())["kind"] == "pca"


def test_similarity_is_that_to_the_patch_at_the_point(phantom, tmp_path):
    root, truth = phantom
    path = f"{root}/processed/p/{truth[0]['series']}.npy"
    volume = space.read(path)
    grid = dense.grid_of(volume, 20)
    col, row, z = grid.cols // 2, grid.rows // 2, 4
    step = 64 / grid.cols
    point = (volume.affine @ [(col + 0.5) * step - 0.5, (row + 0.5) * step - 0.5, z, 1])[:3]
    assert write(root, "--volume", path, "--out", tmp_path / "s.nii", "--point", *point.tolist()) == 0
    values, _ = decode(tmp_path / "s.nii")
    vit, view = load_backbone(root / "net.pth", quiet=True), eval_view("hu16-v1", 64)
    maps = [torch.nn.functional.normalize(dense.slice_features(vit, view, volume, k, grid, 28), dim=-1) for k in (0, z)]
    alike = maps[1] @ maps[1][row, col]
    assert alike.argmax() == row * grid.cols + col and alike.max() == pytest.approx(1)
    expected = [dense.on_pixels((m @ maps[1][row, col])[..., None], grid, 1)[0] for m in maps]
    assert np.abs(values[0][[0, z]] - torch.stack(expected).numpy()).max() < 1e-4
    assert write(root, "--volume", path, "--out", tmp_path / "t.nii", "--attention", "--stride", 9) == 0
    assert 0.5 < decode(tmp_path / "t.nii")[0].mean() < 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "x.mha"], "--out x.mha: end it in .nii.gz or .nii"),
        (["--attention", "--point", "0", "0", "0"], "--point and --attention are two ways"),
        (["--volume", "nothing.npy"], "nothing.npy does not exist"),
        (["--basis", "nothing.npz"], "--basis nothing.npz does not exist"),
        (["--every", "65"], "--every 65: a slice has 64 x 64 pixels"),
    ],
)
def test_mistakes_are_sentences(phantom, tmp_path, monkeypatch, flags, words):
    root, truth = phantom
    monkeypatch.chdir(tmp_path)
    usual = ["--volume", f"{root}/processed/p/{truth[0]['series']}.npy", "--out", "x.nii"]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        write(root, *usual, *flags)


def test_a_ct_in_another_orientation_gives_features_on_its_own_grid(phantom, tmp_path):
    """The same phantom as NIfTI with axes (z, -y, x): the same values at the same millimetres, in the file's order."""
    itk = pytest.importorskip("SimpleITK", reason="pip install SimpleITK")
    root, truth = phantom
    volume = space.read(series_folder(root, truth[0]))
    turned = space.Volume(volume.hu, volume.affine, (2, 1, 0), (False, True, False))
    stored, affine = space.as_stored(turned, volume.hu[None])
    image, step = itk.GetImageFromArray(np.ascontiguousarray(stored[0])), space.spacing(affine)
    image.SetSpacing(step.tolist())
    image.SetDirection((affine[:3, :3] / step).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    itk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    for name, source in (("a", series_folder(root, truth[0])), ("b", tmp_path / "ct.nii.gz")):
        more = [] if name == "a" else ["--basis", tmp_path / "a.basis.npz"]
        assert write(root, "--volume", source, "--out", tmp_path / f"{name}.nii.gz", "--stride", "3", *more) == 0
    (one, _), (two, where) = decode(tmp_path / "a.nii.gz"), decode(tmp_path / "b.nii.gz")
    assert np.allclose(where, affine, atol=1e-3)
    assert np.abs(np.flip(one.transpose(0, 3, 2, 1), 2) - two).max() < 1e-4
    ct, found = itk.ReadImage(str(tmp_path / "ct.nii.gz")), itk.ReadImage(str(tmp_path / "b.nii.gz"))
    for index in ((0, 0, 0), (3, 60, 17), (9, 5, 63)):
        apart = np.subtract(ct.TransformIndexToPhysicalPoint(index), found.TransformIndexToPhysicalPoint(index))
        assert np.abs(apart).max() < 0.01


def test_without_simpleitk_other_formats_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    (tmp_path / "ct.nii.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="are read by SimpleITK, which is not installed: pip install SimpleITK"):
        space.read(tmp_path / "ct.nii.gz")
