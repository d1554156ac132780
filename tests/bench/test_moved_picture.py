"""Fig. 5 of a record, as a picture."""

import json
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib.image

from bench.moved_picture import COLUMNS, main


def uri(shade):
    file = BytesIO()
    matplotlib.image.imsave(file, np.full((4, 4, 3), shade), format="png")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def sample(label):
    nearest = [{"label": 1 - label, "distance": 2.0}]
    target = {"nearest": nearest, "residual": 0.5}
    target |= {"nearest_image": uri(0.2), "inverted_image": uri(0.8)}
    targets = [target | {"kind": kind} for kind in (*COLUMNS, "drawn")]
    return {"label": label, "epsilon": 0.25, "image": uri(0.5), "targets": targets}


def test_a_record_is_drawn(tmp_path, monkeypatch, capsys):
    path, picture = tmp_path / "record.json", tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["bench.moved_picture", str(path), str(picture)])
    record = {"class_names": ["cat", "dog"], "moved_features": {"samples": [sample(0), sample(1)]}}
    path.write_text(json.dumps(record))
    assert main() == 0
    pixels = matplotlib.image.imread(picture)[..., :3]
    near, own, made = (np.isclose(pixels, s, atol=0.01).all(axis=2).mean() for s in (0.2, 0.5, 0.8))
    assert own > 0.02
    assert near == pytest.approx(3 * own, rel=0.1)
    assert made == pytest.approx(3 * own, rel=0.1)
    path.write_text(json.dumps({"class_names": []}))
    with pytest.raises(SystemExit):
        main()
    assert "expected a run of --moved-features" in capsys.readouterr().err
