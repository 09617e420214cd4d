"""Training that is killed, terminated, or goes wrong: it goes on from its last checkpoint as if nothing had been."""

import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import assert_equal, interrupted, no_plots
from torch import nn
from two_processes import FORKSERVER, free_port

import m2pt.train.run
from m2pt.checkpoints import save_state_dict
from m2pt.cli import RESUMING, main
from m2pt.models import create_model
from m2pt.train.engine import Trainer
from m2pt.train.log import read_log

pytestmark = pytest.mark.slow

MODEL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SETTINGS = [f"model.overrides.{name}={value}" for name, value in MODEL.items()]
SETTINGS += [
    "data.batch_size=120",
    "model.overrides.drop_path_rate=0.5",
    "loss.mixup=0.8",
    "schedule.epochs=2",
    "run.checkpoint_steps=1",
    "run.log_steps=1",
    "run.ema_decay=0.5",
]
STEPS = 20
STATUSES = {"SIGTERM": 143, "SIGINT": 130}
SAVED = f"m2pt: interrupted; step {{}} is saved; {RESUMING}"


@pytest.fixture(scope="module")
def runs(folder):
    """An auxiliary checkpoint, and a run from beginning to end."""
    torch.manual_seed(1)
    auxiliary = create_model("image", "tiny", num_classes=0, img_size=32, patch_size=8, **MODEL)
    save_state_dict(auxiliary.state_dict(), folder / "aux.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        no_plots(patch)
        assert main(command(folder, "whole")) == 0
    return folder


_no_plots = pytest.fixture(autouse=True)(no_plots)


def command(folder, out, *more):
    return [
        "train",
        "tiny_image",
        *SETTINGS,
        "--aux",
        str(folder / "aux.safetensors"),
        "--out",
        str(folder / out),
        *more,
    ]


def state(out):
    return torch.load(out / "last.pth", weights_only=True)


def assert_ended_alike(out, whole):
    """The same merged model, byte for byte; the same state, metrics and files."""
    assert (out / "merged.safetensors").read_bytes() == (whole / "merged.safetensors").read_bytes()
    states = state(out), state(whole)
    for part in ("model", "ema", "optimizer", "scaler", "step"):
        assert_equal(states[0][part], states[1][part])
    assert metrics(out) == metrics(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def metrics(out):
    """The log without what depends on the clock or tells of a stop, at which an evaluation that is due is left out."""
    lines = ({name: value for name, value in line.items() if name != "samples_per_second"} for line in read_log(out))
    return [line for line in lines if "loss" in line or "model" in line]


def slow_down(update):
    """From the fourth on, steps take more than a second."""

    def slow_update(trainer, batches):
        is_slow = trainer.step >= 3
        time.sleep(0.2 * is_slow)
        metrics = update(trainer, batches)
        time.sleep(is_slow)
        return metrics

    Trainer.update = slow_update


def run(arguments, fsyncs=None, rank=None, port=None, timeout=None, poison=None, slow=False):
    """A training process; it kills itself when it is about to complete its `fsyncs`-th file. In the process and at the
    step of `poison` a layer's output is not a number."""
    if slow:
        slow_down(Trainer.update)
    os.setsid()  # so that a signal can be sent to it and its data workers together
    stderr = Path(arguments[arguments.index("--out") + 1]).with_suffix(f".{rank}.err")
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    multiprocessing.set_start_method("fork", force=True)  # for its data workers, as in a run from the command line
    no_plots(pytest.MonkeyPatch())
    fsync, done = os.fsync, []

    def fsync_or_die(descriptor):
        done.append(descriptor)
        if len(done) == fsyncs:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fsync_or_die
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    if poison is not None and poison[0] == rank:
        poison_at(poison[1])
    if timeout is not None:
        dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=timeout))
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def start():
    """Start `run` in a process that has imported everything already; whatever is still running ends with the tests."""
    processes = []

    def start(*arguments, **settings):
        process = FORKSERVER.Process(target=run, args=arguments, kwargs=settings)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def start_two(start, arguments, **settings):
    """Two processes that train one model, without a launcher that would look after them."""
    port = free_port()
    return [start(arguments, rank=rank, port=port, **settings) for rank in range(2)]


