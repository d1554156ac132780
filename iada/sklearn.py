"""`IADAClassifier`: the loss and Meta-IADA on arrays of features, as a scikit-learn estimator.

The one module that imports scikit-learn: `pip install 'iada[demo]'` has it.
"""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    text = "iada.sklearn needs scikit-learn 1.6 or newer: pip install -U scikit-learn"
    raise ImportError(text) from error

from iada.methods.meta_iada import MetaIADAOptions
from iada.models import mlp
from iada.training.config import TrainerConfig
from iada.training.label_issues import SampleLog, label_issues
from iada.training.trainer import Trainer
from iada.utils.checks import argument_error, check_choice, check_count
from iada.utils.loading import TensorData

METHODS = ("iada", "meta-iada")


class IADAClassifier(ClassifierMixin, BaseEstimator):
    """A linear head, or a small MLP, on features, trained by implicit adversarial augmentation.

    Examples:
        >>> from iada.sklearn import IADAClassifier
        >>> model = IADAClassifier(method="meta-iada", random_state=0).fit(X, y, X_meta, y_meta)
        >>> probability = model.predict_proba(X_test)
        >>> suspects = model.label_issues_.indices[:20]  # rows of X whose labels are worth a look

    Features are standardised first, by the training set's mean and deviation.

    Args:
        method: "iada": Eq. 6 with ε = 0, which is ISDA with Logit Adjustment and needs no meta set.
            "meta-iada": ε and Σ are learned on a small clean meta set, against wrong labels.
        hidden: widths of hidden layers before the head; () for a linear classifier.
        alpha: of Eq. 6: how far features spread within their class's covariance; 0 for not at all.
        beta: of Eq. 6: how much the classes' shares count; 0 for not at all. At 1, predictions and
            probabilities are for equally frequent classes; pass 0 where what is predicted has the
            shares of the training set.
        epochs: passes over the training set. Of "meta-iada" the first half is plain CE.
        batch_size: rows of a step.
        lr: of SGD with momentum 0.9, falling to 0 as a cosine.
        weight_decay: of SGD.
        meta_per_class: rows of each class that "meta-iada" takes for its meta set where `fit` is
            given none; half of a class at most. They are believed, and not trained on.
        random_state: of initial weights, order and that choice.

    Attributes:
        classes_: labels, in the order of predict_proba's columns.
        n_features_in_: columns of X.
        epsilon_: of "meta-iada": the mean ε of each row of X late in training, (n); NaN for rows of
            the meta set, and of "iada".
        loss_: of "meta-iada": the mean loss of each row of X over training, (n); NaN for rows of
            the meta set. Of "iada" NaN, but where alpha and beta are 0: plain cross-entropy.
        label_issues_: `iada.label_issues` of these two, where either is known; rows of the meta
            set come last.
        n_iter_: epochs that were trained.
    """

    def __init__(
        self,
        method: str = "iada",
        *,
        hidden: tuple[int, ...] = (),
        alpha: float = 0.1,
        beta: float = 1.0,
        epochs: int = 60,
        batch_size: int = 64,
        lr: float = 0.05,
        weight_decay: float = 5e-4,
        meta_per_class: int = 10,
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.hidden = hidden
        self.alpha = alpha
        self.beta = beta
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.meta_per_class = meta_per_class
        self.random_state = random_state

    def fit(self, X: Any, y: Any, X_meta: Any = None, y_meta: Any = None) -> Self:
        """Train on features X (n, A) and labels y (n).

        Args:
            X: finite numbers.
            y: labels of any kind, of two classes at least.
            X_meta: of "meta-iada": features of a small clean meta set, balanced best, (m, A).
            y_meta: its labels, (m).

        Raises:
            ValueError: arrays or settings that do not fit.
            FloatingPointError: training diverged.
        """
        check_choice("method", self.method, METHODS)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, given = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            got = f"1 class, {self.classes_[0]!r}"
            raise argument_error("y", "at least 2 classes", got, "add samples of another class")
        rng = check_random_state(self.random_state)
        seed = int(rng.randint(2**31 - 1))
        self._mean, deviation = X.mean(axis=0), X.std(axis=0)
        self._scale = np.where(deviation > 1e-12 * np.abs(self._mean), deviation, 1.0)
        rows, meta = np.arange(len(X)), None
        if X_meta is not None or y_meta is not None:
            meta = self._given_meta(X_meta, y_meta)
        elif self.method == "meta-iada":
            rows, taken = self._take_meta(given, rng)
            meta = TensorData(self._features(X[taken]), torch.from_numpy(given[taken]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._train(self._features(X[rows]), torch.from_numpy(given[rows]), meta, seed)
        self.epsilon_, self.loss_ = np.full((2, len(X)), np.nan)
        for known, values in (
            (self.epsilon_, self._log.mean_epsilon()),
            (self.loss_, self._log.mean_loss()),
        ):
            if values is not None:
                known[rows] = values.numpy()
        measured = {
            name: torch.from_numpy(values)
            for name, values in (("epsilon", self.epsilon_), ("loss", self.loss_))
            if not np.isnan(values).all()
        }
        if measured:
            self.label_issues_ = label_issues(**measured)
        elif hasattr(self, "label_issues_"):
            del self.label_issues_  # of another fit
        del self._log
        self.n_iter_ = int(self.epochs)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, (n, C), in the order of `classes_`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            logits = self._head(self._backbone(self._features(X)))
        return logits.double().softmax(dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of each row, (n)."""
        chosen = self.predict_proba(X).argmax(axis=1)
        return self.classes_[chosen]

    def _features(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self._mean) / self._scale).float()

    def _take_meta(self, given: np.ndarray, rng: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on, and those that become the meta set."""
        each = _whole("meta_per_class", self.meta_per_class)
        by_class = [rng.permutation(np.flatnonzero(given == c)) for c in range(len(self.classes_))]
        taken = [rows[: min(each, len(rows) // 2)] for rows in by_class]
        for name, rows in zip(self.classes_, taken, strict=True):
            if not len(rows):
                remedy = "pass X_meta and y_meta"
                raise argument_error("y", f"2 samples of class {name!r} or more", "too few", remedy)
        meta = np.sort(np.concatenate(taken))
        return np.setdiff1d(np.arange(len(given)), meta), meta

    def _given_meta(self, X_meta: Any, y_meta: Any) -> TensorData:
        given, missing = ("y_meta", "X_meta") if X_meta is None else ("X_meta", "y_meta")
        if self.method != "meta-iada":
            remedy = f"set method='meta-iada', or leave {given} out"
            raise argument_error(given, f"none with method {self.method!r}", "an array", remedy)
        if X_meta is None or y_meta is None:
            remedy = f"pass both, or leave {given} out: rows of each class are taken then"
            raise argument_error(missing, f"an array, as {given} is one", "None", remedy)
        X_meta, y_meta = validate_data(self, X_meta, y_meta, reset=False, dtype=np.float64)
        unknown = np.setdiff1d(y_meta, self.classes_)
        if len(unknown):
            expected = f"the classes of y ({', '.join(map(str, self.classes_))})"
            raise argument_error("y_meta", expected, repr(unknown[0]), "take these rows out")
        labels = torch.from_numpy(np.searchsorted(self.classes_, y_meta))
        return TensorData(self._features(X_meta), labels)

    def _train(self, features: Tensor, labels: Tensor, meta: TensorData | None, seed: int) -> None:
        epochs, batch_size = _whole("epochs", self.epochs), _whole("batch_size", self.batch_size)
        learned = self.method == "meta-iada"
        plain = not (learned or self.alpha or self.beta)
        options = MetaIADAOptions(
            alpha=float(self.alpha),
            beta=float(self.beta),
            perturbation="learned" if learned else "constant",
            covariance_lr=1e-3 if learned else 0.0,
        )
        config = TrainerConfig(
            method=options,
            epochs=epochs,
            ce_epochs=epochs // 2 if learned else epochs * plain,
            batch_size=min(batch_size, len(features)),
            meta_batch_size=batch_size,
            lr=float(self.lr),
            weight_decay=float(self.weight_decay),
            schedule="cosine",
            seed=seed,
        )
        width, count, hidden = features.shape[1], len(self.classes_), self._hidden()
        backbone: nn.Module = nn.Identity()
        head = nn.Linear(width, count, dtype=features.dtype)
        if hidden:
            backbone, head = mlp(width, hidden, count, features.dtype)
        self._log = SampleLog(len(features), epochs)
        data = TensorData(features, labels)
        Trainer(backbone, head, data, meta, config, observe=self._log).fit()
        self._backbone, self._head = backbone.eval(), head.eval()

    def _hidden(self) -> tuple[int, ...]:
        widths = self.hidden.tolist() if isinstance(self.hidden, np.ndarray) else self.hidden
        if not isinstance(widths, list | tuple):
            remedy = "pass (16,) for one layer of 16, () for none"
            raise argument_error("hidden", "a tuple of widths", repr(self.hidden), remedy)
        return tuple(_whole("hidden", width) for width in widths)


def _whole(name: str, value: Any) -> int:
    """A whole number from 1 on; numpy's too, which searches over arrays of settings pass."""
    value = int(value) if isinstance(value, np.integer) else value
    check_count(name, value)
    return value
