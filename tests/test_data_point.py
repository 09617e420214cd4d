"""Point clouds, in files of the public data sets' exact formats."""

import json

import numpy as np
import pytest
import torch

from m2pt.data import create_dataset
from m2pt.data.point import PartDataset, scale_and_shift, unit_sphere

h5py = pytest.importorskip("h5py")

RNG = np.random.default_rng(0)


def surface(points, scale):
    """Points (N, 3) on an ellipsoid away from the origin."""
    directions = RNG.normal(size=(points, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) * scale + (3, -1, 2)


@pytest.fixture(scope="module")
def modelnet(tmp_path_factory):
    """Six classes (one with an underscore) of 21 training and 20 test shapes with 100 points each."""
    root = tmp_path_factory.mktemp("modelnet40_normal_resampled")
    classes = ["airplane", "bed", "chair", "glass_box", "lamp", "vase"]
    (root / "modelnet40_shape_names.txt").write_text("\n".join(classes) + "\n")
    shapes = {"train": [], "test": []}
    for label, name in enumerate(classes):
        (root / name).mkdir()
        for number in range(1, 42):
            shape = f"{name}_{number:04d}"
            shapes["train" if number <= 21 else "test"].append(shape)
            values = np.concatenate([surface(100, (1 + label, 1, 1)), RNG.normal(size=(100, 3))], axis=1)
            np.savetxt(root / name / f"{shape}.txt", values, fmt="%.6f", delimiter=",")
    for split, names in shapes.items():
        (root / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")
    return root


def write_h5(path, clouds, labels):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = clouds, labels


@pytest.fixture(scope="module")
def shapenet(tmp_path_factory):
    """A Bag and two Caps; each point's part is the sign of its centred x coordinate."""
    root = tmp_path_factory.mktemp("shapenetcore_partanno_segmentation_benchmark_v0_normal")
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\nBag\t02773838\nCap\t02954340\n")
    (root / "train_test_split").mkdir()
    lists = {"train": ["02954340/c1"], "val": ["02773838/b1"], "test": ["02954340/c2"]}
    for split, shapes in lists.items():
        entries = json.dumps([f"shape_data/{shape}" for shape in shapes])
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(entries)
        for shape in shapes:
            points = surface(300, (2, 1, 1))
            part = (points[:, 0] > points[:, 0].mean()) + (4 if shape.startswith("02773838") else 6)
            (root / shape).parent.mkdir(exist_ok=True)
            values = np.concatenate([points, RNG.normal(size=(300, 3)), part[:, None]], axis=1)
            np.savetxt(root / f"{shape}.txt", values, fmt="%.6f")
    return root


def farthest_points(cloud, count):
    chosen = [0]
    for _ in range(count - 1):
        distances = np.linalg.norm(cloud[:, None] - cloud[chosen], axis=2).min(axis=1)
        chosen.append(int(distances.argmax()))
    return cloud[chosen]


def test_unit_sphere():
    points = unit_sphere(torch.from_numpy(surface(50, (4, 1, 2))))
    torch.testing.assert_close(points.mean(0), torch.zeros(3, dtype=torch.float64))
    assert float(points.norm(dim=1).max()) == pytest.approx(1)


def test_scale_and_shift_stay_in_their_ranges_and_fill_them():
    corners = torch.stack([torch.zeros(3), torch.ones(3)])
    moved = torch.stack([scale_and_shift(corners) for _ in range(300)])
    shift, scale = moved[:, 0], moved[:, 1] - moved[:, 0]
    assert -0.2 <= shift.min() < -0.19 and 0.19 < shift.max() <= 0.2
    assert 2 / 3 - 1e-6 <= scale.min() < 0.68 and 1.48 < scale.max() <= 1.5 + 1e-6
    assert (scale[:, 0] != scale[:, 1]).all()


def test_modelnet40_evaluation_takes_the_farthest_points(modelnet):
    dataset = create_dataset("point", "modelnet40", modelnet, "test", False, points=32)
    assert len(dataset) == 120 and dataset.class_names[3] == "glass_box" and dataset.num_classes == 6
    points, label = dataset[65]
    assert (label, points.shape, points.dtype) == (3, (32, 3), torch.float32)
    cloud = np.loadtxt(modelnet / "glass_box" / "glass_box_0027.txt", delimiter=",")[:, :3]
    cloud -= cloud.mean(axis=0)
    cloud /= np.linalg.norm(cloud, axis=1).max()
    torch.testing.assert_close(points.double(), torch.from_numpy(farthest_points(cloud, 32)), atol=1e-6, rtol=0)


def test_modelnet40_training_draws_from_the_farthest(modelnet):
    dataset = create_dataset("point", "modelnet40", modelnet, "train", True, points=64)
    candidates = create_dataset("point", "modelnet40", modelnet, "train", False, points=75)[0][0]
    first, second = dataset[0][0], dataset[0][0]
    assert first.shape == (64, 3) and not torch.equal(first, second)
    drawn = set()
    for seed in range(5):
        torch.manual_seed(seed)
        points = dataset[0][0]
        torch.manual_seed(seed)
        chosen = torch.randperm(75)[:64]
        torch.testing.assert_close(points, scale_and_shift(candidates[chosen]))
        drawn |= set(chosen.tolist())
    assert drawn == set(range(75))


def test_a_sample_is_not_changed_by_its_user(modelnet):
    dataset = create_dataset("point", "modelnet40", modelnet, "test", False, points=8)
    expected = dataset[0][0].clone()
    dataset[0][0].zero_()
    assert torch.equal(dataset[0][0], expected)


def test_votes_are_views(modelnet):
    dataset = create_dataset("point", "modelnet40", modelnet, "test", False, points=64, votes=10)
    points, label = dataset[0]
    assert (dataset.views, points.shape, label) == (10, (10, 64, 3), 0)
    assert len({float(view.sum()) for view in points}) == 10
    assert create_dataset("point", "modelnet40", modelnet, "train", True, points=64, votes=10).views == 1


@pytest.mark.parametrize(("way", "shot"), [(5, 10), (5, 20), (6, 10)])
def test_few_shot_folds(modelnet, way, shot):
    def fold(split, number):
        settings = {"way": way, "shot": shot, "fold": number, "points": 8}
        return create_dataset("point", "modelnet40_few_shot", modelnet, split, False, **settings)

    folds = set()
    for number in range(10):
        train, test = fold("train", number), fold("test", number)
        assert train.class_names == test.class_names and train.num_classes == way
        assert len(set(train.class_names)) == way
        for dataset, count in ((train, shot), (test, 20)):
            assert dataset.labels == [label for label in range(way) for _ in range(count)]
            assert len(set(dataset.clouds.files)) == way * count
            folders = [file.parent.name for file in dataset.clouds.files]
            assert folders == [dataset.class_names[label] for label in dataset.labels]
        assert fold("train", number).clouds.files == train.clouds.files
        folds.add(tuple(train.clouds.files))
    assert len(folds) == 10


def test_few_shot_needs_enough_shapes(modelnet):
    for settings, message in (
        ({"way": 7}, "way: expected at most 6 classes, got 7"),
        ({"shot": 22}, "train: expected at least 22 shapes of .*, got 21"),
        ({"fold": 10}, "fold: expected an integer from 0 to 9, got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            create_dataset("point", "modelnet40_few_shot", modelnet, "train", False, **settings)


def test_modelnet40_h5_joins_its_files(tmp_path):
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    clouds = np.stack([surface(40, (1, 1, 1)) for _ in range(3)]).astype(np.float32)
    write_h5(tmp_path / "ply_data_test0.h5", clouds[:2], np.array([[1], [0]], np.uint8))
    write_h5(tmp_path / "ply_data_test1.h5", clouds[2:], np.array([[1]], np.uint8))
    dataset = create_dataset("point", "modelnet40_h5", tmp_path, "test", False, points=40)
    assert [dataset[index][1] for index in range(3)] == [1, 0, 1]
    expected = unit_sphere(torch.from_numpy(clouds[2]))
    assert {tuple(point) for point in dataset[2][0].tolist()} == {tuple(point) for point in expected.tolist()}
    with pytest.raises(FileNotFoundError, match=r"no file ply_data_train\*\.h5"):
        create_dataset("point", "modelnet40_h5", tmp_path, "train", False)


@pytest.mark.parametrize(
    ("variant", "file"),
    [
        ("objectbg", "main_split/test_objectdataset.h5"),
        ("objectonly", "main_split_nobg/test_objectdataset.h5"),
        ("hardest", "main_split/test_objectdataset_augmentedrot_scale75.h5"),
    ],
)
def test_scanobjectnn_variants(tmp_path, variant, file):
    write_h5(tmp_path / file, surface(2048, (1, 2, 1))[None].astype(np.float32), np.array([14]))
    dataset = create_dataset("point", "scanobjectnn", tmp_path, "test", True, variant=variant)
    points, label = dataset[0]
    assert (points.shape, dataset.class_names[label], dataset.num_classes) == ((2048, 3), "toilet", 15)
    assert not torch.equal(points, dataset[0][0])


def test_scanobjectnn_trains_on_its_training_file(tmp_path):
    path = tmp_path / "main_split" / "training_objectdataset_augmentedrot_scale75.h5"
    write_h5(path, np.ones((1, 8, 3), np.float32) * np.arange(8)[None, :, None], np.array([0]))
    assert len(create_dataset("point", "scanobjectnn", tmp_path, "train", True, points=8)) == 1
    with pytest.raises(FileNotFoundError, match="test_objectdataset_augmentedrot_scale75"):
        create_dataset("point", "scanobjectnn", tmp_path, "test", True)


def test_parts_are_those_of_shapenetpart():
    assert PartDataset.category_names[0] == "Airplane" and len(PartDataset.category_names) == 16
    assert [label for parts in PartDataset.parts.values() for label in parts] == list(range(50))
    published = {"Car": range(8, 12), "Earphone": range(16, 19), "Motorbike": range(30, 36), "Table": range(47, 50)}
    assert {name: PartDataset.parts[name] for name in published} == published


@pytest.mark.parametrize("training", [True, False])
def test_shapenetpart_labels_follow_their_points(shapenet, training):
    dataset = create_dataset("point", "shapenetpart", shapenet, "trainval", training, points=512)
    assert (dataset.num_classes, len(dataset)) == (50, 2)
    assert (dataset.class_names[4], dataset.class_names[7]) == ("Bag 0", "Cap 1")
    for index, (category, first_part) in enumerate([(1, 4), (2, 6)]):
        (points, found), labels = dataset[index]
        assert (found, points.shape, labels.shape, labels.dtype) == (category, (512, 3), (512,), torch.int64)
        right = points[labels == first_part + 1, 0].min()
        assert right > points[labels == first_part, 0].max() and set(labels.tolist()) == {first_part, first_part + 1}


def test_shapenetpart_evaluation_is_in_the_files_order(shapenet):
    dataset = create_dataset("point", "shapenetpart", shapenet, "test", False, points=600)
    values = torch.from_numpy(np.loadtxt(shapenet / "02954340" / "c2.txt"))
    (points, _), labels = dataset[0]
    torch.testing.assert_close(points[::2].double(), unit_sphere(values[:, :3]), atol=1e-5, rtol=0)
    assert torch.equal(points[::2], points[1::2])
    assert torch.equal(labels[::2], values[:, 6].long())


def test_shapenetpart_splits(shapenet):
    names = {
        split: [file.stem for file in create_dataset("point", "shapenetpart", shapenet, split, False).clouds.files]
        for split in ("train", "val", "trainval", "test")
    }
    assert names == {"train": ["c1"], "val": ["b1"], "trainval": ["b1", "c1"], "test": ["c2"]}


def test_damaged_files_are_named(modelnet, shapenet, tmp_path):
    few = create_dataset("point", "modelnet40", modelnet, "test", False, points=101)
    with pytest.raises(ValueError, match=r"airplane_0022\.txt: expected at least 101 points, got 100"):
        few[0]
    write_h5(tmp_path / "ply_data_test0.h5", np.zeros((2, 8, 4)), np.zeros(2))
    with pytest.raises(ValueError, match=r"ply_data_test0\.h5: expected data \(clouds, N, 3\)"):
        create_dataset("point", "modelnet40_h5", tmp_path, "test", False)
    (tmp_path / "ply_data_test0.h5").write_bytes(b"no h5")
    with pytest.raises(ValueError, match=r"ply_data_test0\.h5: cannot be read as point clouds"):
        create_dataset("point", "modelnet40_h5", tmp_path, "test", False)
    dataset = create_dataset("point", "shapenetpart", shapenet, "test", False)
    for text, message in (
        ("1 2 x 4 5 6 7\n", "cannot be read as points"),
        ("1 2 3 4 5 6\n", "expected 7 finite columns"),
        ("1 2 3 4 5 nan 7\n", "expected 7 finite columns"),
        ("1 2 3 4 5 6 9\n0 0 0 0 0 0 9\n", "expected part labels 6 to 7 of a Cap, got 9 to 9"),
        ("1 2 3 4 5 6 6\n0 0 0 0 0 0 6.5\n", "expected part labels 6 to 7 of a Cap, got 6 to 6.5"),
    ):
        dataset.clouds.files = [tmp_path / "damaged.txt"]
        (tmp_path / "damaged.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"damaged\.txt: {message}"):
            dataset[0]


def test_labels_must_have_a_name(tmp_path):
    (tmp_path / "shape_names.txt").write_text("airplane\n")
    write_h5(tmp_path / "ply_data_test0.h5", np.zeros((2, 8, 3)), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"ply_data_test0\.h5, cloud 1: expected a label from 0 to 0, got 1"):
        create_dataset("point", "modelnet40_h5", tmp_path, "test", False)


DEGENERATE = {
    "zeros": lambda cloud: 0 * cloud,
    "one point, repeated, whose mean is rounded": lambda cloud: 0 * cloud + (0.1, -0.7, 1.3),
    "NaN": lambda cloud: np.where(np.arange(len(cloud))[:, None] == 5, np.nan, cloud),
    "infinity": lambda cloud: np.where(np.arange(len(cloud))[:, None] == 5, np.inf, cloud),
    "too far away for a square in float32": lambda cloud: 1e25 * cloud,
    "too far away for a sum in float32": lambda cloud: 1e37 * cloud,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("damage", DEGENERATE)
def test_a_degenerate_cloud_is_a_damaged_sample_in_every_layout(tmp_path, damage, training):
    cloud = DEGENERATE[damage](surface(400, (1, 2, 3))).astype(np.float32)
    (tmp_path / "shape_names.txt").write_text("airplane\n")
    write_h5(tmp_path / "ply_data_test0.h5", cloud[None], np.array([0]))
    write_h5(tmp_path / "main_split" / "test_objectdataset.h5", cloud[None], np.array([0]))
    (tmp_path / "modelnet40_shape_names.txt").write_text("airplane\n")
    (tmp_path / "modelnet40_test.txt").write_text("airplane_1\n")
    (tmp_path / "airplane").mkdir()
    np.savetxt(tmp_path / "airplane" / "airplane_1.txt", np.concatenate([cloud, cloud], 1), delimiter=",")
    (tmp_path / "synsetoffset2category.txt").write_text("Airplane\tairplane\n")
    (tmp_path / "train_test_split").mkdir()
    (tmp_path / "train_test_split" / "shuffled_test_file_list.json").write_text('["shape_data/airplane/part"]')
    parts = np.concatenate([cloud, cloud, np.zeros((400, 1))], 1)
    np.savetxt(tmp_path / "airplane" / "part.txt", parts)
    settings = {"points": 64}
    for layout, name, more in (
        ("modelnet40_h5", "ply_data_test0.h5, cloud 0", {}),
        ("scanobjectnn", "test_objectdataset.h5, cloud 0", {"variant": "objectbg"}),
        ("modelnet40", "airplane_1.txt", {}),
        ("shapenetpart", "part.txt", {}),
    ):
        dataset = create_dataset("point", layout, tmp_path, "test", training, **settings, **more)
        with pytest.raises(ValueError, match=f"{name}: (expected .*finite|expected points that differ)"):
            dataset[0]


def test_a_cloud_far_from_the_origin_is_read(tmp_path):
    (tmp_path / "shape_names.txt").write_text("airplane\n")
    write_h5(tmp_path / "ply_data_test0.h5", surface(100, (1, 2, 3))[None] * 1e-20 + 0, np.array([0]))
    cloud, _ = create_dataset("point", "modelnet40_h5", tmp_path, "test", False, points=64)[0]
    assert cloud.isfinite().all()


@pytest.mark.parametrize("label", [-1, 1, 255])
@pytest.mark.parametrize("layout", ["modelnet40_h5", "scanobjectnn"])
def test_a_label_out_of_range_is_refused_by_the_name_of_its_sample(tmp_path, layout, label):
    label = 15 + label if layout == "scanobjectnn" and label >= 0 else label
    (tmp_path / "shape_names.txt").write_text("airplane\n")
    for file in ("ply_data_test0.h5", "main_split/test_objectdataset.h5"):
        write_h5(tmp_path / file, np.zeros((3, 8, 3)), np.array([0, label, label]))
    settings = {"variant": "objectbg"} if layout == "scanobjectnn" else {}
    largest = 14 if layout == "scanobjectnn" else 0
    with pytest.raises(ValueError, match=rf"\.h5, cloud 1: expected a label from 0 to {largest}, got {label}$"):
        create_dataset("point", layout, tmp_path, "test", False, **settings)


@pytest.mark.parametrize("labels", [["a", "b"], [[0, 1], [1, 0]], [0.0, 0.5], [0.0, np.nan], [0.0, np.inf], [0j, 0j]])
def test_labels_that_are_no_numbers_are_refused_by_the_name_of_the_file(tmp_path, labels):
    (tmp_path / "shape_names.txt").write_text("airplane\n")
    with h5py.File(tmp_path / "ply_data_test0.h5", "w") as file:
        file["data"], file["label"] = np.zeros((2, 8, 3)), labels
    with pytest.raises(ValueError, match=r"ply_data_test0\.h5: "):
        create_dataset("point", "modelnet40_h5", tmp_path, "test", False)


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("modelnet40", {"points": 0}, "points: expected a positive integer, got 0"),
        ("modelnet40", {"votes": 0}, "votes: expected a positive integer, got 0"),
        ("scanobjectnn", {"variant": "easy"}, "variant: expected one of hardest, objectbg, objectonly; got 'easy'"),
    ],
)
def test_impossible_settings_are_refused(modelnet, layout, settings, message):
    with pytest.raises(ValueError, match=message):
        create_dataset("point", layout, modelnet, "train", False, **settings)


@pytest.mark.parametrize(
    "layout", ["modelnet40", "modelnet40_h5", "modelnet40_few_shot", "scanobjectnn", "shapenetpart"]
)
def test_unknown_splits_are_refused(modelnet, layout):
    with pytest.raises(ValueError, match=r"split: expected one of .*; got 'dev'"):
        create_dataset("point", layout, modelnet, "dev", False)
