"""When a run saves, the thread that writes, and several processes that decide alike."""

import signal
import threading

import pytest
import torch
from conftest import TINY

from harness import checkpoint
from harness.run import Run
from harness.state import Schedule
from lib.errors import InputError
from pretrain import pretrain

RUN = TINY | {"lr": 8.0, "epochs": 3, "eval_every": 0}


def test_an_interval_has_its_unit():
    for text, length, unit in (("10min", 600, "min"), ("1steps", 1, "steps"), ("500steps", 500, "steps")):
        schedule = Schedule(text, 0, is_new=False)
        assert (schedule.length, schedule.unit) == (length, unit)
    for text in ("500", "0min", "1.5min", "10 min", "10epochs", "", "¹min"):
        with pytest.raises(InputError, match=r"^--save_every .*: expected a whole number .* 10min or 500steps$"):
            Schedule(text, 0, is_new=False)


def saves(monkeypatch, text, epochs, minutes_a_step, is_new=False):
    """The steps that a run of epochs with these lengths saves after, its last aside; epochs' ends are negative."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: 60 * clock[0])
    schedule, step, saved = Schedule(text, 0, is_new), 0, []
    for length in epochs:
        schedule.epoch_began = schedule.now(step)
        for k in range(1, length + 1):
            step += 1
            clock[0] += minutes_a_step
            at_end = k == length
            if schedule.is_due(step, at_epoch_end=at_end):
                schedule.saved_at, schedule.is_new = schedule.now(step), False
                saved.append(-step if at_end else step)
    return saved


@pytest.mark.parametrize("text, minutes_a_step", [("10min", 1), ("10steps", 7)])
def test_short_epochs_are_saved_at_their_ends_and_long_ones_within(monkeypatch, text, minutes_a_step):
    """In both units alike. Epochs of 3: at step 9, because by the end of another one 10 would have passed."""
    assert saves(monkeypatch, text, [3] * 7, minutes_a_step) == [-9, -18]
    assert saves(monkeypatch, text, [3] * 7, minutes_a_step, is_new=True) == [-3, -12, -21]
    assert saves(monkeypatch, text, [10] * 3, minutes_a_step) == [-10, -20, -30]
    assert saves(monkeypatch, text, [25, 25], minutes_a_step) == [10, 20, -25, 35, 45, -50]
    assert saves(monkeypatch, text, [4, 25, 4], minutes_a_step) == [10, 20, -29]


def test_nothing_is_written_while_pictures_are_judged(folder, tmp_path, monkeypatch):
    """Their loaders fork, and a child must not inherit the locks of a thread."""
    save, judges, written_late, judged = checkpoint.save, threading.Event(), [], []

    def slow(*args):
        if not written_late:  # the save of step 2, one step before the end of the epoch
            written_late.append(not judges.wait(0.8))
        save(*args)

    def judge(*_):
        judged.append(1)
        if len(judged) > 2:  # after the floors
            judges.set()
        return {20: {"top1": 50.0}}

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr("pretrain.nearest_neighbours", judge)
    flags = RUN | {"epochs": 1, "eval_every": 1, "save_every": "2steps"}
    pretrain(dataset=str(folder), out=str(tmp_path / "run"), **flags)
    assert written_late == [True] and len(judged) == 3


def test_processes_agree_on_the_interval(folder, tmp_path, monkeypatch):
    """Where one looks and the other does not, both wait."""
    agreed = {}

    def agree(**facts):
        agreed.update(facts)
        raise InputError("seen")

    monkeypatch.setattr("lib.processes.agree", agree)
    monkeypatch.setattr("harness.run.processes.are_several", lambda: True)
    with pytest.raises(InputError, match="seen"):
        pretrain(dataset=str(folder), out=str(tmp_path / "run"), save_every="2steps", **RUN)
    assert agreed["save_every"] == "2steps"


class Together:
    """What Accelerate is to two threads: each gets the rows of both."""

    num_processes, device = 2, torch.device("cpu")
    barrier, rows = threading.Barrier(2, timeout=60), {}

    def __init__(self, rank):
        self.rank, self.gathers = rank, 0

    def gather(self, row):
        self.gathers += 1
        self.rows[self.rank] = row
        self.barrier.wait()
        both = torch.cat([self.rows[0], self.rows[1]])
        self.barrier.wait()
        return both


def looks_of_two(monkeypatch, text, first, second):
    """What `Run._look` returns to each of two processes at 200 steps of two epochs, and how often they have met.

    `first` and `second`: the seconds of a step by the clock of each, and the step at which it gets a signal.
    """
    clock = threading.local()
    monkeypatch.setattr("harness.run.time.monotonic", lambda: clock.time)
    looks, meetings = [[], []], [0, 0]

    def train(rank, seconds_a_step, signal_at):
        clock.time = 0.0
        run = Run.__new__(Run)
        run.accelerator, run.signals = Together(rank), []
        run._schedule = Schedule(text, 0, is_new=False)
        run._looked_at, run._look_step, run._next_look = 0.0, 0, 1
        for run.step in range(1, 201):
            clock.time += seconds_a_step
            if run.step == signal_at:
                run.signals.append(signal.SIGINT)
            caught, is_due = run._look(at_epoch_end=run.step % 100 == 0)
            looks[rank].append((run.step, caught, is_due))
            if is_due:
                run._schedule.saved_at = run._schedule.now(run.step)
            if caught:
                break
            if run.step == 100:
                run._schedule.epoch_began = run._schedule.now(run.step)
        meetings[rank] = run.accelerator.gathers

    threads = [threading.Thread(target=train, args=(rank, *given)) for rank, given in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looks[0] == looks[1] and meetings[0] == meetings[1]
    return looks[0], meetings[0]


@pytest.mark.parametrize("text, steps", [("1min", [61, 100, 160, 200]), ("70steps", [70, 100, 170, 200])])
def test_processes_whose_clocks_differ_save_at_the_same_steps(monkeypatch, text, steps):
    """The first decides, of which a step takes a second: it looks after step 1 and after each fifth from there."""
    looks, _ = looks_of_two(monkeypatch, text, (1, None), (99, None))
    assert [step for step, _, is_due in looks if is_due] == steps
    assert not any(caught for _, caught, _ in looks)


def test_a_signal_to_one_of_two_processes_ends_both(monkeypatch):
    """At the next look; steps of 2 seconds have one after steps 1, 3 and 5."""
    looks, meetings = looks_of_two(monkeypatch, "500steps", (2, None), (9, 4))
    assert looks[-1] == (5, signal.SIGINT, False) and meetings == 3


def test_processes_whose_steps_are_quick_meet_rarely(monkeypatch):
    _, meetings = looks_of_two(monkeypatch, "500steps", (0.01, None), (0.01, None))
    assert meetings == 3  # after the first step and at the end of each epoch
