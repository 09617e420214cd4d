"""Video: which frames and which squares a clip is made of."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader

from m2pt.data import create_dataset
from m2pt.data.video import read_frames

av = pytest.importorskip("av")

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PLAIN = {"rand_augment": "", "erasing": 0.0}


def write_video(path, pictures, lossless=False):
    """Encode uint8 pictures (H, W, 3) at 25 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def numbered(count, height=48, width=48):
    """Grey pictures that tell their number."""
    return [np.full((height, width, 3), 2 * number, np.uint8) for number in range(count)]


def grey(clip):
    """The number of each frame of a clip (3, T, H, W), from its mean colour."""
    pixels = clip * STD.view(3, 1, 1, 1) + MEAN.view(3, 1, 1, 1)
    return (pixels.mean(dim=(0, 2, 3)) * 255 / 2).round().int().tolist()


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory):
    """A camera's pan over a photograph, a video whose frames tell their number, and one shorter than a clip."""
    root = tmp_path_factory.mktemp("kinetics")
    photograph = load_sample_image("china.jpg")
    write_video(root / "a pan.mp4", [photograph[100:220, 4 * step : 4 * step + 160] for step in range(70)])
    write_video(root / "numbered.mkv", numbered(100), lossless=True)
    write_video(root / "short.mkv", numbered(10), lossless=True)
    (root / "train.csv").write_text("a pan.mp4 17\nnumbered.mkv 3\nshort.mkv 399\n")
    (root / "test.txt").write_text(f"a pan.mp4 17\nnumbered.mkv 3\n{root}/short.mkv 399\n")
    return root


def test_list(kinetics):
    for split in ("train", "test"):
        dataset = create_dataset("video", "list", kinetics, split, False)
        assert [file.name for file in dataset.files] == ["a pan.mp4", "numbered.mkv", "short.mkv"]
        assert (dataset.labels, dataset.num_classes, dataset.class_names) == ([17, 3, 399], 400, None)
        assert all(file.is_file() for file in dataset.files)


def test_training_has_two_views_of_one_clip(kinetics):
    dataset = create_dataset("video", "list", kinetics, "train", True)
    clips, labels = dataset[0]
    assert (clips.shape, clips.dtype) == ((2, 3, 16, 224, 224), torch.float32)
    assert (dataset.views, labels.tolist(), labels.dtype) == (2, [17, 17], torch.int64)
    assert not torch.equal(clips[0], clips[1])
    plain = create_dataset("video", "list", kinetics, "train", True, size=16, **PLAIN)
    first, second = plain[1][0]
    assert grey(first) == grey(second)


def test_training_clips_have_the_stride_and_any_start(kinetics):
    dataset = create_dataset("video", "list", kinetics, "train", True, size=16, repeats=1, **PLAIN)
    starts = set()
    for _ in range(25):
        numbers = grey(dataset[1][0])
        assert numbers == list(range(numbers[0], numbers[0] + 61, 4))
        starts.add(numbers[0])
    assert min(starts) < 10 and 30 < max(starts) <= 39


def test_a_short_video_stands_still_at_its_end(kinetics):
    training = create_dataset("video", "list", kinetics, "train", True, size=16, **PLAIN)
    evaluation = create_dataset("video", "list", kinetics, "train", False, size=16, clips=1, crops=1)
    assert grey(training[2][0][0]) == [0, 4, 8] + 13 * [9]
    assert grey(evaluation[2][0]) == [0, 4] + 14 * [8]


def test_every_frame_of_a_clip_is_augmented_alike(tmp_path):
    photograph = load_sample_image("flower.jpg")[:120, :160]
    write_video(tmp_path / "still.mkv", 16 * [photograph], lossless=True)
    (tmp_path / "train.csv").write_text("still.mkv 0\n")
    dataset = create_dataset("video", "list", tmp_path, "train", True, size=32, stride=1)
    for _ in range(5):
        for clip in dataset[0][0]:
            assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_training_transform_is_videomaes(kinetics):
    dataset = create_dataset("video", "list", kinetics, "train", True)
    steps = {type(step).__name__: step for step in dataset.transform.transform.transforms}
    augment = steps["RandAugment"]
    assert {(op.magnitude, op.magnitude_std) for op in augment.ops} == {(7, 0.5)} and augment.num_layers == 4
    assert steps["RandomErasing"].probability == 0.25
    assert steps["RandomHorizontalFlip"].p == 0.5


def test_evaluation_clips_are_spread_over_the_video(kinetics):
    dataset = create_dataset("video", "list", kinetics, "test", False, size=16, crops=1)
    views, label = dataset[1]
    assert (views.shape, dataset.views, label) == ((5, 3, 16, 16, 16), 5, 3)
    sampled = list(range(0, 100, 4))  # 25 frames: room for clips to start at 0 to 9
    assert [grey(view) for view in views] == [sampled[start : start + 16] for start in (0, 2, 4, 6, 9)]


