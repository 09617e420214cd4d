"""Sound: the filterbank against Kaldi's formula in numpy, the layouts, and the augmentation."""

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from m2pt.data import create_dataset
from m2pt.data.audio import log_mel, read_wave

scipy = pytest.importorskip("scipy")
soundfile = pytest.importorskip("soundfile")

RECORDING = Path(scipy.io.__file__).parent / "tests" / "data" / "test-44100Hz-le-1ch-4bytes.wav"
QUIET = {"mixup": 0.0, "roll": False, "frequency_mask": 0, "time_mask": 0}


def chirp(seconds, low, high, rate=16_000):
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * scipy.signal.chirp(time, low, seconds, high)).astype(np.float32)


def mel(hertz):
    return 1127 * np.log(1 + hertz / 700)


def kaldi_filterbank(wave):
    """Log-mel features (frames, 128) of a wave (samples,) at 16 kHz, in float64."""
    starts = np.arange(0, len(wave) - 400 + 1, 160)
    frames = wave[starts[:, None] + np.arange(400)].astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2
    edges = np.linspace(mel(20), mel(8000), 130)
    position = mel(np.arange(256) * 16_000 / 512)[:, None]
    rising = (position - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0, np.minimum(rising, falling))
    return np.log(np.maximum(power[:, :256] @ weights, np.finfo(np.float32).eps))


