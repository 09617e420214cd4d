"""Video: which frames and which squares a clip is made of, and how a frame is read."""

import io
import multiprocessing
import os
import random
import resource
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from m2pt.data import create_dataset
from m2pt.data.frames import read_frames

av = pytest.importorskip("av")

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PLAIN = {"rand_augment": "", "erasing": 0.0}
LOSSLESS = {"codec": "ffv1", "pix_fmt": "bgr0"}
REORDERED = {"g": "12", "bf": "2"}
"""A keyframe every 12 frames, and two of three frames in between are stored after the one that follows them."""


def x264(settings="open-gop=0"):
    return {"codec": "libx264", "bf": "2", "x264-params": f"keyint=12:b-adapt=0:scenecut=0:log-level=none:{settings}"}


def need_encoder(name):
    if name not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {name}")


def write_video(path, pictures, codec="mpeg4", pix_fmt="yuv420p", times=None, **options):
    """Encode uint8 pictures (H, W, 3) at 25 frames a second, or to be shown at `times` in 25ths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for time, picture in zip(times or range(len(pictures)), pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
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
    write_video(root / "numbered.mkv", numbered(100), **LOSSLESS)
    write_video(root / "short.mkv", numbered(10), **LOSSLESS)
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
    write_video(tmp_path / "still.mkv", 16 * [photograph], **LOSSLESS)
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
    (wide,) = read_frames(dataset.files[0], lambda count: [0])
    small = torch.nn.functional.interpolate(wide[None] / 255, size=(60, 80), mode="bilinear", antialias=True)[0]
    for view, left in zip(views, (0, 10, 20), strict=False):
        expected = (small[:, :, left : left + 60] - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        torch.testing.assert_close(view[:, 0], expected, atol=0.02, rtol=0)  # resized in whole grey levels


def test_a_tall_video_is_cut_along_its_height(tmp_path):
    rows = np.repeat(np.arange(96, dtype=np.uint8)[:, None, None], 48, axis=1).repeat(3, axis=2)
    write_video(tmp_path / "tall.mkv", 16 * [rows], **LOSSLESS)
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


def panned(count=60, height=48, width=64):
    """A camera's pan over a photograph."""
    photograph = load_sample_image("china.jpg")
    return [photograph[100 + step : 100 + step + height, 4 * step : 4 * step + width] for step in range(count)]


