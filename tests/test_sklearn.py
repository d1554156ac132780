"""The scikit-learn estimator: scikit-learn's own checks, and what it is for."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from iada.sklearn import IADAClassifier

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"epochs": 8, "lr": 0.1, "batch_size": 32}


@parametrize_with_checks([IADAClassifier(**SMALL), IADAClassifier(hidden=(8,), **SMALL)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def flipped():
    """Digits, 40 % of the training labels flipped to the next class, and a clean meta set."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    train, meta, test = order[:700], order[700:800], order[800:1300]
    wrong = np.random.default_rng(1).random(len(train)) < 0.4
    given = np.where(wrong, (y[train] + 1) % 10, y[train])
    return X, y, train, meta, test, wrong, given


def test_meta_iada_withstands_flipped_labels_and_finds_them(flipped):
    X, y, train, meta, test, wrong, given = flipped
    plain = IADAClassifier(alpha=0, beta=0, epochs=24, random_state=0).fit(X[train], given)
    model = IADAClassifier("meta-iada", epochs=24, random_state=0)
    model.fit(X[train], given, X[meta], y[meta])
    assert model.score(X[test], y[test]) > plain.score(X[test], y[test])
    assert not hasattr(IADAClassifier(epochs=1).fit(X[train], given), "label_issues_")
    by_loss = wrong[plain.label_issues_.indices[: wrong.sum()].numpy()]
    assert by_loss.mean() > 0.5
    first = model.label_issues_.indices[: wrong.sum()].numpy()
    assert wrong[first].mean() > 0.6  # 0.4 by chance


def test_the_same_state_gives_the_same_model_and_torch_is_left_alone(flipped):
    X, _, train, _, test, _, given = flipped
    before = torch.get_rng_state()
    models = [IADAClassifier("meta-iada", epochs=2, random_state=3) for _ in range(2)]
    one, other = (m.fit(X[train], given).predict_proba(X[test]) for m in models)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(one, other)
    different = IADAClassifier("meta-iada", epochs=2, random_state=4).fit(X[train], given)
    assert not np.array_equal(one, different.predict_proba(X[test]))
    scores = models[0].label_issues_.scores
    assert int(scores.isnan().sum()) == 100  # ten of each class are the meta set


def test_it_works_in_pipelines_and_with_names():
    X, y = load_digits(n_class=3, return_X_y=True)
    names = np.array(["zero", "one", "two"])[y]
    model = make_pipeline(PCA(20), IADAClassifier(epochs=20, random_state=0))
    assert cross_val_score(model, X[:150], names[:150], cv=2).mean() > 0.9


def test_what_does_not_fit_is_named(flipped):
    X, y, train, meta, _, _, given = flipped
    with pytest.raises(ValueError, match="method: expected one of"):
        IADAClassifier("focal").fit(X[train], given)
    with pytest.raises(ValueError, match="X_meta: expected none with method 'iada'"):
        IADAClassifier().fit(X[train], given, X[meta], y[meta])
    with pytest.raises(ValueError, match=r"y_meta: expected the classes of y .* got .*77"):
        IADAClassifier("meta-iada").fit(X[train], given, X[meta], np.full(len(meta), 77))
    with pytest.raises(ValueError, match="expected 2 samples of class"):
        IADAClassifier("meta-iada").fit(X[:3], np.array([0, 0, 1]))


@pytest.mark.parametrize("count", [-1, 0, 2.5, True, "10"])
def test_the_meta_set_s_size_is_a_count(flipped, count):
    X, y, train, meta, _, _, given = flipped
    model = IADAClassifier("meta-iada", epochs=1, meta_per_class=count)
    with pytest.raises(ValueError, match="^meta_per_class: expected a whole number from 1 on, got"):
        model.fit(X[train], given)
    model.fit(X[train], given, X[meta], y[meta])  # takes none


def test_settings_may_be_numpys(flipped):
    """As a search over arrays of settings passes them."""
    X, _, train, _, _, _, given = flipped
    settings = {"epochs": np.array([1, 2]), "batch_size": np.array([32])}
    search = GridSearchCV(IADAClassifier(random_state=0), settings, cv=2, error_score="raise")
    search.fit(X[train], given)
    assert type(search.best_estimator_.n_iter_) is int
    models = [
        IADAClassifier("meta-iada", hidden=hidden, epochs=1, meta_per_class=each, random_state=0)
        for hidden, each in (((8,), 4), ((np.int64(8),), np.int64(4)), (np.array([8]), 4), ([8], 4))
    ]
    one, *others = (model.fit(X[train], given).predict_proba(X[train]) for model in models)
    assert all(np.array_equal(one, other) for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number from 1 on, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number from 1 on, got 2.5"),
        ({"hidden": 16}, r"hidden: expected a tuple of widths, got 16; pass \(16,\)"),
        ({"hidden": np.array(16)}, "hidden: expected a tuple of widths"),
        ({"hidden": (8, 0)}, "hidden: expected a whole number from 1 on, got 0"),
        ({"hidden": "8"}, "hidden: expected a tuple of widths, got '8'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(flipped, settings, message):
    X, _, train, _, _, _, given = flipped
    with pytest.raises(ValueError, match=f"^{message}"):
        IADAClassifier(**settings).fit(X[train], given)


def test_a_meta_set_has_features_and_labels(flipped):
    X, y, train, meta, _, _, given = flipped
    model = IADAClassifier("meta-iada", epochs=1)
    with pytest.raises(ValueError, match="^y_meta: expected an array, as X_meta is one, got None"):
        model.fit(X[train], given, X[meta])
    with pytest.raises(ValueError, match="^X_meta: expected an array, as y_meta is one, got None"):
        model.fit(X[train], given, y_meta=y[meta])
    with pytest.raises(ValueError, match="^y_meta: expected none with method 'iada'"):
        IADAClassifier().fit(X[train], given, y_meta=y[meta])


@pytest.mark.parametrize("method", ["iada", "meta-iada"])
@pytest.mark.parametrize("hidden", [(), (8,)])
def test_torchs_default_dtype_may_be_float64(flipped, method, hidden):
    X, _, train, _, _, _, given = flipped
    model = IADAClassifier(method, hidden=hidden, epochs=2, random_state=0)
    plain = model.fit(X[train], given).score(X[train], given)
    torch.set_default_dtype(torch.float64)
    try:
        found = model.fit(X[train], given).score(X[train], given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs(found - plain) < 0.1  # from other initial weights