def test_evaluation_has_three_squares_of_every_clip(kinetics):
    dataset = create_dataset("video", "list", kinetics, "test", False, size=60)
    views, _ = dataset[0]
    assert views.shape == (15, 3, 16, 60, 60)
    (wide,) = read_frames(dataset.files[0])[:1]
    small = torch.nn.functional.interpolate(
        torch.from_numpy(wide.to_ndarray(format="rgb24", threads=1)).permute(2, 0, 1)[None] / 255,
        size=(60, 80),
        mode="bilinear",
        antialias=True,
    )[0]
    for view, left in zip(views, (0, 10, 20), strict=False):
        expected = (small[:, :, left : left + 60] - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        torch.testing.assert_close(view[:, 0], expected, atol=0.02, rtol=0)  # resized in whole grey levels


def test_a_tall_video_is_cut_along_its_height(tmp_path):
    rows = np.repeat(np.arange(96, dtype=np.uint8)[:, None, None], 48, axis=1).repeat(3, axis=2)
    write_video(tmp_path / "tall.mkv", 16 * [rows], lossless=True)
    (tmp_path / "test.csv").write_text("tall.mkv 0\n")
    dataset = create_dataset("video", "list", tmp_path, "test", False, size=48, stride=1, clips=1)
    assert [2 * grey(view)[0] for view in dataset[0][0]] == [24, 48, 72]


def test_recipe_has_fifteen_views(kinetics):
    assert create_dataset("video", "list", kinetics, "test", False)[2][0].shape == (15, 3, 16, 224, 224)


def test_one_view_has_no_axis_of_views(kinetics):
    training = create_dataset("video", "list", kinetics, "train", True, size=16, frames=4, repeats=1)
    evaluation = create_dataset("video", "list", kinetics, "train", False, size=16, frames=4, clips=1, crops=1)
    for dataset in (training, evaluation):
        clip, label = dataset[1]
        assert (clip.shape, label, dataset.views) == ((3, 4, 16, 16), 3, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_choices_follow_from_the_generator(kinetics, workers):
    dataset = create_dataset("video", "list", kinetics, "train", True, size=16, frames=4)

    def epoch():
        torch.manual_seed(5)
        return torch.cat([clips for clips, _ in DataLoader(dataset, batch_size=1, num_workers=workers)])

    np.random.seed(1)
    first = epoch()
    np.random.seed(2)
    assert torch.equal(epoch(), first)


@pytest.mark.parametrize("training", [True, False])
def test_a_worker_converts_frames_after_its_parent_did(kinetics, training):
    """PyAV 19 by default converts with threads, which a fork leaves behind, and the worker would wait for ever."""
    dataset = create_dataset("video", "list", kinetics, "train", training, size=16, frames=4)
    clips, _ = dataset[0]
    loader = DataLoader(dataset, batch_size=None, num_workers=1, timeout=60, multiprocessing_context="fork")
    assert next(iter(loader))[0].shape == clips.shape


def test_damaged_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF\x28\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\4\0\0\0\0\0\0\0")
    for path in (tmp_path / "text.mp4", tmp_path / "gone.mp4", sound):
        with pytest.raises(ValueError, match=rf"{path.name}: cannot be read as video"):
            read_frames(path)


def test_video_whose_description_is_no_text_is_named_or_read(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(2))
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"Lavf", b"Lav\xed"))
    try:
        assert len(read_frames(tmp_path / "a.mp4")) == 2  # PyAV 19
    except ValueError as error:
        assert "a.mp4: cannot be read as video" in str(error)


@pytest.mark.parametrize("line", ["only_a_path.mp4", "a.mp4 400", "a.mp4 -1", "a.mp4 cat", ""])
def test_damaged_list_is_named(tmp_path, line):
    (tmp_path / "train.csv").write_text(f"a.mp4 0\n{line}\nb.mp4 1\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 2: expected a path and a label below 400"):
        create_dataset("video", "list", tmp_path, "train", True)


def test_unknown_split_is_refused(kinetics):
    with pytest.raises(ValueError, match="split: expected one of test, train; got 'val'"):
        create_dataset("video", "list", kinetics, "val", True)


@pytest.mark.parametrize("setting", ["size", "frames", "stride", "repeats", "clips", "crops", "num_classes"])
def test_impossible_settings_are_refused(kinetics, setting):
    with pytest.raises(ValueError, match=f"{setting}: expected a positive integer, got 0"):
        create_dataset("video", "list", kinetics, "train", True, **{setting: 0})
