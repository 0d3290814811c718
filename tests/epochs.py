"""The loop of train.py over one epoch, for the tests of trainers.py and of many processes."""

import trainers


def run_epoch(step, epoch=0, *, batch_size=5, lr=0.02, momentum=0.9, print_freq=2, first=0,
              losses=None, reports=None, after_step=None):
    """Train for one epoch, or for what is left of one.

    Args:
        reports: list that (epoch, step, loss) is appended to every `print_freq` steps.
        after_step: function (epoch, step, Epoch) called after each step.

    Returns:
        mean loss of the epoch.
    """
    with trainers.Epoch(step, epoch, batch_size, f"epoch {epoch}", first, losses) as batches:
        for number, batch in batches:
            batches.add(number, step(batch, epoch, number, lr, momentum))
            if (number + 1) % print_freq == 0 or number + 1 == len(batches):
                loss = float(batches.losses()[-1])
                if reports is not None:
                    reports.append((epoch, number, loss))
            if after_step is not None:
                after_step(epoch, number, batches)
    return batches.mean_loss()
