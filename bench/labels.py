"""`python -m bench.labels`: how well wrong labels are found, beside cleanlab's confident learning.

Labels are flipped on purpose, so that which are wrong is known; each method ranks all training
samples, and the area under its ROC curve is taken. All have the same noisy samples and the same
100 clean ones: Meta-IADA as its meta set, the others as training samples. cleanlab
(`pip install cleanlab`) judges by probabilities out of sample, five folds, of logistic
regression or of the same network trained by cross-entropy.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iada.experiments.report.table import Cell, Table
from iada.sklearn import IADAClassifier
from iada.training.label_issues import detection, label_issues
from iada.utils.files import write_text
from iada_kernels.environment import environment, headline

SHARES, META = (0.2, 0.4), 10  # share of wrong labels; clean samples of each class
KINDS = ("flip", "uniform")
FOLDS, MOST = 5, 4000  # samples
Data = tuple[np.ndarray, np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.labels", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of noise, split and training")
    parser.add_argument("--features", type=Path, help="an .npz of `iada features`, beside digits")
    parser.add_argument("--noise", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    parser.add_argument("--epochs", type=int, default=60, help="of the networks (default 60)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    print(headline(machine, {"backend": machine["backend"]}) + "\n", flush=True)
    data: dict[str, tuple[Data, tuple[int, ...]]] = {"digits": (digits(), (128, 64))}
    if options.features is not None:
        data[options.features.stem] = (features(options.features), ())
    rows: list[dict[str, Any]] = []
    for name, (samples, hidden) in data.items():
        for kind in options.noise:
            for share in SHARES:
                runs = [
                    one(samples, kind, share, hidden, options.epochs, seed)
                    for seed in range(options.seeds)
                ]
                auroc = {way: [round(run[way], 5) for run in runs] for way in runs[0]}
                rows.append({"data": name, "noise": kind, "share": share, "auroc": auroc})
                means = (f"{way} {statistics.fmean(values):.3f}" for way, values in auroc.items())
                print(f"{name}, {100 * share:.0f} % {kind}: {', '.join(means)}", flush=True)
                if options.json is not None:
                    about = {"seeds": options.seeds, "epochs": options.epochs, "meta": META}
                    content = {"environment": machine, **about, "rows": rows}
                    write_text(
                        options.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                    )
    print(table(rows))
    return 0


def digits() -> Data:
    """scikit-learn's digits."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def features(path: Path) -> Data:
    """The training features of a file."""
    with np.load(path) as arrays:
        return arrays["train_inputs"], arrays["train_labels"]


def planted(labels: np.ndarray, kind: str, share: float, rng: np.random.Generator) -> np.ndarray:
    """The labels with this share of them moved: to the next class, or to any other one."""
    classes = int(labels.max()) + 1
    moved = rng.random(len(labels)) < share
    step = 1 if kind == "flip" else rng.integers(1, classes, len(labels))
    return np.where(moved, (labels + step) % classes, labels)


def one(
    data: Data, kind: str, share: float, hidden: tuple[int, ...], epochs: int, seed: int
) -> dict[str, float]:
    """The AUROC of each ranking."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data[1]))
    X, y = data[0][order], data[1][order]
    clean = np.concatenate([np.flatnonzero(y == c)[:META] for c in np.unique(y)])
    noisy = np.setdiff1d(np.arange(len(y)), clean)[:MOST]
    given = planted(y[noisy], kind, share, rng)
    wrong = torch.from_numpy(given != y[noisy])

    def network(method: str = "iada", **options: Any) -> IADAClassifier:
        return IADAClassifier(method, hidden=hidden, epochs=epochs, random_state=seed, **options)

    ours = network("meta-iada").fit(X[noisy], given, X[clean], y[clean])
    both_X, both_y = np.concatenate([X[noisy], X[clean]]), np.concatenate([given, y[clean]])
    plain = network(alpha=0, beta=0).fit(both_X, both_y)
    epsilon, loss = torch.from_numpy(ours.epsilon_), torch.from_numpy(ours.loss_)
    plain_loss = torch.from_numpy(plain.loss_[: len(noisy)])
    scores = {
        "ε of Meta-IADA": label_issues(epsilon=epsilon).scores,
        "loss of Meta-IADA": label_issues(loss=loss).scores,
        "both": label_issues(epsilon, loss=loss).scores,
        "loss of CE": label_issues(loss=plain_loss).scores,
        "cleanlab, logistic": confident_learning(logistic, X[noisy], given, X[clean], y[clean]),
        "cleanlab, network": confident_learning(
            lambda: network(alpha=0, beta=0), X[noisy], given, X[clean], y[clean]
        ),
    }
    known = {name: detection(-score, wrong) for name, score in scores.items()}
    return {name: value["auroc"] for name, value in known.items() if value is not None}


def logistic() -> Any:
    """The classifier of cleanlab's tutorials."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=400))


def confident_learning(
    classifier: Callable[[], Any],
    X: np.ndarray,
    given: np.ndarray,
    X_clean: np.ndarray,
    y_clean: np.ndarray,
) -> torch.Tensor:
    """How little cleanlab believes each label, (n): 1 − its label quality."""
    from cleanlab.rank import get_label_quality_scores
    from sklearn.model_selection import StratifiedKFold

    probability = np.zeros((len(given), int(y_clean.max()) + 1))
    for rest, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(X, given):
        train_X = np.concatenate([X[rest], X_clean])
        train_y = np.concatenate([given[rest], y_clean])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence
            model = classifier().fit(train_X, train_y)
        probability[fold] = model.predict_proba(X[fold])
    quality = get_label_quality_scores(given, probability, adjust_pred_probs=True)
    return torch.from_numpy(1 - np.asarray(quality, dtype=np.float64))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, the best of each row in bold."""
    names = list(rows[0]["auroc"])
    lines = []
    for row in rows:
        means = {name: statistics.fmean(row["auroc"][name]) for name in names}
        best = max(round(value, 3) for value in means.values())
        cells = [Cell(f"{row['data']}, {100 * row['share']:.0f} % {row['noise']}")]
        for name in names:
            values = row["auroc"][name]
            std = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(Cell(f"{means[name]:.3f}{std}", round(means[name], 3) == best))
        lines.append(cells)
    return Table(["wrong labels", *names], lines).markdown()


if __name__ == "__main__":
    raise SystemExit(main())
