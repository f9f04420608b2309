"""When numbers of a run mean collapse: limits that the training log and the monitor share."""

ONE_HOT = 0.02  # teacher entropy in ln K; below, each sample has one prototype
UNIFORM = 0.995  # teacher entropy in ln K; above, all samples have all prototypes ...
AGREES = 0.05  # ... and the student agrees: fewer nats from the teacher's targets than this
ALIKE = 0.99  # mean cosine of features; above, all of them point one way
FLAT = 0.05  # rank of features as a share of what is possible; below, most dimensions are lost


def spiked(loss, before):
    """Whether a loss is far above what it was before. KoLeo may make it negative: half of its size is added."""
    return loss > before + 0.5 * abs(before)
