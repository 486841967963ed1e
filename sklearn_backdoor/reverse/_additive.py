"""The smallest perturbation that, added to images, sends them to one class."""

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._anomaly import (
    ADDITIVE_COLUMN_SD,
    ADDITIVE_FEW_SD,
    ADDITIVE_FINE_SD,
    ADDITIVE_PAIR_SD,
    ADDITIVE_POWER,
    ADDITIVE_SD,
    NULLS,
    rank_by_p,
)
from sklearn_backdoor.reverse._fast import FastReverseEngineer
from sklearn_backdoor.reverse._forms import AdditiveSearch

# a weak attack reaches it too, at a larger amplitude; norms of classes that are no
# targets grow faster with the rate
DETECTION_RATE = 0.95
_FINE_RATE = 0.7  # high frequencies alone lead many images nowhere


class AdditiveReverseEngineer(FastReverseEngineer):
    """Find the target class and the perturbation of an additive trigger.

    For each class, grow a perturbation by small normalised gradient steps on the images
    that are not yet classified to it, until most are. A class whose perturbation has an
    abnormally small L2 norm is a target. Made for faint patterns over the whole image,
    such as the chessboard.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    sources : {"learnt", "all", "pairs"}, default="learnt"
        Source classes that a perturbation is meant for: those that reach the target
        most easily, by weights learnt in the search; all together; or each pair of
        classes by itself, which costs as many searches as there are pairs.
    min_frequency : float in 0...1, default=0
        Spatial frequencies below are kept out of the perturbation, in units of the
        highest that the image has (Nyquist's). What makes one class look like another
        lies in low frequencies, a chessboard in high ones, noise in both: 0.75 makes
        the first harder and leaves the chessboard as easy as it is. The null for it was
        set with ``sources="all"`` and ``"pairs"``.
    success_rate : float in 0...1, default=None
        Fraction of moved images that must be classified to the candidate; None for
        0.95, and for 0.7 with a ``min_frequency``.
    max_steps : int, default=60
        Mini-batches a class.
    batch_size : int, default=32
        Images a mini-batch.
    alpha : float in 0...1, default=0.05
        Classes with a p-value below are flagged.
    null : {"log-normal", "gamma"}, default="log-normal"
        Distribution of the norms of classes that are no targets, see `p_values`.
        "gamma" is the published one.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    triggers_ : list of AdditiveTrigger
        The estimate for each class; refined for flagged classes.
    norms_ : ndarray of shape (n_classes,)
        L2 norm of each perturbation, pixels in 0...1, where classes were compared.
    p_values_ : ndarray of shape (n_classes,)
        Probability of a norm as small if no class is a target; of pairs as in
        `NCReverseEngineer`, or of the smallest of a target's pairs (``null="gamma"``).
    others
        As in `NCReverseEngineer`.

    Notes
    -----
    Deviations from the sources:

    - While the success rate is reached, the perturbation shrinks, and at the end it is
      scaled to the smallest multiple that reaches it; the sources stop at the rate.
    - The success rate is 0.95; the sources take 0.8 to 0.95. Flagged perturbations are
      refined as in `NCReverseEngineer`.
    - ``min_frequency`` is ours: of each step the low coefficients of its cosine
      transform (DCT-II) are taken out, and steps are longer. A flagged perturbation is
      refined with all frequencies.
    - Source weights are the softmax of minus the running losses of the source classes;
      L-RED learns them by gradient steps.
    - The default null is a t-test on log-norms, since the published Gamma flags clean
      victims far too often with ten classes, see `p_values`.

    References
    ----------
    Xiang, Miller, Kesidis: Detection of backdoors in trained classifiers without access
    to the training set. IEEE TNNLS 2020.
    Xiang, Miller, Kesidis: L-RED: Efficient post-training detection of imperceptible
    backdoor attacks without access to the training set. ICASSP 2021.
    """

    _kind = AdditiveSearch
    _pair_null = {
        "pair_sd": ADDITIVE_PAIR_SD,
        "column_sd": ADDITIVE_COLUMN_SD,
        "power": ADDITIVE_POWER,
    }

    def __init__(
        self,
        victim,
        *,
        sources="learnt",
        min_frequency=0.0,
        success_rate=None,
        max_steps=60,
        batch_size=32,
        alpha=0.05,
        null="log-normal",
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.sources = sources
        self.min_frequency = min_frequency
        self.success_rate = success_rate
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.alpha = alpha
        self.null = null
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        super()._check_params()
        check_number(self.alpha, "alpha", 0, 1)
        check_number(self.min_frequency, "min_frequency", 0, 1)
        if self.null not in NULLS:
            raise ValueError(f"null={self.null!r}, expected one of {', '.join(NULLS)}.")

    @property
    def _null(self):
        return self.null

    @property
    def _prior_sd(self):
        if self.sources != "all":
            return ADDITIVE_FEW_SD
        return ADDITIVE_FINE_SD if self.min_frequency > 0 else ADDITIVE_SD

    @property
    def _rate(self):
        return _FINE_RATE if self.min_frequency > 0 else DETECTION_RATE

    def _open_search(self, problem, tasks, generators, stage, **options):
        if stage != "refine":  # from there, whatever the images take
            options["min_frequency"] = self.min_frequency
        return super()._open_search(problem, tasks, generators, stage, **options)

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)