def all_frames(path):
    """What a player decodes from the start to the end."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
    return [torch.from_numpy(frame).movedim(2, 0) for frame in frames]


def assert_read_as_decoded(path):
    whole = all_frames(path)
    draw = random.Random(0)
    starts = [draw.randrange(len(whole)) for _ in range(12)]
    choices = [range(start, len(whole), stride)[:16] for start, stride in zip(starts, 4 * [1, 4, 13], strict=True)]
    for numbers in (*choices, [len(whole) - 1], draw.choices(range(len(whole)), k=8)):
        counts = []
        frames = read_frames(path, lambda count, numbers=numbers, counts=counts: counts.append(count) or numbers)
        assert counts == [len(whole)]
        assert len(frames) == len(numbers)
        for frame, number in zip(frames, numbers, strict=True):
            torch.testing.assert_close(frame, whole[number], rtol=0, atol=0, msg=f"frame {number} of {path.name}")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain.mp4", {"g": "12"}),
        ("reordered.mp4", REORDERED),
        ("reordered.avi", REORDERED),
        ("reordered.mkv", {"codec": "mpeg2video", **REORDERED}),
        ("reordered.ts", {"codec": "mpeg2video", **REORDERED}),
        ("lossless.mkv", LOSSLESS),
        ("keyframes.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("x264.mp4", x264()),
        ("x264_frames_before_the_keyframe_depend_on_it.mp4", x264("open-gop=1")),
        ("x264_frames_before_the_keyframe_depend_on_it.ts", x264("open-gop=1")),
        ("x264_refreshed_by_parts.mp4", x264("intra-refresh=1")),
        ("x264_without_times.h264", x264()),
        ("x264_guessed_times.avi", x264()),
        ("unequal_times.mp4", {"times": [step**2 for step in range(60)], **REORDERED}),
        ("times_before_the_start.mov", {"times": range(-20, 40), **REORDERED}),
    ],
)
def test_frames_are_those_that_decoding_the_whole_video_gives(tmp_path, name, settings):
    need_encoder(settings.get("codec", "mpeg4"))
    write_video(tmp_path / name, panned(), **settings)
    assert_read_as_decoded(tmp_path / name)


def show_a_part(content):
    """Let an MP4 show what is within 0.72 and 1.72 seconds."""
    edit = content.index(b"elst") + 12
    return content[:edit] + struct.pack(">Ii", 1000, 18 * 512) + content[edit + 8 :]


def swap_halves(content):
    """Store the first half of a transport stream after the second."""
    packets = [content[start : start + 188] for start in range(0, len(content), 188)]
    starts = [place for place, packet in enumerate(packets) if packet[1:3] == b"\x41\0"]
    middle = starts[len(starts) // 2]
    return b"".join(packets[middle:] + packets[:middle])


@pytest.mark.parametrize(
    ("name", "settings", "change"),
    [
        ("every_frame_is_listed_as_keyframe.mp4", {"g": "12"}, lambda content: content.replace(b"stss", b"free")),
        ("a_part_is_shown.mp4", REORDERED, show_a_part),
        ("joined.ts", {"codec": "mpeg2video", **REORDERED}, lambda content: 2 * content),
        ("halves_are_swapped.ts", {"codec": "mpeg2video", "g": "1"}, swap_halves),
        (
            "begins_within_a_group.ts",
            {"codec": "mpeg2video", **REORDERED},
            lambda content: content[: 188 * 3] + content[len(content) // 188 // 3 * 188 :],
        ),
    ],
)
def test_frames_are_those_that_decoding_an_odd_video_gives(tmp_path, name, settings, change):
    write_video(tmp_path / name, panned(), **settings)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(content))
    assert (tmp_path / name).read_bytes() != content
    assert_read_as_decoded(tmp_path / name)


def test_a_palette_holds_for_the_frames_after_it(tmp_path):
    palette = np.random.default_rng(0).integers(256, size=(256, 4), dtype=np.uint8)
    palette[:, 0] = 255
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for number in range(30):
            colours = palette if number < 15 else palette[::-1].copy()
            frame = av.VideoFrame.from_ndarray((np.full((48, 64), number, np.uint8), colours), format="pal8")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert_read_as_decoded(tmp_path / "a.avi")


def mux(path, codec, pix_fmt, packets, times=None):
    """Write packets that are encoded already, each a keyframe or not, as a video of 64 x 48."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for time, (content, is_keyframe) in zip(times or range(len(packets)), packets, strict=True):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), is_keyframe
            packet.pts = packet.dts = time
            container.mux(packet)


def jpeg(picture, **settings):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, **settings)
    return file.getvalue(), True