def statuses(processes, seconds=60):
    """How processes ended, None for one that has not."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def said(out):
    """What the last processes that wrote to `out` said on stderr, without torch's lines and the progress."""
    files = sorted(out.parent.glob(f"{out.name}.*.err"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("m2pt: ")]
    for file in files:
        file.unlink()
    return lines


def wait_for(out, lines):
    """Until the log has so many lines."""
    end = time.monotonic() + 60
    while len(read_log(out)) < lines:
        assert time.monotonic() < end, "the run does not go on"
        time.sleep(0.002)


def resumed(arguments, out):
    return [*arguments, "--resume"] if (out / "last.pth").exists() else arguments


def test_killed_runs_end_as_if_nothing_had_been(runs, start, repetitions):
    """Half of the kills come at any time, the other half while a file is being written."""
    moments = random.Random(0)
    kills = finished = while_writing = 0
    while kills < repetitions or finished == 0:
        out = runs / f"killed{finished}"
        is_finished = False
        while not is_finished:
            arguments = resumed(command(runs, out.name), out)
            if kills >= repetitions:
                process = start(arguments)
            elif kills % 2:
                process = start(arguments, fsyncs=moments.randrange(1, STEPS))
            else:
                process = start(arguments)
                process.join(moments.uniform(0, 1))
                process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            is_finished = process.exitcode == 0
            kills += not is_finished
            while_writing += bool(list(out.glob("*.partial")))
        finished += 1
        assert finished < repetitions + 10, "runs end before they can be killed"
        assert_ended_alike(out, runs / "whole")
    assert while_writing >= kills // 2


@pytest.mark.parametrize("name, workers", [("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 1)])
def test_a_signal_finishes_the_step_and_saves(runs, start, name, workers, repetitions):
    moments = random.Random(workers)
    for number in range((repetitions + 1) // 2):
        out = runs / f"{name}{workers}-{number}"
        arguments = command(runs, out.name, f"machine.workers={workers}", "run.checkpoint_steps=0")
        process = start(arguments)
        wait_for(out, moments.randrange(1, STEPS // 2))
        os.killpg(process.pid, signal.Signals[name])  # with its data workers, as a scheduler and a terminal do
        assert statuses([process]) == [STATUSES[name]]
        stop = read_log(out)[-1]
        assert stop["stopped"] == name and state(out)["step"] == stop["step"] < STEPS
        assert said(out) == [SAVED.format(stop["step"])] * (name == "SIGINT")
        assert statuses([start([*arguments, "--resume"])]) == [0]
        assert_ended_alike(out, runs / "whole")


def test_a_signal_to_one_of_two_processes_stops_both(runs, start):
    whole, out = runs / "whole2", runs / "stopped2"
    assert statuses(start_two(start, command(runs, whole.name))) == [0, 0]
    arguments, done = command(runs, out.name), 0
    for name, status in STATUSES.items():
        processes = start_two(start, arguments)
        wait_for(out, done + 5)
        os.kill(processes[1].pid, signal.Signals[name])
        assert statuses(processes) == [status, status]
        done = state(out)["step"]
        assert said(out) == [SAVED.format(done)] * (name == "SIGINT")
        arguments = [*command(runs, out.name), "--resume"]
    assert 10 <= done < STEPS
    assert statuses(start_two(start, arguments)) == [0, 0]
    assert_ended_alike(out, whole)


def test_a_second_ctrl_c_ends_at_once(runs, start):
    out = runs / "twice"
    process = start(command(runs, out.name, "run.checkpoint_steps=2"), slow=True)
    wait_for(out, 3)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)  # a step takes longer
    assert statuses([process]) == [130]
    assert said(out) == [f"m2pt: interrupted; {RESUMING}"]
    assert state(out)["step"] == 2 and "stopped" not in read_log(out)[-1]


@pytest.mark.parametrize("name, status", STATUSES.items())
def test_a_signal_cuts_an_evaluation_short_and_saves(runs, monkeypatch, capsys, name, status):
    out, evaluate = runs / f"evaluation-{name}", m2pt.train.run.evaluate

    def interrupted(*arguments):
        signal.raise_signal(signal.Signals[name])
        return evaluate(*arguments)

    arguments = command(runs, out.name, "run.checkpoint_steps=0")
    with monkeypatch.context() as patch:
        patch.setattr(m2pt.train.run, "evaluate", interrupted)
        if name == "SIGINT":
            assert main(arguments) == status
            assert capsys.readouterr().err.splitlines()[-1] == SAVED.format(STEPS // 2)
        else:
            with pytest.raises(SystemExit, match=str(status)):
                main(arguments)
    assert state(out)["step"] == STEPS // 2 and not any("top1" in line for line in read_log(out))
    assert main([*arguments, "--resume"]) == 0
    assert_ended_alike(out, runs / "whole")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_an_error(runs, start, lost):
    out = runs / f"lost{lost}"
    processes = start_two(start, command(runs, out.name))
    wait_for(out, 5)
    processes[lost].kill()
    left = statuses(processes)[1 - lost]
    assert left not in (None, 0)
    assert state(out)["step"] >= 4


def test_a_process_that_hangs_ends_the_others_after_the_timeout(runs, start):
    out = runs / "hanging"
    processes = start_two(start, command(runs, out.name), timeout=3)
    wait_for(out, 5)
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert statuses(processes[:1]) not in ([None], [0])


def test_signals_outside_of_training_are_left_to_the_caller(runs):
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    assert main([*command(runs, "whole"), "--resume"]) == 0
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == before


def test_training_in_a_thread(runs):
    """Where Python allows nobody to handle signals."""
    done = []
    thread = threading.Thread(target=lambda: done.append(main([*command(runs, "whole"), "--resume"])))
    thread.start()
    thread.join()
    assert done == [0]


def test_a_log_whose_last_line_is_not_whole_is_continued(runs):
    out = runs / "log"
    with interrupted(7):
        assert main(command(runs, out.name)) == 130
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert main([*command(runs, out.name), "--resume"]) == 0
    assert metrics(out) == metrics(runs / "whole")


def poison_weight(trainer):
    """A weight that is not a number."""
    nn.init.constant_(trainer.module.blocks[1].mlp.fc1.weight[:1], math.nan)


def poison_at(step):
    """Make a layer's output not a number in one step of this process."""
    loss = Trainer._loss

    def poisoned_loss(trainer, model, batch):
        hook = trainer.module.blocks[1].mlp.fc1.register_forward_hook(
            lambda module, input, output: output * (math.nan if trainer.step == step else 1), prepend=True
        )
        try:
            return loss(trainer, model, batch)
        finally:
            hook.remove()

    Trainer._loss = poisoned_loss


def poison_scale(trainer):
    nn.init.constant_(trainer.module.blocks[0].attn.proj.cross_modal_scale, math.inf)


def poison_input(trainer):
    trainer.objective = partial(poisoned, trainer.objective)


def poisoned(objective, model, batch):
    images, labels = batch
    images[1, 0, 0, 0] = math.inf
    return objective(model, (images, labels))


def poison_at_random(trainer):
    """An output that is not a number in every tenth forward pass, by the random numbers of the step."""
    trainer.module.blocks[1].norm2.register_forward_hook(
        lambda module, input, output: output * (math.nan if torch.rand(()) < 0.1 else 1)
    )


def poison_gradient(trainer):
    trainer.module.blocks[0].mlp.fc2.weight.register_hook(lambda gradient: gradient * math.inf)


def poison_loss(trainer):
    objective = trainer.objective
    trainer.objective = lambda model, batch: objective(model, batch) * math.nan


POISONS = {
    poison_weight: "the loss is nan; the first that is not finite is the output of blocks.1.mlp.fc1",
    poison_scale: "the loss is nan; the first that is not finite is the output of blocks.0.attn.proj",
    poison_input: "the loss is nan; the first that is not finite is the input",
    poison_at_random: "the loss is nan; the first that is not finite is the output of blocks.1.norm2",
    poison_gradient: "the norm of the gradient is {}; the first that is not finite is the gradient of blocks.0.mlp.fc2",
    poison_loss: "the loss is nan; the first that is not finite is the loss itself",
}


UPDATES = ["machine.accumulation=1", "machine.accumulation=2", "machine.step_in_backward=true", "optimizer.name=lars"]


@pytest.mark.parametrize(
    "poison, setting, interval",
    [
        pytest.param(poison, setting, (1, 4)[(first // 2 + second // 2) % 2], id=f"{poison.__name__}-{setting}")
        for first, poison in enumerate(POISONS)
        for second, setting in enumerate(UPDATES)
        if poison in (poison_at_random, poison_gradient) or (first + second) % 2 == 0
    ],
)
def test_what_is_not_finite_stops_with_step_and_layer(runs, monkeypatch, capsys, poison, setting, interval):
    """Also where loss and gradient are read back some steps later. What depends on how weights are updated meets every
    setting, the rest every other one."""
    out = runs / f"{poison.__name__}-{setting}-{interval}"
    update = Trainer.update

    def poisoned_update(trainer, batches):
        if trainer.step == 5 and not hasattr(trainer, "is_poisoned"):
            trainer.is_poisoned = True
            poison(trainer)
        return update(trainer, batches)

    monkeypatch.setattr(Trainer, "update", poisoned_update)
    steps = [f"run.checkpoint_steps={interval}", "run.log_steps=1000"]
    assert main(command(runs, out.name, setting, *steps)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    step = int(re.match(r"m2pt: error: step (\d+): ", error)[1])
    assert any(POISONS[poison].format(norm) in error for norm in ("nan", "inf"))
    assert step == 5 or (poison is poison_at_random and step > 5)
    assert state(out)["step"] == step // interval * interval
    assert all(value.isfinite().all() for value in state(out)["model"].values())
    assert not (out / "result.json").exists()


def test_every_process_stops_at_the_step_that_was_not_finite_in_one(runs, start):
    """Where it is read back some steps later, too."""
    out = runs / "not_finite_in_one"
    arguments = command(runs, out.name, "run.checkpoint_steps=4", "run.log_steps=1000")
    assert statuses(start_two(start, arguments, poison=(1, 6))) == [2, 2]
    errors = said(out)
    assert len(errors) == 2 and all("m2pt: error: step 6: the loss is nan" in error for error in errors)
    assert errors[0].endswith("everything is finite in this process")
    assert errors[1].endswith("the first that is not finite is the output of blocks.1.mlp.fc1")
    assert state(out)["step"] == 4


def test_weights_that_are_not_finite_are_not_saved(runs, monkeypatch, capsys):
    out, update = runs / "not_saved", Trainer.update

    def ruinous(trainer, batches):
        metrics = update(trainer, batches)
        if trainer.step == 6:
            nn.init.constant_(trainer.module.blocks[1].norm1.bias, math.inf)
        return metrics

    monkeypatch.setattr(Trainer, "update", ruinous)
    assert main(command(runs, out.name)) == 2
    assert "m2pt: error: step 6: blocks.1.norm1.bias is not finite" in capsys.readouterr().err
    assert state(out)["step"] == 5
