"""The sequences of the induction task: what is held out is never seen, and a draw depends on its counters alone."""

import pytest
import torch

from experiments.induction_formation.task import Task, draw, every_sequence, exemplars, mean_cosine, source
from hooks.errors import InputsError

TASKS = [Task(), Task(n_classes=200, n_labels=15), Task(n_labels=10)]


def seen(split: str, steps: int = 40):
    where = source(TASKS, [3, 4, 5], split)
    batches = [draw(where, step, 64) for step in range(steps)]
    return [torch.cat([getattr(b, name) for b in batches], -1) for name in ("classes", "labels", "target", "answer")]


def test_default_sizes_are_the_papers():
    task = Task()
    assert (task.n_classes, task.held_out_classes, len(task.pairs), task.n_training_pairs) == (50, 100, 10, 8)
    assert exemplars(task).shape == (300, 512)
    assert [round(0.8 * len(t.pairs)) for t in TASKS] == [t.n_training_pairs for t in TASKS]
    assert len(every_sequence(task).target) == 50 * 49 * 16 * 2


def test_sequences_are_two_different_classes_with_two_different_labels():
    for split in ("train", "labels", "classes"):
        classes, labels, target, answer = seen(split)
        assert (classes[:, 0] != classes[:, 1]).all()
        assert (labels[:, 0] != labels[:, 1]).all()
        assert torch.equal(answer, torch.where(target == 1, labels[:, 1], labels[:, 0]))
        assert 0.45 < target.double().mean() < 0.55


def test_splits_hold_out_what_they_say():
    classes, labels, _, _ = seen("train")
    for member, task in enumerate(TASKS):
        assert classes[member].max() == task.n_classes - 1
        assert len(classes[member].unique()) == task.n_classes
        drawn = {tuple(sorted(p)) for p in labels[member].T.tolist()}
        training = {tuple(p) for p in task.pairs[: task.n_training_pairs].tolist()}
        assert drawn == training
        assert len(torch.tensor(sorted(training)).unique()) == task.n_labels
        held = {tuple(sorted(p)) for p in seen("labels")[1][member].T.tolist()}
        assert held == {tuple(p) for p in task.pairs[task.n_training_pairs :].tolist()}
        assert not held & training
    novel = seen("classes")[0]
    assert novel.min() == 200
    assert len(novel[0].unique()) == 100


def test_labels_are_drawn_again_for_every_sequence():
    classes, labels, _, _ = seen("train")
    first = labels[0, 0][classes[0, 0] == 7]
    assert len(first.unique()) == 5
    assert {tuple(p) for p in labels[0].T.tolist()} == {
        tuple(q) for p in Task().pairs[:8].tolist() for q in (p, p[::-1])
    }


def test_a_draw_is_the_same_alone_and_together():
    together = draw(source(TASKS, [3, 4, 5]), torch.tensor(9), 16)
    for index, task in enumerate(TASKS):
        alone = draw(source([task], [3 + index]), 9, 16)
        for mine, own in zip(together, alone, strict=True):
            assert torch.equal(mine[index], own[0])
    other = draw(source(TASKS, [3, 4, 5]), 10, 16)
    assert not torch.equal(other.classes, together.classes)


def test_ids_spell_the_sequence():
    batch = draw(source(TASKS[:1], [0]), 0, 8)
    ids = batch.ids(300)[0]
    assert ids.shape == (8, 5)
    assert torch.equal(ids[:, [0, 2]].T, batch.classes[0])
    assert torch.equal(ids[:, [1, 3]].T - 300, batch.labels[0])
    assert torch.equal(ids[:, 4], batch.classes[0].gather(0, batch.target)[0])


def test_an_exemplar_depends_on_its_number_alone():
    assert torch.equal(exemplars(Task(), 20)[:5], exemplars(Task(largest=60), 20)[:5])
    assert not torch.equal(exemplars(Task(), 20), exemplars(Task(), 20, seed=1))


@pytest.mark.parametrize("bad", [{"n_classes": 1}, {"n_classes": 201}, {"n_labels": 2}, {"held_out_classes": 1}])
def test_sizes_that_make_no_task_are_refused(bad):
    with pytest.raises(InputsError):
        Task(**bad)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputsError, match="did you mean 'classes'"):
        source([Task()], [0], "class")
    with pytest.raises(InputsError, match="share one table"):
        source([Task(), Task(largest=100)], [0, 1])


def test_classes_may_share_a_mean():
    """The cosine between classes is what was asked for, their size stays, and their own directions are the same."""
    task = Task()
    for cosine in (0.0, 0.3, 0.5, 0.8):
        table = exemplars(task, cosine=cosine)
        assert mean_cosine(table) == pytest.approx(cosine, abs=0.03)
        assert float(table.square().mean()) == pytest.approx(1, abs=0.08)
        own = (table - table.mean(0)) / (1 - cosine) ** 0.5
        torch.testing.assert_close(own, exemplars(task) - exemplars(task).mean(0), rtol=0, atol=1e-10)
    two = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0]])
    assert mean_cosine(two) == pytest.approx((0.96 + 0.8 + 0.6) / 3)
    for bad in (-0.1, 1.0):
        with pytest.raises(InputsError, match="less than 1"):
            exemplars(task, cosine=bad)