def test_frames_without_times_of_their_own_are_told_apart(tmp_path):
    pictures = list(map(jpeg, panned(40)))
    mux(tmp_path / "pairs.mkv", "mjpeg", "yuvj420p", pictures, [number // 2 for number in range(40)])
    assert_read_as_decoded(tmp_path / "pairs.mkv")
    need_encoder("libx264")
    write_video(tmp_path / "single.h264", panned(1), **x264())
    assert_read_as_decoded(tmp_path / "single.h264")


def test_a_video_with_fewer_frames_than_packets_stands_still_at_its_end(tmp_path):
    """VP8 has packets that only help to decode others, which one bit of the packet says."""
    need_encoder("libvpx")
    write_video(tmp_path / "shown.webm", panned(), codec="libvpx")
    with av.open(str(tmp_path / "shown.webm")) as container:
        packets = [(bytearray(packet), packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    for content, _ in packets[50::3]:
        content[0] &= ~0x10
    mux(tmp_path / "hidden.webm", "libvpx", "yuv420p", [(bytes(content), key) for content, key in packets])
    whole = all_frames(tmp_path / "hidden.webm")
    assert len(whole) == 56
    frames = read_frames(tmp_path / "hidden.webm", range)
    assert len(frames) == 60
    for frame, expected in zip(frames, whole + 4 * whole[-1:], strict=True):
        assert torch.equal(frame, expected)


def test_frames_that_a_clip_does_not_need_are_not_decoded(tmp_path):
    write_video(tmp_path / "a.mp4", panned(), g="12")
    whole = all_frames(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        damaged = [bytes(packet) for packet in container.demux(video=0)][13:24]
    content = (tmp_path / "a.mp4").read_bytes()
    for packet in damaged:
        content = content.replace(packet, bytes(len(packet)))
    (tmp_path / "a.mp4").write_bytes(content)
    for frame, number in zip(
        read_frames(tmp_path / "a.mp4", lambda count: [50, 24, 7, 47]), (50, 24, 7, 47), strict=True
    ):
        assert torch.equal(frame, whole[number])
    with pytest.raises(ValueError, match=r"a\.mp4: cannot be read as video"):
        read_frames(tmp_path / "a.mp4", lambda count: [7, 14])


def peak_of_a_sample(dataset):
    """How far a sample raises the process's largest memory, in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert dataset[0][0].isfinite().all()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("training", [True, False])
def test_frames_that_a_clip_does_not_need_are_not_kept(tmp_path, training):
    write_video(tmp_path / "long.mp4", 600 * [np.zeros((360, 640, 3), np.uint8)])  # 200 MiB
    (tmp_path / "train.csv").write_text("long.mp4 0\n")
    dataset = create_dataset("video", "list", tmp_path, "train", training, size=32)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(peak_of_a_sample, (dataset,)) < 100


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_frames_are_decoded_without_threads(tmp_path, monkeypatch):
    """A forked data worker would wait for its parent's, for ever."""
    write_video(tmp_path / "a.mkv", panned(4), **LOSSLESS)
    threads = []
    resize = functional.resize
    monkeypatch.setattr(
        functional, "resize", lambda *a, **b: threads.append(os.listdir("/proc/self/task")) or resize(*a, **b)
    )
    before = os.listdir("/proc/self/task")
    read_frames(tmp_path / "a.mkv", range)
    assert threads == 4 * [before]


def as_shown(picture, a, b, c, d):
    """A picture (3, H, W) by ISO/IEC 14496-12: what is stored at (x, y) is shown at (a x + c y, b x + d y)."""
    y, x = np.mgrid[: picture.shape[1], : picture.shape[2]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    shown = torch.zeros(3, int(down.max()) + 1, int(right.max()) + 1, dtype=picture.dtype)
    shown[:, down, right] = picture
    return shown


def display(path, a, b, c, d):
    """Write a display matrix into an MP4 file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", content, start) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">5i", content, start, *(round(value * (1 << 16)) for value in (a, b, 0, c, d)))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
    ids=lambda matrix: " ".join(map(str, matrix)),
)
def test_frames_are_turned_and_mirrored_as_a_player_shows_them(tmp_path, matrix):
    write_video(tmp_path / "a.mp4", panned(4))
    stored = read_frames(tmp_path / "a.mp4", range)
    display(tmp_path / "a.mp4", *matrix)
    for frame, picture in zip(read_frames(tmp_path / "a.mp4", range), stored, strict=True):
        assert torch.equal(frame, as_shown(picture, *matrix))


@pytest.mark.parametrize(("angle", "nearest"), [(40, 0), (50, 90), (100, 90), (-80, -90), (170, 180)])
def test_frames_are_turned_by_the_nearest_right_angle(tmp_path, angle, nearest):
    write_video(tmp_path / "a.mp4", panned(1))
    stored = read_frames(tmp_path / "a.mp4", range)[0]
    radians = np.deg2rad(angle)
    display(tmp_path / "a.mp4", np.cos(radians), np.sin(radians), -np.sin(radians), np.cos(radians))
    clockwise = torch.rot90(stored, -nearest // 90, (1, 2))
    assert torch.equal(read_frames(tmp_path / "a.mp4", range)[0], clockwise)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pictures_whose_exif_says_so_are_turned(tmp_path, orientation):
    """PyAV 18 does not know what FFmpeg 8 calls the rest of the Exif data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = panned(1)[0]
    mux(tmp_path / "a.mkv", "mjpeg", "yuvj420p", 3 * [jpeg(picture, exif=exif)])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg(picture, exif=exif)[0])))
    for frame in read_frames(tmp_path / "a.mkv", range):
        assert np.abs(frame.permute(1, 2, 0).numpy() - np.asarray(upright, np.float32)).mean() < 5


def test_evaluation_sees_a_turned_video_upright(tmp_path):
    write_video(tmp_path / "a.mp4", panned(20))
    (tmp_path / "test.csv").write_text("a.mp4 0\n")
    dataset = create_dataset("video", "list", tmp_path, "test", False, size=48, clips=1, crops=1, frames=4)
    stored = dataset[0][0]
    display(tmp_path / "a.mp4", 0, 1, -1, 0)
    assert torch.equal(dataset[0][0], torch.rot90(stored, -1, (2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_frames_of_another_size_are_scaled_to_that_of_the_first(tmp_path, training):
    large, small = np.full((48, 64, 3), 200, np.uint8), np.full((20, 20, 3), 100, np.uint8)
    mux(tmp_path / "a.mkv", "mjpeg", "yuvj420p", 8 * [jpeg(large)] + 8 * [jpeg(small)])
    assert {tuple(frame.shape) for frame in read_frames(tmp_path / "a.mkv", range)} == {(3, 48, 64)}
    assert {tuple(frame.shape) for frame in read_frames(tmp_path / "a.mkv", lambda count: [12, 9])} == {(3, 20, 20)}
    (tmp_path / "test.csv").write_text("a.mkv 0\n")
    dataset = create_dataset(
        "video", "list", tmp_path, "test", training, size=24, stride=1, clips=1, crops=1, repeats=1, **PLAIN
    )
    clip = dataset[0][0]
    assert clip.shape == (3, 16, 24, 24)
    assert [2 * number for number in grey(clip)] == 8 * [200] + 8 * [100]


def test_damaged_video_is_named(tmp_path):
    write_video(tmp_path / "unknown.mkv", panned(2), **LOSSLESS)
    content = (tmp_path / "unknown.mkv").read_bytes()
    (tmp_path / "unknown.mkv").write_bytes(content.replace(b"V_FFV1", b"V_NONE"))
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "gone.mp4", "unknown.mkv"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as video"):
            read_frames(tmp_path / name, range)


@pytest.mark.parametrize("name", ["cover.mp3", "cover.m4a", "plain.wav"])
def test_sound_is_no_video_even_with_a_cover_picture(tmp_path, name):
    form, codec = {"mp3": ("mp3", "libmp3lame"), "m4a": ("mp4", "aac"), "wav": ("wav", "pcm_s16le")}[name[-3:]]
    with av.open(str(tmp_path / name), "w", format=form) as container:
        sound = container.add_stream(codec, rate=16000)
        if name.startswith("cover"):
            cover = container.add_stream("mjpeg")
            cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            packet = av.Packet(jpeg(panned(1)[0])[0])
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = cover, 0, 0, True
            container.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with av.open(str(tmp_path / name)) as container:
        assert len(container.streams.video) == name.startswith("cover")
    with pytest.raises(ValueError, match=f"{name}: has no video stream"):
        read_frames(tmp_path / name, range)


def test_video_whose_description_is_no_text_is_named_or_read(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(2))
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"Lavf", b"Lav\xed"))
    try:
        assert len(read_frames(tmp_path / "a.mp4", range)) == 2  # PyAV 19
    except ValueError as error:
        assert "a.mp4: cannot be read as video" in str(error)


@pytest.mark.parametrize("line", ["only_a_path.mp4", "a.mp4 400", "a.mp4 -1", "a.mp4 cat", "a.mp4 " + 5000 * "1"])
def test_damaged_list_is_named(tmp_path, line):
    (tmp_path / "train.csv").write_text(f"a.mp4 0\n{line}\nb.mp4 1\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 2: expected a path and a label below 400"):
        create_dataset("video", "list", tmp_path, "train", True)


def test_empty_lines_of_a_list_are_left_out(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\n\nb.mp4 1\n  \n")
    assert create_dataset("video", "list", tmp_path, "train", True).labels == [0, 1]


def test_unknown_split_is_refused(kinetics):
    with pytest.raises(ValueError, match="split: expected one of test, train; got 'val'"):
        create_dataset("video", "list", kinetics, "val", True)


@pytest.mark.parametrize("setting", ["size", "frames", "stride", "repeats", "clips", "crops", "num_classes"])
def test_impossible_settings_are_refused(kinetics, setting):
    with pytest.raises(ValueError, match=f"{setting}: expected a positive integer, got 0"):
        create_dataset("video", "list", kinetics, "train", True, **{setting: 0})