@pytest.fixture
def esc50(tmp_path):
    """Ten clips of five folds and two classes; the target is the number's parity."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(10):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", chirp(1.0, 200 + 100 * number, 4000), 16_000)
        rows.append(f"{number}.wav,{number // 2 + 1},{number % 2},{'odd' if number % 2 else 'even'},False,0,A")
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def audioset(tmp_path):
    """Two files, one with two labels, listed as json (`train`) and as csv (`eval`)."""
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/1,Speech\n1,/m/2,"Dog, bark"\n2,/m/3,Music\n'
    )
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 100, 7000), 16_000)
    soundfile.write(tmp_path / "b.wav", chirp(1.5, 3000, 500), 16_000)
    rows = [{"wav": "a.wav", "labels": "/m/1,/m/3"}, {"wav": "b.wav", "labels": "/m/2"}]
    (tmp_path / "train.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "eval.csv").write_text('wav,labels\na.wav,"/m/1,/m/3"\nb.wav,/m/2\n')
    return tmp_path


def test_filterbank_is_kaldis():
    wave = chirp(1.0, 50, 7900) + np.random.default_rng(0).normal(0, 0.01, 16_000).astype(np.float32)
    expected = kaldi_filterbank(wave)
    features = log_mel(torch.from_numpy(wave), 98).double().numpy()
    assert expected.shape == features.shape == (98, 128)
    filled = expected > -15  # below, the first mel bins hold no bin of the Fourier transform
    assert filled.mean() > 0.9
    np.testing.assert_allclose(features[filled], expected[filled], atol=1e-2)


def test_filterbank_is_cut_or_padded_with_zeros():
    wave = torch.from_numpy(chirp(1.0, 50, 7900))
    whole = log_mel(wave, 98)
    assert torch.equal(log_mel(wave, 40), whole[:40])
    padded = log_mel(wave, 128)
    assert torch.equal(padded[:98], whole) and not padded[98:].any()


def test_a_recording_is_resampled_and_centred():
    values, rate = soundfile.read(RECORDING)
    assert rate == 44_100
    wave = read_wave(RECORDING).double().numpy()
    expected = scipy.signal.resample_poly(values, 160, 441)
    assert abs(len(wave) - len(expected)) <= 1 and abs(wave.mean()) < 1e-6
    middle = slice(100, len(expected) - 100)  # the ends depend on the filter
    error = wave[middle] - (expected - expected.mean())[middle]
    assert np.abs(error).max() < 0.02 * np.abs(expected).max()


def test_a_sampling_rate_without_a_common_divisor_is_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 100, 3000, rate=44_099), 44_099, subtype="FLOAT")
    wave, expected = read_wave(tmp_path / "a.wav").numpy(), chirp(1.0, 100, 3000)
    assert len(wave) == len(expected)
    np.testing.assert_allclose(wave[100:-100], (expected - expected.mean())[100:-100], atol=2e-3)


@pytest.mark.parametrize("rate", [8_000, 8_009, 11_025, 22_254, 44_101, 95_989, 191_999, 192_000])
def test_any_sampling_rate_is_resampled_in_bounded_memory_and_time(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", chirp(4.0, 100, 3000, rate=rate), rate, subtype="FLOAT")
    read_wave(RECORDING)  # what is imported is not counted
    tracemalloc.start()
    start = time.process_time()
    wave = read_wave(tmp_path / "a.wav").numpy()
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = chirp(4.0, 100, 3000)
    np.testing.assert_allclose(wave[200:-200], (expected - expected.mean())[200:-200], atol=4e-3)
    assert peak < 256 * 2**20 and seconds < 10


def test_a_sound_of_unknown_length_is_read_and_one_of_an_impossible_length_is_named(tmp_path):
    """As programs write that do not know the length when they begin."""
    path = tmp_path / "a.flac"
    soundfile.write(path, chirp(1.0, 100, 3000), 16_000)
    expected, content = read_wave(path), bytearray(path.read_bytes())
    total = content.index(b"fLaC") + 8 + 13  # the last four bits of this byte, and the next four bytes
    content[total : total + 5] = bytes([content[total] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(content)
    try:
        assert torch.equal(read_wave(path), expected)
    except ValueError as error:
        assert str(error).startswith(f"{path}: cannot be read as sound")  # by libsndfile's that do not know it
    content[total : total + 5] = bytes([content[total] | 0x0F, 255, 255, 255, 255])
    path.write_bytes(content)
    try:
        assert len(read_wave(path)) == len(expected)
    except ValueError as error:
        assert str(error).startswith(f"{path}: cannot be read as sound")


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_an_impossible_sampling_rate_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.ones(100, np.float32), rate)
    with pytest.raises(ValueError, match=rf"a\.wav: expected a sampling rate of 1 to 1000 kHz, got {rate} Hz"):
        read_wave(tmp_path / "a.wav")


def test_a_sound_too_loud_to_compute_with_is_a_damaged_sample(esc50):
    dataset = create_dataset("audio", "esc50", esc50, "test", False)
    soundfile.write(dataset.files[0], 1e30 * chirp(1.0, 100, 3000), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"{dataset.files[0].name}: holds values that are not finite"):
        dataset[0]


def test_channels_are_averaged(tmp_path):
    left, right = chirp(0.1, 100, 200), chirp(0.1, 400, 900)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    mono = torch.from_numpy((left + right) / 2)
    torch.testing.assert_close(read_wave(tmp_path / "stereo.wav"), mono - mono.mean())


def test_esc50_folds(esc50):
    test = create_dataset("audio", "esc50", esc50, "test", False, fold=2)
    train = create_dataset("audio", "esc50", esc50, "train", True, fold=2)
    assert [file.name for file in test.files] == ["2.wav", "3.wav"]
    assert [file.name for file in train.files] == [f"{number}.wav" for number in (0, 1, 4, 5, 6, 7, 8, 9)]
    assert (test.num_classes, test.class_names, test.multi_label) == (2, ("even", "odd"), False)
    assert [test[0][1], test[1][1], train[0][1]] == [0, 1, 0]


@pytest.mark.parametrize(
    ("layout", "frames", "mean", "std"),
    [
        ("list", 1024, -4.2677393, 4.5689974),
        ("esc50", 512, -6.6268077, 5.358466),
        ("speech_commands", 128, -6.845978, 5.5654526),
    ],
)
def test_input_is_normalized_with_the_data_sets_figures(request, tmp_path, layout, frames, mean, std):
    root = request.getfixturevalue({"list": "audioset", "esc50": "esc50"}.get(layout, "speech"))
    split = "eval" if layout == "list" else "test"
    dataset = create_dataset("audio", layout, root, split, False)
    features = dataset[0][0]
    assert (features.shape, features.dtype) == ((1, frames, 128), torch.float32)
    expected = (log_mel(read_wave(dataset.files[0]), frames) - mean) / (2 * std)
    torch.testing.assert_close(features[0], expected)


@pytest.fixture
def speech(tmp_path):
    for word in ("yes", "no", "_background_noise_"):
        (tmp_path / word).mkdir()
        for speaker in "abc":
            soundfile.write(tmp_path / word / f"{speaker}.wav", chirp(1.0, 300, 600), 16_000)
    (tmp_path / "validation_list.txt").write_text("yes/b.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/c.wav\nyes/c.wav\n")
    return tmp_path


def test_speech_commands_splits(speech):
    names = {
        split: [
            (file.relative_to(speech).as_posix(), label)
            for file, (label,) in zip(dataset.files, dataset.labels, strict=True)
        ]
        for split in ("train", "validation", "test")
        for dataset in [create_dataset("audio", "speech_commands", speech, split, False)]
    }
    assert names == {
        "train": [("no/a.wav", 0), ("no/b.wav", 0), ("yes/a.wav", 1)],
        "validation": [("yes/b.wav", 1)],
        "test": [("no/c.wav", 0), ("yes/c.wav", 1)],
    }


@pytest.mark.parametrize("split", ["train", "eval"])
def test_list_has_several_labels(audioset, split):
    dataset = create_dataset("audio", "list", audioset, split, False, frames=64)
    assert (dataset.class_names, dataset.multi_label) == (("Speech", "Dog, bark", "Music"), True)
    assert [dataset[index][1].tolist() for index in (0, 1)] == [[1, 0, 1], [0, 1, 0]]
    assert dataset[0][1].dtype == torch.float32


def test_mixup_mixes_waves_and_targets(audioset):
    dataset = create_dataset("audio", "list", audioset, "train", True, frames=98, **(QUIET | {"mixup": 1.0}))
    partners, shares = set(), []
    for seed in range(20):
        torch.manual_seed(seed)
        features, target = dataset[0]
        share = float(target[0])
        partners.add(bool(target[1] > 0))
        if target[1] > 0:
            torch.testing.assert_close(target, torch.tensor([share, 1 - share, share]))
            shares.append(share)
        else:
            torch.testing.assert_close(target, torch.tensor([1.0, 0.0, 1.0]))
            share = 1.0
        first, second = read_wave(dataset.files[0]), read_wave(dataset.files[1])[:16_000]
        mixed = share * first + (1 - share) * second
        expected = (log_mel(mixed - mixed.mean(), 98) + 4.2677393) / (2 * 4.5689974)
        torch.testing.assert_close(features[0], expected, atol=1e-2, rtol=0)
    assert partners == {True, False}
    assert 0.3 < np.mean(shares) < 0.7 and max(shares) - min(shares) > 0.05


def test_mixup_has_its_probability(audioset):
    dataset = create_dataset("audio", "list", audioset, "train", True, frames=16)
    assert dataset.mixup == 0.5
    targets = torch.stack([dataset[1][1] for _ in range(60)])
    mixed_with_other = (targets[:, 0] > 0).float().mean()
    assert 0.1 < mixed_with_other < 0.4  # a quarter: half is mixed, half of it with itself


def test_mixup_makes_single_labels_vectors(esc50):
    dataset = create_dataset("audio", "esc50", esc50, "train", True, frames=16, mixup=0.5)
    targets = torch.stack([dataset[index][1] for index in range(8)])
    assert targets.shape == (8, 2) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_rolling_keeps_the_waves_samples(esc50):
    dataset = create_dataset("audio", "esc50", esc50, "train", True, **(QUIET | {"roll": True}))
    wave, gains = read_wave(dataset.files[0]), []
    for _ in range(30):
        rolled = dataset._wave(0)
        gains.append(float(rolled.norm() / wave.norm()))
        torch.testing.assert_close((rolled / gains[-1]).sort().values, wave.sort().values, atol=1e-5, rtol=0)
        assert not torch.allclose(rolled / gains[-1], wave)
    assert 0.5 < min(gains) < 0.95 and 1.05 < max(gains) < 1.5


def test_masks_are_bands_of_zeros_before_normalization(audioset):
    settings = QUIET | {"frequency_mask": 48, "time_mask": 192}
    dataset = create_dataset("audio", "list", audioset, "train", True, frames=256, mean=1.0, std=2.0, **settings)
    plain = create_dataset("audio", "list", audioset, "train", False, frames=256, mean=1.0, std=2.0)[1][0][0]
    widths = []
    for _ in range(20):
        masked = dataset[1][0][0]
        zeroed = masked == -0.25
        changed = masked != plain
        assert zeroed[changed].all()
        rows, columns = zeroed.all(dim=1).nonzero()[:, 0], zeroed.all(dim=0).nonzero()[:, 0]
        sound_rows = rows[rows < 148]  # the frames beyond 1.5 s are padding
        for band in (sound_rows, columns):
            assert not len(band) or int(band[-1] - band[0]) + 1 == len(band)
        widths.append((len(sound_rows), len(columns)))
    assert 24 < max(time for time, _ in widths) <= 192 and 24 < max(mel for _, mel in widths) <= 48


def test_evaluation_is_not_random(audioset):
    dataset = create_dataset("audio", "list", audioset, "eval", False, frames=64)
    assert torch.equal(dataset[0][0], dataset[0][0])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("text.wav", lambda path: path.write_text("no sound"), "cannot be read as sound"),
        ("gone.wav", lambda path: None, "cannot be read as sound"),
        ("short.wav", lambda path: soundfile.write(path, np.zeros(399), 16_000), "expected at least 25 ms"),
        (
            "nan.wav",
            lambda path: soundfile.write(path, np.full(800, np.nan), 16_000, subtype="FLOAT"),
            "not finite",
        ),
    ],
)
def test_damaged_sound_is_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_wave(tmp_path / name)


def test_damaged_lists_are_named(audioset):
    (audioset / "bad.csv").write_text("file,labels\na.wav,/m/1\n")
    with pytest.raises(ValueError, match=r"bad\.csv: expected the columns wav, labels; missing: wav"):
        create_dataset("audio", "list", audioset, "bad", False)
    (audioset / "bad.csv").write_text("wav,labels\na.wav,/m/9\n")
    with pytest.raises(ValueError, match=r"bad\.csv: a\.wav: the label '/m/9' is not in"):
        create_dataset("audio", "list", audioset, "bad", False)
    (audioset / "worse.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"worse\.json: expected"):
        create_dataset("audio", "list", audioset, "worse", False)
    with pytest.raises(ValueError, match="split: expected one of bad, eval, train, worse; got 'test'"):
        create_dataset("audio", "list", audioset, "test", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": 6}, "fold: expected an integer from 1 to 5, got 6"),
        ({"frames": -1}, "frames: expected a positive integer"),
        ({"mixup": 2}, "mixup: expected a probability"),
        ({"std": 0}, "std: expected a positive number, got 0"),
        ({"time_mask": 513}, "time_mask: expected an integer from 0 to 512, got 513"),
    ],
)
def test_impossible_settings_are_refused(esc50, settings, message):
    with pytest.raises(ValueError, match=message):
        create_dataset("audio", "esc50", esc50, "train", True, **settings)
